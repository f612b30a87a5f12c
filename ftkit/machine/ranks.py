"""Which of the processes this is that torchrun or accelerate started to train together, and what they tell each other."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from ftkit.recipe import Recipe

T = TypeVar("T")
# What accelerate is told of FSDP, before the processes join: that it is version 2, and that rank 0 is given whole tensors on its CPU.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
# Keys that ask for what one process trains alone, and how they are left out.
ALONE = {"training.packing": "--set training.packing=false,", "evaluate.every": "--set evaluate.every=0,"}
PATIENCE = timedelta(days=7)  # the first one may plan and render for long; of a process that died, the launcher ends the others


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def local_rank() -> int:
    """Which GPU of this machine is this process's, as CUDA counts them."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that plans, writes and prints."""
    return rank() == 0


def shares_weights(recipe: Recipe) -> bool:
    """Whether the processes share the weights out (FSDP): the recipe says so, or accelerate's own launcher was told to."""
    return world_size() > 1 and (recipe.training.fsdp or _is_set("ACCELERATE_USE_FSDP"))


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def refuse_command(name: str) -> None:
    """Raise RecipeError for a command that several processes would run over each other."""
    if world_size() > 1 and name != "train":
        raise RecipeError(
            f"`ftkit {name}` runs in one process, and {world_size()} were started.",
            f"without torchrun: ftkit {name}; what runs in several: torchrun --nproc-per-node {world_size()} -m ftkit train",
        )


def refuse(recipe: Recipe, gpus: int) -> None:
    """Raise RecipeError for what several processes do not train, or not yet. `gpus`: those of this machine; 0: the CPU trains."""
    count, training = world_size(), recipe.training
    if count == 1:
        if training.fsdp:
            raise RecipeError(
                "training.fsdp: one process has nobody to share the weights with.",
                f"torchrun --nproc-per-node {max(2, gpus)} -m ftkit train, or --set training.fsdp=false",
            )
        return
    alone = "train in one process: ftkit train"
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise RecipeError("DeepSpeed is not supported.", "choose FSDP, or plain multi-GPU training, in `accelerate config`")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise RecipeError("torch.compile (dynamo) is not supported.", "choose none in `accelerate config`")
    if int(os.environ.get("LOCAL_WORLD_SIZE", count)) != count:
        raise RecipeError("Several machines: ftkit trains with the processes of one.", f"torchrun --nproc-per-node {max(1, gpus)}")
    if 0 < gpus < count:
        raise RecipeError(f"{count} processes, and CUDA sees {gpus} GPU{'s' if gpus > 1 else ''}.", f"torchrun --nproc-per-node {gpus}")
    if training.effective_batch_size < count:
        raise RecipeError(
            f"training.effective_batch_size: {training.effective_batch_size} rows are fewer than {count} processes.",
            f"--set training.effective_batch_size={count}",
        )
    if name := one_process_alone(recipe):
        raise RecipeError(f"{name} is trained in one process, and {count} were started.", f"{ALONE[name]} or {alone}")
    if shares_weights(recipe):
        if _is_set("FSDP_OFFLOAD_PARAMS"):
            raise RecipeError("FSDP with weights offloaded to RAM is not supported.", "choose no offloading in `accelerate config`")
        if why := why_not_shared(recipe):
            raise RecipeError(f"{why}.", "leave it out, or let each process hold all weights: --set training.fsdp=false")


def one_process_alone(recipe: Recipe) -> str | None:
    """Which key of a recipe asks for what several processes do not train."""
    training = recipe.training
    asked = {
        "training.packing": training.packing,
        "evaluate.every": recipe.evaluate.every,
    }
    return next((name for name, is_asked in asked.items() if is_asked), None)


def why_not_shared(recipe: Recipe) -> str | None:
    """What of a recipe FSDP does not train, or was not tried with."""
    training = recipe.training
    if training.objective == "dpo":
        return "training.objective: dpo is not supported with FSDP"
    if training.optim != "adamw_torch":
        steps = "adafactor takes means over" if training.optim == "adafactor" else "bitsandbytes steps on"
        return f"training.optim: {training.optim} cannot be shared out (FSDP), since {steps} whole tensors"
    if training.compute_dtype == "float16":
        return "training.compute_dtype: float16, with its loss scaling, is not supported with FSDP"
    key = next((key for key in ("use_dora", "modules_to_save", "target_parameters") if getattr(recipe.lora, key)), None)
    return f"lora.{key}: is not supported with FSDP" if key else None


def share_weights(recipe: Recipe) -> None:
    """Where weights are shared out, tell accelerate, before this process joins the others. Its launcher's own settings are not read."""
    if not shares_weights(recipe):
        return
    for name in [name for name in os.environ if name.startswith("FSDP_")]:
        del os.environ[name]
    os.environ.update(FSDP)


def _join() -> None:
    """Be one of the processes: NCCL where they have GPUs, else gloo. The trainer finds it done."""
    from accelerate import PartialState
    from accelerate.utils import check_cuda_p2p_ib_support

    from ftkit.machine.device import choose

    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # the recipe says what is computed in
    on_cpu = choose().kind == "cpu"
    if not on_cpu and not check_cuda_p2p_ib_support():  # RTX 40 with an older driver, as accelerate's own launcher has it
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")
    PartialState(cpu=on_cpu, timeout=PATIENCE)


def tell(value: T | None = None) -> T | None:
    """What the first process gives here, in all of them."""
    if world_size() == 1:
        return value
    _join()
    from torch import distributed

    told: list[Any] = [value]
    distributed.broadcast_object_list(told, src=0)
    return told[0]  # type: ignore[no-any-return]


def wait() -> None:
    """Go on when all are here: the first too, which only telling them something would not hold up."""
    if world_size() > 1:
        _join()
        any_of()


def any_of(*flags: bool) -> list[bool]:
    """Each flag: whether it is set in any process."""
    return [any(each) for each in zip(*of_all(flags), strict=True)]


def of_all(value: T) -> list[T]:
    """What each process gives here, in all of them."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    given: list[Any] = [None] * world_size()
    distributed.all_gather_object(given, value)
    return given


def leave() -> None:
    """End together: a process whose others are gone while it still listens would be aborted."""
    if world_size() > 1:
        wait()
        from torch import distributed

        distributed.destroy_process_group()

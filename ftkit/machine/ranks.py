"""Which of the processes this is that torchrun or accelerate started to train together, and what they tell each other."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from ftkit.recipe import Recipe

T = TypeVar("T")
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}  # what accelerate sets for its own launcher's choices
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
        return
    alone = "train in one process: ftkit train"
    for name, what in SHARDED.items():
        if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
            raise RecipeError(
                f"{what} is not supported: each process holds the whole model.", "choose plain multi-GPU training in `accelerate config`"
            )
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
    if training.objective != "sft":
        raise RecipeError(f"training.objective: {training.objective} is learnt in one process, and {count} were started.", alone)
    if training.packing:
        raise RecipeError(f"training.packing: rows are packed in one process, and {count} were started.", "--set training.packing=false")
    if recipe.evaluate.every:
        raise RecipeError(
            f"evaluate.every: answers are asked in one process while training, and {count} were started.",
            f"--set evaluate.every=0, or {alone}",
        )


def _join() -> None:
    """Be one of the processes: NCCL where they have GPUs, else gloo. The trainer finds it done."""
    from accelerate import PartialState

    from ftkit.machine.device import choose

    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # the recipe says what is computed in
    PartialState(cpu=choose().kind == "cpu", timeout=PATIENCE)


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
    """Go on when all are here."""
    tell()


def any_of(*flags: bool) -> list[bool]:
    """Each flag: whether it is set in any process."""
    if world_size() == 1:
        return list(flags)
    from torch import distributed

    of_all: list[Any] = [None] * world_size()
    distributed.all_gather_object(of_all, flags)
    return [any(each) for each in zip(*of_all, strict=True)]


def leave() -> None:
    """End together: a process whose others are gone while it still listens would be aborted."""
    if world_size() > 1:
        wait()
        from torch import distributed

        distributed.destroy_process_group()

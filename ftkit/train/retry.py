"""What a training does where memory runs out or it diverges: it goes on smaller, or slower, and keeps that on record."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from ftkit.data.lengths import RIDGE_TOKENS
from ftkit.engines import hf
from ftkit.errors import DoesNotFitError, TrainingDivergedError, first_line
from ftkit.files import write_atomically
from ftkit.machine import ranks
from ftkit.machine.device import held_bytes
from ftkit.plan.choose import batch_sizes
from ftkit.recipe import Recipe
from ftkit.train.arguments import Settings
from ftkit.train.divergence import Detector, Diverged
from ftkit.units import bytes_text

RETRIES = "retries.json"  # in the training's folder, written before it goes on
Phase = Literal["step", "optimizer", "evaluation"]
UNITS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class Retry:
    """A training that went on otherwise."""

    why: Literal["out of memory", "diverged"]
    step: int  # that was reached
    from_step: int  # that it went on from; 0: from the beginning
    device: str
    per_device_train_batch_size: int  # from then on, and so the rest
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    learning_rate: float  # the highest
    said: str


def read_retries(folder: Path) -> list[Retry]:
    """Those of this training so far. A file that cannot be read is an error of its own: without it other weights would be learnt."""
    path = folder / RETRIES
    return [Retry(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def write_retries(folder: Path, retries: Sequence[Retry]) -> None:
    write_atomically(folder / RETRIES, (json.dumps([asdict(retry) for retry in retries], indent=1, ensure_ascii=False) + "\n").encode())


def settings_of(settings: Settings, retries: Sequence[Retry], device: str) -> Settings:
    """As planned, or as memory was last enough on this device, where that is less."""
    last = next((retry for retry in reversed(retries) if retry.why == "out of memory" and retry.device == device), None)
    if not last or last.per_device_train_batch_size > settings.per_device_train_batch_size:
        return settings
    return replace(
        settings,
        per_device_train_batch_size=last.per_device_train_batch_size,
        gradient_accumulation_steps=last.gradient_accumulation_steps,
        gradient_checkpointing=settings.gradient_checkpointing or last.gradient_checkpointing,
    )


def rate_factor(retries: Sequence[Retry]) -> float:
    """By which the recipe's learning rate is multiplied: half, once the training has diverged."""
    return 0.5 if any(retry.why == "diverged" for retry in retries) else 1.0


class OutOfMemory(Exception):
    """Memory ran out, in which part of a step, and what the process held and asked for."""

    def __init__(self, error: BaseException, phase: Phase, step: int, *, cuda: bool) -> None:
        super().__init__(first_line(error))
        self.phase, self.step = phase, step
        found = re.search(r"(?:[Tt]ried|trying) to allocate ([\d.]+) ?([KMG]iB)?", str(error))
        self.requested_bytes = int(float(found[1]) * UNITS[found[2]]) if found else 0
        self.held_bytes, self.others_bytes = _held(cuda)


def _held(cuda: bool) -> tuple[int, int]:
    """Memory of the device that this process holds for tensors (off a GPU: in all), and that others hold with its own context."""
    import torch

    if not cuda:
        memory = psutil.virtual_memory()
        held = held_bytes()
        return held, max(0, memory.total - memory.available - held)
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    return held, total - free - held


def smaller(settings: Settings, recipe: Recipe, tokens_per_row: float, phase: Phase) -> Settings | None:
    """What surely needs less and costs least, at the same effective batch; None: there is nothing.

    Half the rows at once, or less where that divides the effective batch, costs nothing as long as a pass still has the tokens
    that keep a GPU busy; below, checkpointing costs a third. An evaluation keeps no activations: only fewer rows help. Of several
    processes none trains on more rows at once than its share of a step's, and each evaluates all.
    """
    batch = settings.per_device_train_batch_size
    effective = batch * settings.gradient_accumulation_steps
    if phase != "evaluation":
        batch = min(batch, -(-effective // ranks.world_size()))
    fewer = next((size for size in batch_sizes(effective) if size <= batch // 2), None)
    may = not settings.gradient_checkpointing and recipe.training.gradient_checkpointing is None and phase != "evaluation"
    if may and (not fewer or fewer * tokens_per_row < RIDGE_TOKENS):
        return replace(settings, gradient_checkpointing=True)
    return replace(settings, per_device_train_batch_size=fewer, gradient_accumulation_steps=effective // fewer) if fewer else None


def after_shortage(
    short: OutOfMemory, settings: Settings, recipe: Recipe, tokens_per_row: float, longest: int, from_step: int, device: str, rate: float
) -> Retry:
    """How it goes on. Raises DoesNotFitError where one row at a time is too much."""
    where = f"{'in the evaluation after' if short.phase == 'evaluation' else 'after'} step {short.step}"
    ran_out = f"memory ran out {where}, with {words(settings)}: the process held {bytes_text(short.held_bytes)}, " + (
        f"others {bytes_text(short.others_bytes)}"
    )
    less = smaller(settings, recipe, tokens_per_row, short.phase)
    if not less:
        changes = []
        if recipe.training.gradient_checkpointing is False:
            changes.append("--set training.gradient_checkpointing=true")
        if recipe.training.method != "qlora":
            changes.append("--set training.method=qlora")
        if longest > 128:
            changes.append(f"shorter rows: --set training.max_length={longest // 2}")
        raise DoesNotFitError(
            f"One row at a time does not fit: {ran_out}. {short}", f"{', or '.join(changes) or 'a smaller model'}; what fits: ftkit plan"
        )
    effective = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    goes_on = f"going on from step {from_step}" if from_step else "beginning again: nothing was saved yet,"
    return Retry(
        "out of memory",
        short.step,
        from_step,
        device,
        less.per_device_train_batch_size,
        less.gradient_accumulation_steps,
        less.gradient_checkpointing,
        rate,
        f"{ran_out}; {goes_on} with {words(less)}, the effective batch stays {effective}",
    )


def after_divergence(found: Diverged, retries: Sequence[Retry], settings: Settings, rate: float, from_step: int, device: str) -> Retry:
    """How it goes on: from before it, at half the rate. Raises TrainingDivergedError where it did so before, or no rate is at fault."""
    if found.step == 1:
        if found.broken:
            raise TrainingDivergedError(
                f"Training cannot begin: {found}, and {found.broken} of the model holds what is no number.",
                "no rate helps: fetch or copy the model again, whole",
            )
        raise TrainingDivergedError(
            f"Training cannot begin: {found}, before anything was learnt.",
            "no rate helps: look at the rows with ftkit data, and fetch or copy the model again, whole",
        )
    if before := next((retry for retry in retries if retry.why == "diverged"), None):
        raise TrainingDivergedError(
            f"Training diverged again at step {found.step}: {found}. At a rate of {rate:g} it did so at step {before.step}; this was "
            f"{rate / 2:g} from step {before.from_step} on.",
            f"--set training.learning_rate={rate / 10:g}",
        )
    goes_on = f"going on from step {from_step}" if from_step else "beginning again: nothing was saved before that,"
    return Retry(
        "diverged",
        found.step,
        from_step,
        device,
        settings.per_device_train_batch_size,
        settings.gradient_accumulation_steps,
        settings.gradient_checkpointing,
        rate / 2,
        f"training diverged at step {found.step}: {found}; {goes_on} at half the rate, {rate / 2:g}, once",
    )


def words(settings: Settings) -> str:
    on = ", with gradient checkpointing" if settings.gradient_checkpointing else ""
    return f"{settings.per_device_train_batch_size} × {settings.gradient_accumulation_steps} rows{on}"


def make_guard(factor: float) -> Any:
    """A callback that trains at so much of the recipe's rate, knows where in a step it is, and raises Diverged."""
    from transformers import TrainerCallback

    class Guard(TrainerCallback):  # type: ignore[misc]
        phase: Phase = "optimizer"  # until the first step begins there is nothing whole to save

        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any) -> None:
            _set_rate(optimizer, lr_scheduler, args.learning_rate * factor)
            self.detector = Detector()
            for entry in state.log_history:
                self.detector.see(entry)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.phase = "step"

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.phase = "optimizer"

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.phase = "evaluation"

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, model: Any = None, **_: Any) -> None:
            if found := self.detector.see({**(logs or {}), "step": state.global_step}):
                found.broken = next(filter(None, ranks.of_all(without_numbers(model))), None) if found.step == 1 else None
                raise found

    return Guard()


def without_numbers(model: Any) -> str | None:
    """A weight that is not trained and holds what is no number. What is trained holds none any more once it was moved by one."""
    frozen = ((name, p) for name, p in model.named_parameters() if not p.requires_grad and p.is_floating_point())
    return next((name for name, parameter in frozen if not parameter.isfinite().all()), None)


def _set_rate(optimizer: Any, schedule: Any, rate: float) -> None:
    """Have a schedule's highest rate be this, whatever a checkpoint's was."""
    now = schedule.state_dict()
    factor = rate / now["base_lrs"][0]
    if factor == 1:
        return
    schedule.load_state_dict({**now, **{name: [rate * factor for rate in now[name]] for name in ("base_lrs", "_last_lr")}})
    for group in optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor


def ran_out(error: BaseException, phase: Phase, step: int, *, cuda: bool) -> OutOfMemory | None:
    """What is known of it, where this error says that memory ran out."""
    return OutOfMemory(error, phase, step, cuda=cuda) if hf.out_of_memory(error, "train") else None

"""A trainer's checkpoints: sealed, found, mended where run or callbacks are others, dropped where they are damaged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftkit.errors import RunError
from ftkit.files import file_fingerprint, sync_files, write_atomically
from ftkit.progress import SILENT, Reporter

TRAINER_STATE = "trainer_state.json"  # of a checkpoint; the trainer writes it last
WATCHED = "watched.json"  # beside it, ftkit's own and written after it: what was seen of the training, size and SHA-256 of each file
FSDP_OPTIMIZER = "optimizer.bin"  # as accelerate calls it; the trainer's own is optimizer.pt
CONTROL, STOPPER = "TrainerControl", "EarlyStoppingCallback"  # what the trainer calls them in its state


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()), key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    return next(reversed(checkpoints(folder)), None)


def seal(checkpoint: Path, watched: Mapping[str, Any]) -> None:
    """Have a checkpoint on the disk, and only then say in WATCHED that it is whole, and what its files hold.

    The trainer's state is not among them, since `mend` may change it: damaged, it is no JSON any more.
    """
    sync_files(checkpoint)
    names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    files = {name: _content(checkpoint / name) for name in names if name not in (TRAINER_STATE, WATCHED)}
    write_atomically(checkpoint / WATCHED, (json.dumps({**watched, "files": files}, indent=1) + "\n").encode())


def _content(path: Path) -> dict[str, Any]:
    return {"size_bytes": path.stat().st_size, "sha256": file_fingerprint(path)}


def damage(checkpoint: Path, *, read: bool = True) -> str | None:
    """What is wrong with a checkpoint; None: it is whole. Without `read`, whether its files are there in their sizes is all.

    Of those that an ftkit wrote which sealed none, only that they were written to their end is known.
    """
    try:
        sealed = json.loads((checkpoint / WATCHED).read_text(encoding="utf-8"))
        state_of(checkpoint)
    except FileNotFoundError:
        return "was not written to its end"
    except (OSError, ValueError):
        return "is damaged: what it says of itself cannot be read"
    for name, content in sealed.get("files", {}).items():
        path = checkpoint / name
        try:
            if path.stat().st_size != content["size_bytes"] or (read and _content(path) != content):
                return f"is damaged: {name} is not what was written"
        except FileNotFoundError:
            return f"is damaged: {name} is missing"
        except OSError as error:
            return f"is damaged: {name} cannot be read: {error.strerror}"
    return None


def drop_broken_checkpoints(folder: Path, reporter: Reporter = SILENT, *, read: bool = False) -> None:
    """Remove checkpoints that a kill left half-written, or a failing disk or power damaged."""
    for checkpoint in checkpoints(folder):
        if fault := damage(checkpoint, read=read):
            say = reporter.warn if "damaged" in fault else reporter.note
            say(f"the checkpoint of step {step_of(checkpoint)} {fault}; it is removed")
            shutil.rmtree(checkpoint)


def drop_checkpoints_from(folder: Path, step: int) -> None:
    """Remove those of this step and later."""
    for checkpoint in checkpoints(folder):
        if step_of(checkpoint) >= step:
            shutil.rmtree(checkpoint)


def state_of(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    return state


def evaluated(state: Mapping[str, Any], metric: str) -> dict[int, float]:
    """A metric of the evaluations by step, in their order."""
    return {entry["step"]: entry[metric] for entry in state["log_history"] if metric in entry}


def refuse_world(checkpoint: Path, world_size: int = 1, *, fsdp: bool = False) -> None:
    """Raise RunError for a checkpoint that another number of processes wrote, each its own random state, or with other optimizer files."""
    if fsdp != (checkpoint / FSDP_OPTIMIZER).exists():
        raise RunError(
            f"{checkpoint} was written {'without' if fsdp else 'with'} FSDP, and training would go on {'with' if fsdp else 'without'} it.",
            f"--set training.fsdp={'false' if fsdp else 'true'}, or begin again: rm -r '{checkpoint.parent}'",
        )
    wrote = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if wrote != world_size:
        raise RunError(
            f"{checkpoint} was written by {wrote} processes, and {world_size} would go on from it.",
            f"start as many as before, or begin again: rm -r '{checkpoint.parent}'",
        )


def mend(checkpoint: Path, callbacks: Mapping[str, Any], reporter: Reporter, metric: str = "eval_loss") -> None:
    """Write into a checkpoint where the best of those that are here lies (least loss, or most of another metric), and its callbacks.

    The trainer notes the best one's path, which is another one once the run was moved; it would then forget the best weights and
    end with the last. And at its next checkpoint it asks for each callback's earlier state: KeyError where there was none.
    """
    state = state_of(checkpoint)
    here = [step_of(other) for other in checkpoints(checkpoint.parent)]
    values = evaluated(state, metric)
    sign = 1 if metric == "eval_loss" else -1
    best = min((step for step in here if math.isfinite(values.get(step, math.nan))), key=lambda step: sign * values[step], default=None)
    if best != state["best_global_step"]:
        reporter.warn(f"the best checkpoint so far, of step {state['best_global_step']}, is gone; kept is the best of the others")
    path = None if best is None else str(checkpoint.with_name(f"checkpoint-{best}"))
    mended: dict[str, Any] = {
        "best_global_step": best,
        "best_metric": None if best is None else values[best],
        "best_model_checkpoint": path,
    }
    control = {name: value for name, value in state["stateful_callbacks"].items() if name == CONTROL}
    mended["stateful_callbacks"] = {**callbacks, **control}
    if {**state, **mended} == state:
        return
    write_atomically(checkpoint / TRAINER_STATE, (json.dumps({**state, **mended}, indent=2, sort_keys=True) + "\n").encode())

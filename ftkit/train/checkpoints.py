"""A trainer's checkpoints: found, mended where the run was moved, dropped where they are broken."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from ftkit.files import write_atomically
from ftkit.progress import Reporter

TRAINER_STATE = "trainer_state.json"  # of a checkpoint; the trainer writes it last


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()), key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    return next(reversed(checkpoints(folder)), None)


def drop_broken_checkpoints(folder: Path) -> None:
    """Remove checkpoints that a kill left half-written: the trainer writes trainer_state.json last."""
    for checkpoint in checkpoints(folder):
        try:
            state_of(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)


def state_of(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    return state


def mend_best(checkpoint: Path, reporter: Reporter, metric: str = "eval_loss") -> None:
    """Write into a checkpoint where the best of those that are here lies: by the least loss, or the most of another metric.

    The trainer notes its path, which is another one once the run was moved; it would then forget the best weights and end
    with the last.
    """
    state = state_of(checkpoint)
    here = [step_of(other) for other in checkpoints(checkpoint.parent)]
    values = {entry["step"]: entry[metric] for entry in state["log_history"] if metric in entry}
    sign = 1 if metric == "eval_loss" else -1
    best = min((step for step in here if math.isfinite(values.get(step, math.nan))), key=lambda step: sign * values[step], default=None)
    if best != state["best_global_step"]:
        reporter.warn(f"the best checkpoint so far, of step {state['best_global_step']}, is gone; kept is the best of the others")
    path = None if best is None else str(checkpoint.with_name(f"checkpoint-{best}"))
    mended = {"best_global_step": best, "best_metric": values.get(best), "best_model_checkpoint": path}
    if mended.items() <= state.items():
        return
    write_atomically(checkpoint / TRAINER_STATE, (json.dumps({**state, **mended}, indent=2, sort_keys=True) + "\n").encode())

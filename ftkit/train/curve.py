"""The loss curves, and what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Point:
    """One line of the curves; training points have a loss, validation points a validation loss."""

    step: int
    epoch: float
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None

    @property
    def evaluated(self) -> bool:
        """Whether it is a validation point. Its loss is None where it was no number."""
        return self.learning_rate is None


def read_curve(curve: Sequence[Point]) -> str:
    """What the validation losses say, in words."""
    evaluated = [point for point in curve if point.evaluated]
    losses = [point.validation_loss for point in evaluated if point.validation_loss is not None]
    if len(losses) < len(evaluated):
        first = next(point for point in evaluated if point.validation_loss is None)
        return f"training diverged: at step {first.step} the validation loss is no number any more; try a lower learning rate"
    if len(losses) < 2:
        return "one evaluation only: too few to read a curve"
    best = losses.index(min(losses))
    if losses[-1] > losses[best] * 1.02:
        return f"validation loss rose after evaluation {best + 1} of {len(losses)}: overfitting; the best checkpoint is kept"
    if losses[best] > losses[0] * 0.98:
        return "validation loss hardly moved: check the data, or try a higher learning rate"
    if losses[-1] < losses[-2] * 0.98:
        return "validation loss was still falling: more epochs may help"
    return "validation loss has levelled off: trained enough"


def point(entry: dict[str, Any]) -> Point:
    point = Point(step=entry["step"], epoch=round(entry["epoch"], 4))
    if "eval_loss" in entry:
        return replace(point, validation_loss=finite(entry["eval_loss"]))
    return replace(
        point, loss=finite(entry["loss"]), learning_rate=finite(entry["learning_rate"]), gradient_norm=finite(entry["grad_norm"])
    )


def finite(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(float(value)) else None

"""The curves: their points, what is measured beside the loss, and the trend beneath the zigzag of the batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftkit.train.answers import ASKED, RIGHT

SMOOTHED_OVER = 12  # a training loss is smoothed over about this part of the curve's steps


@dataclass(frozen=True)
class Point:
    """One line of the curves; training points have a loss, validation points a validation loss."""

    step: int
    epoch: float
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    right_percent: float | None = None  # of the validation answers that were asked for at this evaluation
    reward_accuracy: float | None = None  # of preferences: the share whose chosen answer gained more on the reference than the other
    reward_margin: float | None = None  # and by how much on average, times beta
    reward_chosen: float | None = None  # what the chosen answers gained themselves, times beta: below 0 they became less likely

    @property
    def evaluated(self) -> bool:
        """Whether it is a validation point. Its loss is None where it was no number."""
        return self.learning_rate is None


@dataclass(frozen=True)
class Measure:
    """What evaluations find beside the loss: a field of `Point`."""

    key: str
    name: str
    percents: float | None  # that one of it is; None: it is no share

    def of(self, point: Point) -> float | None:
        """As it is shown: in percent where it is a share."""
        value: float | None = getattr(point, self.key)
        return None if value is None else value * (self.percents or 1)

    def points(self, curve: Sequence[Point]) -> list[tuple[float, float]]:
        return [(point.step, value) for point in curve if point.evaluated and (value := self.of(point)) is not None]

    def text(self, value: float | None) -> str:
        """Of what is shown."""
        return "–" if value is None else f"{value:.0f} %" if self.percents else f"{value:.3f}"


MEASURES = (
    Measure("right_percent", "right answers", 1),
    Measure("reward_accuracy", "preferred", 100),
    Measure("reward_margin", "margin", None),
)


def best_point(curve: Sequence[Point], metric: str) -> Point | None:
    """The evaluation that training follows: the first of the most right answers, or of the least loss."""
    if metric == "right":
        return max((p for p in curve if p.right_percent is not None), key=lambda p: p.right_percent or 0.0, default=None)
    return min((p for p in curve if p.validation_loss is not None), key=lambda p: p.validation_loss or 0.0, default=None)


def point(entry: dict[str, Any]) -> Point:
    point = Point(step=entry["step"], epoch=round(entry["epoch"], 4))
    before = "eval_" if "eval_loss" in entry else ""
    if f"{before}rewards/margins" in entry:
        accuracy, margin, chosen = (finite(entry[f"{before}rewards/{name}"]) for name in ("accuracies", "margins", "chosen"))
        point = replace(point, reward_accuracy=accuracy, reward_margin=margin, reward_chosen=chosen)
    if "eval_loss" in entry:
        right = 100 * entry[RIGHT] / entry[ASKED] if RIGHT in entry else None
        return replace(point, validation_loss=finite(entry["eval_loss"]), right_percent=right)
    return replace(
        point, loss=finite(entry["loss"]), learning_rate=finite(entry["learning_rate"]), gradient_norm=finite(entry["grad_norm"])
    )


def points(log: Sequence[dict[str, Any]]) -> list[Point]:
    """The curves in a trainer's log."""
    return [point(entry) for entry in log if "loss" in entry or "eval_loss" in entry]


def finite(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(float(value)) else None


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points, each the mean of as many; the first and the last stay where they are."""
    taken = -(-len(points) // most) or 1
    if taken == 1:
        return list(points)
    groups = [points[begin : begin + taken] for begin in range(0, len(points), taken)]
    return [points[0], *((sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups), points[-1]]


def smoothed(values: Sequence[float], over: float | None = None) -> list[float]:
    """The trend of a curve: at each value the straight line that fits those around it best, near ones counted most.

    `over`: how many values to each side count, about; without it a part of them all. A straight line, because a mean would bend
    the beginning, where a loss falls fastest, and the end, which is read.
    """
    import numpy as np

    found = np.asarray(values, dtype=float)
    over = over or max(2.0, len(found) / SMOOTHED_OVER)
    if len(found) < 3:
        return [float(value) for value in found]
    reach = math.ceil(2 * over)
    away = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (away / over) ** 2)
    here, size = np.ones(len(found)), len(found) + 2 * reach
    s0, s1, s2, t0, t1 = (
        np.fft.irfft(np.fft.rfft(of, size) * np.fft.rfft(weights * away**power, size), size)[reach : reach + len(found)]
        for of, power in ((here, 0), (here, 1), (here, 2), (found, 0), (found, 1))
    )  # a convolution, which turns `away` round: both first powers change their sign, and the product stays
    return [float(value) for value in (s2 * t0 - s1 * t1) / (s0 * s2 - s1**2)]

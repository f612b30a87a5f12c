"""Whether a training has diverged, told from its losses while it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

STAYS = 20  # steps without a break that are no longer noise
FIRST = 10  # steps that tell where training began, and whose median is where it is
LOWER = 0.8  # of where it began, at most: it had learnt something
BLOWN = 2.0  # times the loss of a model that has not learnt yet: worse than untrained


class Diverged(Exception):
    """Seen first at `step`; the weights after `bad_from`, and all later ones, are not to be gone on from."""

    def __init__(self, step: int, bad_from: int, words: str) -> None:
        super().__init__(words)
        self.step, self.bad_from = step, bad_from
        self.broken: str | None = None  # a weight of the base model that is no number, where that was looked for


class Detector:
    """Sees each entry of the trainer's history in turn, and says when it has diverged.

    - A training loss that is no number twice in a row: once can be a step that a loss scaler leaves out, of which the weights know
      nothing.
    - STAYS gradient norms in a row that are none; or a validation loss.
    - A spike that stays: STAYS losses in a row above each of the first FIRST, after their median was clearly lower.
    - Blown up: STAYS in a row above BLOWN times the first two losses. These are an untrained model's where the rate warms up, as it
      does by itself from 34 steps on; without, this is not seen.

    What comes back, and what is only noisy, is none of these: each loss of the STAYS has to be above, and the noisier the first
    ones are, the higher.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, float]] = []  # by step
        self._lowest = math.inf  # median of FIRST in a row
        self._runs: dict[str, list[int]] = {"loss": [], "norm": [], "above": [], "blown": []}  # steps in a row, so far

    def see(self, entry: Mapping[str, Any]) -> Diverged | None:
        """What it returns is for the caller to raise."""
        step = int(entry["step"])  # whose loss is of the weights after the one before, a validation loss of its own
        if "eval_loss" in entry and not math.isfinite(entry["eval_loss"]):
            return Diverged(step, min([step, *(bad - 1 for bad in self._runs["loss"])]), "the validation loss is no number")
        if "loss" not in entry:
            return None
        loss = float(entry["loss"])
        if len(bad := self._run("loss", step, not math.isfinite(loss))) == 2:
            return Diverged(bad[0], bad[0] - 1, "the training loss is no number")
        if len(bad := self._run("norm", step, not math.isfinite(entry.get("grad_norm", 0.0)))) == STAYS:
            return Diverged(bad[0], bad[0] - 1, f"the gradient's norm was no number for {STAYS} steps")
        if not math.isfinite(loss):
            return None
        self._losses.append((step, loss))
        first = [loss for _, loss in self._losses[:FIRST]]
        began, highest, untrained = median(first), max(first), max(first[:2])
        if len(first) == FIRST:
            self._lowest = min(self._lowest, self._median(len(self._losses)))
        if len(bad := self._run("blown", step, loss > BLOWN * untrained)) == STAYS:
            words = f"{self._now()}, and {first[0]:.4g} before anything was learnt"
            return Diverged(bad[0], self._since(BLOWN * untrained), words)
        if len(bad := self._run("above", step, loss > highest and self._lowest <= LOWER * began)) == STAYS:
            return Diverged(bad[0], self._since(highest), f"{self._now()}, after it had come down from {began:.4g} to {self._lowest:.4g}")
        return None

    def _now(self) -> str:
        return f"the loss was {fmean(loss for _, loss in self._losses[-STAYS:]):.4g} over the last {STAYS} steps"

    def _run(self, name: str, step: int, bad: bool) -> list[int]:
        self._runs[name] = [*self._runs[name], step] if bad else []
        return self._runs[name]

    def _median(self, end: int) -> float:
        return median(loss for _, loss in self._losses[max(0, end - FIRST) : end])

    def _since(self, level: float) -> int:
        """A step before which the losses were mostly below the level: noise may have broken what has now lasted for STAYS."""
        end = len(self._losses) - STAYS
        while end > 0 and self._median(end) > level:
            end -= 1
        return self._losses[max(0, end - FIRST // 2)][0]

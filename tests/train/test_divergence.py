"""Divergence is seen on made series of losses, and noise is not taken for it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest

from ftkit.train.divergence import FIRST, STAYS, Detector, Diverged


def seen(losses: Sequence[float], norms: Sequence[float] = ()) -> tuple[int, Diverged] | None:
    """The step at which it is seen, and what is said."""
    detector = Detector()
    for step, loss in enumerate(losses, 1):
        entry = {"step": step, "loss": loss, "grad_norm": norms[step - 1] if norms else 1.0}
        if found := detector.see(entry):
            return step, found
    return None


def noisy(trend: Callable[[int], float], steps: int, noise: float, seed: int) -> list[float]:
    draw = random.Random(seed)  # noqa: S311
    return [trend(step) * math.exp(draw.gauss(0, noise)) for step in range(steps)]


def falling(step: int) -> float:
    return 0.6 + 2 * math.exp(-step / 60)


@pytest.mark.parametrize("noise", [0.05, 0.3, 0.8])  # the last as of one row a step
@pytest.mark.parametrize(
    "trend",
    [
        falling,
        lambda step: 2.0,  # learns nothing
        lambda step: falling(step) + (3 if 200 <= step < 210 else 0),  # a spike that comes back
        lambda step: falling(step) * (1.4 if step // 100 % 2 else 1),  # epochs of harder and easier rows
        lambda step: 2.0 + 0.001 * step,  # rises slowly: not for this to judge
    ],
    ids=["falls", "flat", "spike", "epochs", "rises"],
)
def test_noise_is_no_divergence(trend: Callable[[int], float], noise: float) -> None:
    for seed in range(30):
        assert seen(noisy(trend, 300, noise, seed)) is None, seed


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_a_spike_that_stays(noise: float) -> None:
    for seed in range(10):
        found = seen(noisy(lambda step: 7.0 if step >= 200 else falling(step), 400, noise, seed))
        assert found
        step, diverged = found
        assert diverged.bad_from in range(200 - FIRST, 202)  # counted from one, the first bad loss is of step 201
        assert step in range(200 + STAYS, 200 + 5 * STAYS)
        assert "after it had come down from" in str(diverged) or "before anything was learnt" in str(diverged)


def test_worse_than_untrained_from_the_beginning_on() -> None:
    found = seen([2.5, 2.5, *noisy(lambda step: 7.5, 100, 0.1, 1)])
    assert found
    assert (found[0], found[1].step, found[1].bad_from) == (2 + STAYS, 3, 1)
    assert "2.5 before anything was learnt" in str(found[1])


def test_what_is_no_number() -> None:
    found = seen([2.0, 1.9, math.nan, math.nan])
    assert found
    assert (found[0], found[1].step, found[1].bad_from) == (4, 3, 2)
    assert seen([2.0, math.inf, 1.9, math.nan, 1.8] * FIRST) is None  # steps that a loss scaler left out
    found = seen([2.0] * 100, [1.0] * 50 + [math.inf] * 50)
    assert found
    assert (found[0], found[1].step, found[1].bad_from) == (50 + STAYS, 51, 50)
    assert seen([2.0] * 100, ([math.inf] * 15 + [1.0]) * 7) is None  # a scaler that looks for its scale


def test_a_validation_loss_that_is_no_number() -> None:
    detector = Detector()
    assert detector.see({"step": 4, "loss": 1.0}) is None
    assert detector.see({"step": 4, "eval_loss": 2.0}) is None
    assert detector.see({"step": 5, "loss": math.nan}) is None
    found = detector.see({"step": 5, "eval_loss": math.nan})
    assert found
    assert (found.step, found.bad_from) == (5, 4)
    found = Detector().see({"step": 5, "eval_loss": math.nan})
    assert found
    assert (found.step, found.bad_from) == (5, 5)


def test_what_else_is_logged_is_let_be() -> None:
    assert Detector().see({"step": 1, "train_runtime": 1.0}) is None

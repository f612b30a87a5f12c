"""Made loss curves of each kind, with noise: as many steps and evaluations as small and long trainings have."""

from __future__ import annotations

import math

import numpy as np

from ftkit.train.curve import Point

KINDS = ("learning", "levelled off", "over-fitting", "not learning", "noise", "rate", "spike", "flat")


def made(kind: str, seed: int) -> list[Point]:
    """A curve of this kind. `noise` and `rate` are the two causes of oscillating; `flat` is any curve in which nothing happens."""
    draw = np.random.default_rng([KINDS.index(kind), seed])
    evaluations = int(draw.integers(5 if kind == "rate" else 3, 25))
    steps = evaluations * int(draw.integers(8 if kind in ("noise", "spike") else 4, 40))
    if kind in ("noise", "spike"):
        steps = max(steps, 60)
    every = steps // evaluations
    t = np.arange(1, steps + 1) / steps
    floor, above = draw.uniform(0.2, 2.0), draw.uniform(0.5, 3.0)
    white = draw.normal(size=steps)
    zigzag = draw.uniform(0.02, 0.12)  # of a step, as a share of the loss
    settle = np.exp(-t * draw.uniform(8, 20))
    validation = training = floor + above * settle
    norms = 0.3 + 2 * settle
    jitter = draw.uniform(0.0005, 0.003)  # of an evaluation, as a share of the loss
    if kind == "learning":
        validation = training = floor + above * np.exp(-t * draw.uniform(0.7, 2.0))
    elif kind == "over-fitting":
        turn = draw.uniform(0.2, 0.6)
        training = floor * np.exp(-3 * t) + above * settle
        validation = floor + above * settle + floor * draw.uniform(0.3, 2.0) * np.maximum(0, t - turn) ** 1.3
    elif kind == "not learning":
        validation = training = (floor + above) * (1 - 0.004 * t)
        norms = np.ones(steps)
        zigzag = draw.uniform(0.02, 0.25)
    elif kind == "noise":
        zigzag = draw.uniform(0.18, 0.4)
        norms = draw.uniform(0.8, 1.5) + 0.5 * settle
    elif kind == "rate":
        swing = np.zeros(steps)
        for n in range(1, steps):
            swing[n] = 0.8 * swing[n - 1] + 0.6 * white[n]
        training = (floor + above * np.exp(-3 * t)) * np.exp(0.25 * swing)
        validation = (floor + above * np.exp(-3 * t)) * np.exp(draw.uniform(0.08, 0.3) * draw.normal(size=steps))
        norms = 1 + 5 * t
    elif kind == "spike":
        at = draw.uniform(0.2, 0.75)
        lost = np.where(t > at, draw.uniform(0.8, 2.0), 0.0) * (floor + above)
        validation, training = validation + lost, training + lost
    elif kind == "flat":
        zigzag, jitter = draw.uniform(0.02, 0.5), draw.uniform(0.0005, 0.01)
        if draw.random() < 0.5:
            validation = training = np.full(steps, floor)
            norms = np.ones(steps)
    losses = training * np.exp(zigzag * white)
    norms = norms * np.exp(0.2 * draw.normal(size=steps))
    curve = []
    for n in range(steps):
        step, epoch = n + 1, (n + 1) / every
        curve.append(Point(step, epoch, loss=losses[n], learning_rate=1e-4 * math.cos(1.5 * n / steps), gradient_norm=norms[n]))
        if step % every == 0:
            curve.append(Point(step, epoch, validation_loss=validation[n] * math.exp(jitter * draw.normal())))
    return curve

"""Every card that is known: whether the training fits, how it would run, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftkit.machine.cards import cards
from ftkit.machine.device import Device, choose
from ftkit.memory.kernels import traced_alike
from ftkit.plan.choose import Planner
from ftkit.plan.plan import Candidate
from ftkit.plan.speed import Estimate
from ftkit.recipe import Dtype, Recipe


@dataclass(frozen=True)
class CardFit:
    """The choice for one card; `estimate` None where it does not fit, or the card's speed is not known."""

    name: str
    compute_dtype: str
    fit: Candidate
    estimate: Estimate | None


def every_card(
    config: Any,
    recipe: Recipe,
    length: int,
    lengths: Sequence[int] = (),
    *,
    dtype_of: Callable[[Device], Dtype | None],
    labelled_share: float = 1.0,
) -> list[CardFit]:
    """One choice a card: those that fit first, by their memory, then by time. Cards that differ in memory alone share their traces.

    `dtype_of`: what is computed in on a card; None: it cannot what the recipe asks for, and is left out.
    """
    planners: dict[Any, Planner] = {}
    found = []
    for name in cards():
        device = choose(gpu=name)
        if not (dtype := dtype_of(device)):
            continue
        alike = (dtype, *traced_alike(device.capability))
        if alike not in planners:
            planners[alike] = Planner(config, recipe, device, length, lengths, dtype=dtype, labelled_share=labelled_share)
        planner = planners[alike].on(device)
        fit, _ = planner.choose(recipe)
        found.append(CardFit(name, planner.dtype, fit, planner.estimate(recipe, fit) if fit.fits else None))
    return sorted(found, key=_order)


def _order(entry: CardFit) -> tuple[bool, int, float, str]:
    seconds = entry.estimate.seconds_low if entry.estimate else float("inf")
    return not entry.fit.fits, entry.fit.budget_bytes, seconds, entry.name


def smallest(found: Sequence[CardFit]) -> CardFit | None:
    """The card with the least memory that fits."""
    return next((entry for entry in found if entry.fit.fits), None)


def fastest(found: Sequence[CardFit]) -> CardFit | None:
    """The one that fits and takes least time, of those whose speed is known."""
    timed = [(entry.estimate.seconds_low, number) for number, entry in enumerate(found) if entry.fit.fits and entry.estimate]
    return found[min(timed)[1]] if timed else None

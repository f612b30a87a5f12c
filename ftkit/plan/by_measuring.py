"""Where a step cannot be traced: batch × accumulation by real steps at growing sizes, measured on the device itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ftkit.errors import DoesNotFitError
from ftkit.memory.kernels import CONTEXT_BYTES
from ftkit.memory.replay import Part, Peak, Timeline
from ftkit.plan.plan import Candidate

if TYPE_CHECKING:
    from ftkit.plan.choose import Planner

PHASE, PART = "two real steps, measured", "all that the steps held"
Measure = Callable[[int, bool], tuple[int, int | None] | None]
"""(batch, checkpointing) → bytes allocated and, on a GPU, reserved by real steps; None where memory ran out."""


def choose_by_measuring(planner: Planner, measure: Measure) -> tuple[Candidate, list[tuple[int, bool, int, bool]]]:
    """The fastest measured choice that fits, and all that were looked at. Raises DoesNotFitError where not even the smallest does.

    With checkpointing first, one row, then two; after that the largest batch that a line through the last two points leaves room
    for. A step's memory is a maximum of lines in the batch, so that such a line is never too high: what it promises is measured too.
    What would not be faster than the best so far is not measured.
    """
    recipe = planner.recipe
    fitting: list[Candidate] = []
    seen: list[tuple[int, bool, int, bool]] = []
    by_checkpointing: dict[bool, list[int]] = {}
    for batch, checkpointing in planner.choices(recipe):
        by_checkpointing.setdefault(checkpointing, []).append(batch)
    for checkpointing, batches in sorted(by_checkpointing.items(), reverse=True):
        waiting, points = sorted(batches), list[tuple[int, int]]()
        while waiting:
            least = min((_work(planner, fit) for fit in fitting), default=math.inf)
            promised = [
                batch for batch in waiting if _line(points, batch) <= planner.limit_bytes and planner.work(batch, checkpointing) < least
            ]
            if not promised:
                break
            batch = promised[0] if len(points) < 2 else promised[-1]
            measured = measure(batch, checkpointing)
            peak = _peak(planner, *measured) if measured else None
            fits = peak is not None and peak.device_bytes <= planner.limit_bytes
            if peak:
                seen.append((batch, checkpointing, peak.device_bytes, fits))
            if peak and fits:
                points.append((batch, peak.device_bytes))
                fitting.append(planner.candidate(recipe, batch, checkpointing, peak))
            waiting = [other for other in waiting if (other > batch if fits else other < batch and other > max([0, *dict(points)]))]
            if not points:
                break
    if not fitting:
        raise DoesNotFitError(
            f"Not even one row of {planner.length} tokens fits on {planner.device.name}, by real steps.",
            "shorter rows: --set training.max_length; or a smaller model",
        )
    return min(fitting, key=lambda fit: _work(planner, fit)), seen


def _work(planner: Planner, fit: Candidate) -> float:
    return planner.work(fit.per_device_train_batch_size, fit.gradient_checkpointing)


def _line(points: list[tuple[int, int]], batch: int) -> float:
    """Bytes at a batch, on the line through the last two points; nothing is known of fewer."""
    if len(points) < 2:
        return 0
    (first, low), (second, high) = points[-2:]
    return high + (high - low) / (second - first) * (batch - second)


def _peak(planner: Planner, allocated_bytes: int, reserved_bytes: int | None) -> Peak:
    held = allocated_bytes if reserved_bytes is None else reserved_bytes
    device_bytes = held + planner.process_bytes + (CONTEXT_BYTES if reserved_bytes is not None else 0)
    return Peak(allocated_bytes, held, device_bytes, PHASE, (Part(PART, allocated_bytes),))


def timeline_of(fit: Candidate) -> Timeline:
    """Its peak alone: what a step holds before and after it is not known."""
    return Timeline({PART: (fit.peak.allocated_bytes,) * 2}, ((PHASE, 0),))

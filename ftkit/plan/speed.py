"""How long training takes on a card before it has run there: an estimate, as a range."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ftkit.machine.cards import Speed
from ftkit.memory.model import Inventory
from ftkit.memory.work import Work

# Of what a card's peak and memory bandwidth allow, kernel after kernel, the share that trainings reach: 0.54 to 0.76 those that the
# range was made from (benchmarks/speed.py), rounded down; at most all of it.
REACHED = (0.5, 1.0)
# What Python and PyTorch take to start a kernel: 22 µs in trainings that wait for them (there), a processor a third faster or slower.
SECONDS_A_KERNEL = (15e-6, 30e-6)
UNTOLD_TOKENS = 1_000_000  # without a dataset, the tokens that a time is told for


@dataclass(frozen=True)
class Estimate:
    """What training on so many tokens takes, padding included. Left out: loading, evaluation, checkpoints."""

    tokens: int
    seconds_low: float
    seconds_high: float


def of_training(
    card: Speed, work: Work, step_tokens: int, micro_batches: Iterable[int], repeats: float, steps: float, counted: Inventory, tokens: int
) -> Estimate:
    """Of `repeats` passes through micro-batches of so many tokens, and `steps` optimizer steps.

    `work` is a micro-batch's of `step_tokens` tokens. What follows from rows is taken in proportion to their tokens: attention's share,
    which grows with their square, is a little too high for shorter ones.
    """
    shares = [part / step_tokens for part in micro_batches]
    low, high = (
        repeats * sum(max(_seconds(card, work, share) / reached, a_kernel * work.kernels) for share in shares)
        + steps * _optimizer_seconds(card, counted) / reached
        for reached, a_kernel in zip(reversed(REACHED), SECONDS_A_KERNEL, strict=True)
    )
    return Estimate(tokens, low, high)


def _seconds(card: Speed, work: Work, share: float) -> float:
    """Of one micro-batch that has this share of the rows, at all that the card can: first computed, then moved."""
    half = card.tensor_tflops or card.float32_tflops  # without tensor cores, 16-bit products are summed as 32-bit ones
    computing = share * (work.half_operations / half + work.single_operations / card.float32_tflops) / 1e12
    return computing + (share * work.row_bytes + work.weight_bytes) / card.gb_per_second / 1e9


def _optimizer_seconds(card: Speed, counted: Inventory) -> float:
    """What is trained, its gradients and the optimizer's states, each read and written."""
    held = counted.adapter_bytes if counted.method != "full" else counted.weights_bytes
    return 2 * (held + counted.gradient_bytes + counted.optimizer_bytes) / card.gb_per_second / 1e9

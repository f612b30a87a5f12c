"""Rounding to 16 bits by chance, as often up as the number is near to there: what is smaller than a step is kept in the mean."""

from __future__ import annotations

import zlib
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DROPPED_BITS = {"bfloat16": 16, "float16": 13}  # of a float32
NOISE = 1 << 17  # numbers: they stay in a processor's cache beside those that are rounded


def round_by_chance(numbers: torch.Tensor, dtype: torch.dtype, place: str) -> None:
    """Round float32 numbers, in place, to ones of `dtype`; what it holds as they are, and all of float32, stays.

    The weights of a base in 16 bits lie on that format's steps. To the nearest, each change of less than half a step would be lost, not
    more here and less there: of two steps of LoRA on SmolLM2-135M, a thousandth of the weights' size, 71 % of the numbers and a tenth of
    what was gained (KL from the trained model 0.16 a token; by chance 0.0002). Of a hundredth nothing is lost either way.
    `place` names them: the same numbers at the same place are rounded alike each time. All must be finite. In float16 what is below
    2^-14 is left to be rounded to the nearest.
    """
    import torch

    bits = _dropped_bits(dtype)
    if not bits:
        return
    whole = numbers.contiguous()  # a copy, where they do not lie side by side
    noise, flat = _noise(bits, numbers.device), whole.view(torch.int32).view(-1)
    for begin in range(0, len(flat), NOISE):
        some, first = flat[begin : begin + NOISE], zlib.crc32(f"{place} {begin}".encode()) % NOISE
        before = min(len(some), NOISE - first)
        some[:before].add_(noise[first : first + before])
        some[before:].add_(noise[: len(some) - before])
    flat.bitwise_and_(-1 << bits)
    if whole is not numbers:
        numbers.copy_(whole)


def is_rounding(rounded: torch.Tensor, numbers: torch.Tensor) -> bool:
    """Whether each number of a 16-bit tensor is that of one in float32, or where it has none like it, a neighbour on either side."""
    import torch

    bits = _dropped_bits(rounded.dtype)
    if not bits or rounded.dtype == numbers.dtype or rounded.shape != numbers.shape:
        return torch.equal(rounded, numbers)
    here, there = rounded.flatten(), numbers.flatten()
    for begin in range(0, len(here), NOISE):
        steps, left = _apart(here[begin : begin + NOISE], there[begin : begin + NOISE], bits)
        if not ((steps == 0) | ((steps == 1) & (left > 0))).all():
            return False
    return True


def _apart(rounded: torch.Tensor, numbers: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many steps further from nothing than the number's next one below, and what lies between that and the number."""
    import torch

    exact = numbers.float().view(torch.int32)
    below = exact & (-1 << bits)
    return (rounded.float().view(torch.int32) - below) >> bits, exact - below


def _dropped_bits(dtype: torch.dtype) -> int | None:
    return DROPPED_BITS.get(str(dtype).rpartition(".")[2])


@cache
def _noise(bits: int, device: torch.device) -> torch.Tensor:
    """From nothing to one less than a step, in no order, each as often."""
    import torch

    order = torch.randperm(NOISE, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    return order.bitwise_and_((1 << bits) - 1).to(device)

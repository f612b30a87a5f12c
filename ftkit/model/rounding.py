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
    `place` names them: the same numbers at the same place are rounded alike each time. All must be finite.
    """
    import torch

    bits = DROPPED_BITS.get(str(dtype).rpartition(".")[2])
    if not bits:
        return
    whole = numbers.contiguous()  # a copy, where they do not lie side by side
    flat, noise, done = whole.view(torch.int32).view(-1), _noise(bits, numbers.device), 0
    first = zlib.crc32(place.encode()) % NOISE
    while done < len(flat):
        taken = min(len(flat) - done, NOISE - first)
        flat[done : done + taken].add_(noise[first : first + taken])
        done, first = done + taken, 0
    flat.bitwise_and_(-1 << bits)
    if whole is not numbers:
        numbers.copy_(whole)


@cache
def _noise(bits: int, device: torch.device) -> torch.Tensor:
    """From nothing to one less than a step, each as likely."""
    import torch

    return torch.randint(0, 1 << bits, (NOISE,), dtype=torch.int32, generator=torch.Generator().manual_seed(0)).to(device)


def is_rounding(rounded: torch.Tensor, numbers: torch.Tensor) -> bool:
    """Whether each number of a 16-bit tensor is a neighbour, on either side, of one in float32, or that one."""
    import torch

    if rounded.dtype == numbers.dtype or rounded.shape != numbers.shape:
        return torch.equal(rounded, numbers)
    bits = DROPPED_BITS[str(rounded.dtype).rpartition(".")[2]]
    below = numbers.float().view(torch.int32) & (-1 << bits)  # towards nothing
    steps = (rounded.float().view(torch.int32) - below) >> bits
    return bool(((steps == 0) | (steps == 1)).all())

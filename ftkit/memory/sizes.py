"""Bytes of each tensor that a weight is kept in, as torch and bitsandbytes store it."""

from __future__ import annotations

import math

NF4_BLOCK = 64  # elements that share one absmax
ABSMAX_BLOCK = 256  # absmax values that share one second-level absmax, with double quantisation
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def nf4_storages(elements: int, double_quant: bool = True) -> list[int]:
    """Bytes of each tensor that one NF4 weight is made of, as bitsandbytes 0.50 stores it.

    Half a byte an element and a code book of 16 float32 values; with double quantisation an 8-bit absmax a block of 64, a
    float32 absmax a block of 256 of those, their code book of 256 float32 values and a float32 offset; without it a
    float32 absmax a block of 64.
    """
    blocks = math.ceil(elements / NF4_BLOCK)
    packed = math.ceil(elements / 2)
    if not double_quant:
        return [packed, 4 * blocks, 4 * 16]
    return [packed, blocks, 4 * 16, 4, 4 * math.ceil(blocks / ABSMAX_BLOCK), 4 * 256]

"""Bytes of each tensor that a training run keeps, as torch and bitsandbytes store it."""

from __future__ import annotations

import math

NF4_BLOCK = 64  # elements that share one absmax
ABSMAX_BLOCK = 256  # absmax values that share one second-level absmax, with double quantisation
BITSANDBYTES_MIN_8BIT = 4096  # smaller tensors keep 32-bit states
OPTIMIZER_BLOCK = 256  # 8-bit states: one float32 absmax a block and moment
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


def optimizer_state_bytes(elements: int, optim: str, trained_bytes: int = 4, *, wide: bool = False) -> int:
    """Bytes of what an optimizer keeps for one trained tensor (its step counter, on the CPU, left out)."""
    return sum(state_storages(elements, optim, trained_bytes, wide=wide))


def state_storages(elements: int, optim: str, trained_bytes: int = 4, *, wide: bool = False) -> list[int]:
    """Bytes of each tensor that an optimizer keeps for one trained tensor: its moments, AdamW's two, Lion's one, then their scales.

    torch keeps them in the tensor's own dtype; bitsandbytes in float32, or in 8 bits with a float32 absmax a block of 256, which
    small tensors and input embeddings are spared.
    """
    moments = 1 if optim.startswith("lion") else 2
    if optim == "adamw_torch":
        return [trained_bytes * elements] * moments
    if not optim.endswith("8bit") or wide or elements < BITSANDBYTES_MIN_8BIT:
        return [4 * elements] * moments
    return [elements] * moments + [4 * math.ceil(elements / OPTIMIZER_BLOCK)] * moments

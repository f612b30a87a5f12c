"""Which number format a device computes in."""

from __future__ import annotations

import time

from ftkit.machine.device import Device, processor_kind
from ftkit.plan import measured
from ftkit.recipe import Dtype

PRODUCT = (256, 1024, 1024)  # tokens, and a layer's numbers in and out, of what is timed
ROUNDS = 5


def best_dtype(device: Device) -> Dtype:
    """What a training computes in on this device: bfloat16 where that pays, else float16 on a card, and float32 on a CPU."""
    if computes_bfloat16(device):
        return "bfloat16"
    return "float16" if device.kind == "cuda" else "float32"


def computes_bfloat16(device: Device) -> bool:
    """Whether bfloat16 is computed in: by CUDA from capability 8.0 on, and by a CPU whose matrix products are faster in it.

    That a CPU has instructions for it does not say so. Measured against float32, one thread, torch 2.13: an EPYC with AVX512-BF16 2.1
    times as fast, a Xeon with the same 0.6 times, without such instructions 0.1 times. So it is timed once, and kept: a training
    goes on in the format that it began in.
    """
    if device.kind == "cuda":
        return device.capability >= (8, 0)
    processor = processor_kind()
    if (speed := measured.bfloat16_speed(device, processor)) is None:
        measured.remember_bfloat16_speed(device, processor, speed := _bfloat16_speed())
    return speed > 1


def _bfloat16_speed() -> float:
    """Times as fast as float32: a layer's products, forward and back; the best of some rounds of each, in turns."""
    import torch

    tokens, size, outputs = PRODUCT
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(ROUNDS):
        for dtype in best:
            inputs, weight, gradient = (torch.ones(shape, dtype=dtype) for shape in ((tokens, size), (outputs, size), (tokens, outputs)))
            began = time.perf_counter()
            torch.nn.functional.linear(inputs, weight)
            torch.matmul(gradient, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]

"""What CUDA's driver itself tells of GPUs, where NVIDIA's management library (NVML) does not: in some containers, on Jetson, DGX Spark."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

LIBRARY = "libcuda.so.1"
# CUdevice_attribute of cuda.h.
INTEGRATED, CAPABILITY = 18, (75, 76)


class Gpu(NamedTuple):
    name: str
    total_bytes: int  # that CUDA can give
    capability: tuple[int, int]
    integrated: bool  # its memory is the machine's RAM


class _NotTold(Exception):
    """The driver answered with an error."""


def version(library: str = LIBRARY) -> tuple[int, int] | None:
    """The CUDA that the driver knows; None without one."""
    try:
        number = _ask(ctypes.CDLL(library), "cuDriverGetVersion", ctypes.c_int())  # 13000 is CUDA 13.0
    except (OSError, AttributeError, _NotTold):
        return None
    return number // 1000, number % 1000 // 10


def gpus(library: str = LIBRARY) -> list[Gpu]:
    """The GPUs that CUDA sees, in its own order; empty without a driver. Takes no memory there: nothing is begun on them."""
    try:
        driver = ctypes.CDLL(library)
        if driver.cuInit(0):
            return []
        return [
            _look(driver, _ask(driver, "cuDeviceGet", ctypes.c_int(), n)) for n in range(_ask(driver, "cuDeviceGetCount", ctypes.c_int()))
        ]
    except (OSError, AttributeError, _NotTold):
        return []


def _look(driver: Any, gpu: int) -> Gpu:
    name = ctypes.create_string_buffer(256)
    if driver.cuDeviceGetName(name, len(name), gpu):
        raise _NotTold
    attributes = [_ask(driver, "cuDeviceGetAttribute", ctypes.c_int(), number, gpu) for number in (INTEGRATED, *CAPABILITY)]
    total_bytes = _ask(driver, "cuDeviceTotalMem_v2", ctypes.c_size_t(), gpu)
    return Gpu(name.value.decode(errors="replace"), total_bytes, (attributes[1], attributes[2]), bool(attributes[0]))


def _ask(driver: Any, function: str, answer: Any, *given: int) -> int:
    """The number that a function writes where its first argument points."""
    if getattr(driver, function)(ctypes.byref(answer), *given):
        raise _NotTold
    return int(answer.value)

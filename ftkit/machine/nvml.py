"""NVIDIA's management library (NVML), begun and ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def ask(question: Callable[[Any], T], otherwise: T, nvml: Any = None) -> T:
    """What NVML answers, `otherwise` where it is not there or does not tell. `nvml` is its Python module, or what stands in for it."""
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver, or no card
        return otherwise
    try:
        return question(nvml)
    except nvml.NVMLError:
        return otherwise
    finally:
        nvml.nvmlShutdown()

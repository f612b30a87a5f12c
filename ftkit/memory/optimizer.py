"""What an optimizer step allocates."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ftkit.memory.events import ALLOCATE, FREE
from ftkit.memory.settings import StepSettings
from ftkit.memory.sizes import DTYPE_BYTES, state_storages

PAGED_ELEMENTS = 100_000  # bitsandbytes/optim/optimizer.py, get_state_buffer


@dataclass(frozen=True)
class OptimizerEvents:
    """One optimizer step: (kind, storage, bytes); `states` are the storages that stay from the first step on."""

    events: tuple[tuple[int, int, int], ...]
    states: frozenset[int]


def optimizer_events(trained: list[tuple[int, bool]], settings: StepSettings) -> OptimizerEvents:
    """Gradient clipping and one step of the optimizer over `trained` tensors: (elements, keeps 32-bit states).

    As torch 2.13 does them (tests hold it against a real AdamW): a norm for each gradient; two moments for each tensor;
    then, on a GPU, the roots of all variances at once, on a CPU tensor after tensor, two at a time. bitsandbytes' kernels
    work in place. Its paged optimizer keeps the moments of tensors from PAGED_ELEMENTS on in memory that the driver moves out of
    the GPU when it is short: they are left out. On a CPU nothing is paged.
    """
    width = DTYPE_BYTES[settings.trained_dtype]
    events: list[tuple[int, int, int]] = []
    numbers = itertools.count()

    def allocate(size: int) -> tuple[int, int]:
        entry = (next(numbers), size)
        events.append((ALLOCATE, *entry))
        return entry

    def free(*entries: tuple[int, int]) -> None:
        events.extend((FREE, *entry) for entry in entries)

    norms = [allocate(width) for _ in trained]
    free(*norms, allocate(width * len(trained)))
    states: set[int] = set()
    if settings.optim != "adamw_torch":
        paged = settings.optim.startswith("paged") and settings.device == "cuda"
        for elements, wide in trained:
            storages = state_storages(elements, settings.optim, wide=wide)
            moved = 2 if paged and elements >= PAGED_ELEMENTS else 0  # the two moments; their scales stay
            states |= {allocate(size)[0] for size in storages[moved:]}
    else:
        states = {allocate(width * elements)[0] for elements, _ in trained for _ in range(2)}
        if settings.device == "cuda":
            free(*[allocate(width * elements) for elements, _ in trained])
        else:
            kept: list[tuple[int, int]] = []
            for elements, _ in trained:
                root, quotient = allocate(width * elements), allocate(width * elements)
                free(*kept, root)
                kept = [quotient]
            free(*kept)
    return OptimizerEvents(tuple(events), frozenset(states))

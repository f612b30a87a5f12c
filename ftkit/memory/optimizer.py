"""What each optimizer keeps, and what its step allocates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ftkit.memory.events import ALLOCATE, FREE
from ftkit.memory.settings import StepSettings
from ftkit.memory.sizes import DTYPE_BYTES

BITSANDBYTES_MIN_8BIT = 4096  # smaller tensors keep 32-bit states
OPTIMIZER_BLOCK = 256  # 8-bit states: one float32 absmax a block and moment
PAGED_ELEMENTS = 100_000  # bitsandbytes/optim/optimizer.py, get_state_buffer
FLOAT32 = 4


@dataclass(frozen=True)
class Trained:
    """A tensor that is trained. `wide`: an input embedding, which keeps 32-bit states where others have 8."""

    name: str
    shape: tuple[int, ...]
    wide: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class OptimizerEvents:
    """One optimizer step: (kind, storage, bytes); `states` are the storages that stay from the first step on."""

    events: tuple[tuple[int, int, int], ...]
    states: frozenset[int]


class _Written:
    """A step as it is written down: storages are numbered in the order in which they are taken."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int, int]] = []
        self.states: set[int] = set()
        self._numbers = itertools.count()

    def take(self, size: int) -> tuple[int, int]:
        entry = (next(self._numbers), size)
        self.events.append((ALLOCATE, *entry))
        return entry

    def keep(self, sizes: Sequence[int]) -> None:
        self.states |= {self.take(size)[0] for size in sizes}

    def give_back(self, *entries: tuple[int, int]) -> None:
        self.events.extend((FREE, *entry) for entry in entries)


@dataclass(frozen=True)
class Optimizer:
    """`states`: bytes of each tensor that is kept for a trained one, whose elements have so many; `step`: writes down a step over all."""

    states: Callable[[Trained, int], list[int]]
    step: Callable[[_Written, Optimizer, Sequence[Trained], StepSettings], None]


def optimizer_state_bytes(tensor: Trained, optim: str, width: int = FLOAT32) -> int:
    """Bytes of what an optimizer keeps for one trained tensor (its step counter, on the CPU, left out)."""
    return sum(OPTIMIZERS[optim].states(tensor, width))


def optimizer_events(trained: Sequence[Trained], settings: StepSettings) -> OptimizerEvents:
    """Gradient clipping, a norm for each gradient, and one step of the optimizer over these tensors, in this order."""
    width = DTYPE_BYTES[settings.trained_dtype]
    written = _Written()
    norms = [written.take(width) for _ in trained]
    written.give_back(*norms, written.take(width * len(trained)))
    optimizer = OPTIMIZERS[settings.optim]
    optimizer.step(written, optimizer, trained, settings)
    return OptimizerEvents(tuple(written.events), frozenset(written.states))


def _torch_moments(tensor: Trained, width: int) -> list[int]:
    """Two, in the tensor's own dtype."""
    return [width * tensor.elements] * 2


def _torch_step(written: _Written, optimizer: Optimizer, trained: Sequence[Trained], settings: StepSettings) -> None:
    """As torch 2.13 does it: on a GPU the roots of all variances at once, on a CPU tensor after tensor, two at a time."""
    width = DTYPE_BYTES[settings.trained_dtype]
    for tensor in trained:
        written.keep(optimizer.states(tensor, width))
    if settings.device == "cuda":
        written.give_back(*[written.take(width * tensor.elements) for tensor in trained])
        return
    kept: list[tuple[int, int]] = []
    for tensor in trained:
        root, quotient = written.take(width * tensor.elements), written.take(width * tensor.elements)
        written.give_back(*kept, root)
        kept = [quotient]
    written.give_back(*kept)


def _moments(tensor: Trained, width: int, *, count: int = 2, bits: int = 32) -> list[int]:
    """bitsandbytes', in float32, or in 8 bits with a float32 absmax a block after them; small and `wide` tensors are spared that."""
    if bits == 32 or tensor.wide or tensor.elements < BITSANDBYTES_MIN_8BIT:
        return [FLOAT32 * tensor.elements] * count
    return [tensor.elements] * count + [FLOAT32 * math.ceil(tensor.elements / OPTIMIZER_BLOCK)] * count


def _in_place(written: _Written, optimizer: Optimizer, trained: Sequence[Trained], settings: StepSettings, *, paged: bool = False) -> None:
    """bitsandbytes' kernels take nothing beside the states.

    Paged, the two moments of tensors from PAGED_ELEMENTS on are in memory that the driver moves out of the GPU when it is short:
    they are left out, their scales are not. On a CPU nothing is paged.
    """
    for tensor in trained:
        moved = 2 if paged and settings.device == "cuda" and tensor.elements >= PAGED_ELEMENTS else 0
        written.keep(optimizer.states(tensor, DTYPE_BYTES[settings.trained_dtype])[moved:])


def _factors(shape: tuple[int, ...]) -> list[int]:
    """Float32 bytes of Adafactor's means over the squared gradient's last dimension and over the one before; of a vector, of it itself."""
    return (
        [FLOAT32 * math.prod(shape[:-1]), FLOAT32 * math.prod(shape[:-2] + shape[-1:])] if len(shape) > 1 else [FLOAT32 * math.prod(shape)]
    )


def _factored(tensor: Trained, width: int) -> list[int]:
    """The factors, and how large the tensor is (RMS): a number that is there, though the recipe's rate does not follow it."""
    return [*_factors(tensor.shape), FLOAT32]


def _adafactor_step(written: _Written, optimizer: Optimizer, trained: Sequence[Trained], settings: StepSettings) -> None:
    """As transformers 5.23 does it, tensor after tensor, in float32: the last one's update is there until the next one's square is.

    So with two tensors of a size after each other three times that is there. Numbers that come and go are left out.
    """
    width = DTYPE_BYTES[settings.trained_dtype]
    gradient: list[tuple[int, int]] = []  # copies in float32 of what is kept in fewer bits
    weight: list[tuple[int, int]] = []
    before: list[tuple[int, int]] = []
    for tensor in trained:
        full, factors = FLOAT32 * tensor.elements, _factors(tensor.shape)
        if width < FLOAT32:
            written.give_back(*gradient)
            gradient = [written.take(full)]
        written.keep(optimizer.states(tensor, width))
        if width < FLOAT32:
            written.give_back(*weight)
            weight = [written.take(full)]
        square, update = written.take(full), written.take(full)
        written.give_back(*before, square)
        of_factors: list[tuple[int, int]] = []
        if len(factors) > 1:
            for size in factors:
                written.give_back(written.take(size))
            mean, row = written.take(factors[0] // tensor.shape[-2]), written.take(factors[0])
            written.give_back(mean)
            of_factors = [row, written.take(factors[1])]
        following = written.take(full)
        written.give_back(update, *of_factors)
        written.give_back(written.take(full))  # with the sign turned
        before = [following]
    written.give_back(*gradient, *weight, *before)


OPTIMIZERS = {
    "adamw_torch": Optimizer(_torch_moments, _torch_step),
    "paged_adamw_32bit": Optimizer(_moments, partial(_in_place, paged=True)),
    "adamw_8bit": Optimizer(partial(_moments, bits=8), _in_place),
    "paged_adamw_8bit": Optimizer(partial(_moments, bits=8), partial(_in_place, paged=True)),
    "lion_8bit": Optimizer(partial(_moments, count=1, bits=8), _in_place),
    "adafactor": Optimizer(_factored, _adafactor_step),
}

"""One training step at one batch and length: replayed through the allocator, its peak explained."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ftkit.memory import kernels
from ftkit.memory.allocator import MIN_BLOCK_BYTES, Allocator
from ftkit.memory.events import ALLOCATE, GRADIENT, WORK, WORKSPACE
from ftkit.memory.optimizer import OptimizerEvents
from ftkit.memory.unroll import Ints, Layout

OPTIMIZER_STATES, OPTIMIZER_TEMPORARIES = "optimizer states", "optimizer temporaries"
CUBLAS, WORKSPACE_STORAGE, OPTIMIZER_STORAGE = -1, -2, -3  # storages beside those of a pass; the optimizer's go down from there
TIMELINE_POINTS = 1200


@dataclass(frozen=True)
class Part:
    """What a share of the memory is for."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Peak:
    """The most that one training step holds, and when, and what for.

    `allocated_bytes` is torch.cuda.max_memory_allocated, `reserved_bytes` max_memory_reserved, `device_bytes` what
    nvidia-smi shows (an allowance for the CUDA context included). On a CPU all three are the bytes of live tensors.
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    phase: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Timeline:
    """Memory over one optimizer step: `series[name][n]` bytes are held at point n; `phases` are (name, first point)."""

    series: dict[str, tuple[int, ...]]
    phases: tuple[tuple[str, int], ...]


class Ledger:
    """What an optimizer step takes and gives back, written down in order; sizes by their place among a step's sizes.

    In columns, not rows: a hundred thousand small tuples would keep Python's garbage collector busier than all the rest.
    """

    def __init__(self) -> None:
        self.phases: list[tuple[str, int]] = []  # name, first change
        self.signs: list[int] = []  # of each change: 1 (taken) or -1 (given back)
        self.sizes_at: list[int] = []
        self.labels: list[str] = []
        self.takes: list[bool] = []  # of each request to the allocator: whether it takes
        self.storages: list[int] = []
        self.requested_at: list[int] = []  # place of its size
        self._size_at: dict[int, int] = {}  # of what is held, by storage
        self._label: dict[int, str] = {}

    def begin(self, phase: str) -> None:
        self.phases.append((phase, len(self.signs)))

    def take(self, storage: int, size_at: int, label: str) -> None:
        self._size_at[storage], self._label[storage] = size_at, label
        self._change(1, size_at, label)
        self._request(True, storage, size_at)

    def give_back(self, storage: int) -> None:
        size_at = self._size_at.pop(storage)
        self._change(-1, size_at, self._label.pop(storage))
        self._request(False, storage, size_at)

    def rename(self, storage: int, label: str) -> None:
        """The storage stays where it is and is for something else now."""
        size_at = self._size_at[storage]
        self._change(-1, size_at, self._label[storage])
        self._change(1, size_at, label)
        self._label[storage] = label

    def _change(self, sign: int, size_at: int, label: str) -> None:
        self.signs.append(sign)
        self.sizes_at.append(size_at)
        self.labels.append(label)

    def _request(self, takes: bool, storage: int, size_at: int) -> None:
        self.takes.append(takes)
        self.storages.append(storage)
        self.requested_at.append(size_at)


class Changes:
    """A ledger in columns, so that the sizes of any batch and length are put in at once.

    Change n is of the bytes at `sizes_at[n]` of a step's sizes, taken (`signs[n]` 1) or given back (-1) under the name
    `names[labels[n]]`. `phases` are (name, first change).
    """

    def __init__(self, ledger: Ledger) -> None:
        self.names = sorted(set(ledger.labels))
        number_of = {name: number for number, name in enumerate(self.names)}
        self.signs, self.sizes_at = np.array(ledger.signs), np.array(ledger.sizes_at)
        self.labels = np.array([number_of[label] for label in ledger.labels])
        self.phases = ledger.phases
        self._takes, self._storages = ledger.takes, ledger.storages
        self._requested_at = np.array(ledger.requested_at)

    def replay(self, allocator: Allocator, sizes: Ints) -> None:
        """Ask the allocator for all that is taken, give it all that is given back."""
        allocate, free = allocator.allocate, allocator.free
        for takes, storage, size in zip(self._takes, self._storages, sizes[self._requested_at].tolist(), strict=True):
            if takes:
                allocate(storage, size)
            else:
                free(storage)


class Order:
    """The order of a training step, the same for every batch and length of one layout: only the sizes change.

    Two optimizer steps are played: the first makes the optimizer's states, the second has them. Where micro-batches are
    accumulated, a second one follows in the last step, whose gradients are added to those of the first and go at once.
    With `longest_first` the first step alone sees the longest batch, and is the last.
    """

    def __init__(self, layout: Layout, optimizer: OptimizerEvents, *, accumulates: bool, keep_outputs: bool, longest_first: bool) -> None:
        self._layout, self._optimizer = layout, optimizer
        self._keep_outputs = keep_outputs
        last = 1 if longest_first else 2
        self.steps = [
            self._play(makes_states=number == 1, micro_batches=2 if accumulates and number == last else 1) for number in range(1, last + 1)
        ]
        made = [n for n, (kind, storage, _) in enumerate(optimizer.events) if kind == ALLOCATE and storage in optimizer.states]
        self.states_at = np.array(made if last == 2 else [], dtype=np.int64)  # of the states that are there before the last step

    def _play(self, *, makes_states: bool, micro_batches: int) -> Changes:
        layout, optimizer = self._layout, self._optimizer
        kinds, storages = layout.kinds.tolist(), layout.storages.tolist()
        sizes_at = (len(optimizer.events) + layout.source).tolist()
        marks = dict(layout.marks)
        depth = 1 + max((number for _, (name, number) in layout.marks if name == "forward"), default=0)
        width = 1 + max(storages)  # storages of different passes have numbers of their own
        step = Ledger()
        held: list[int] = []  # the model's outputs, until the next take their place
        gradients: list[int] = []
        for micro in range(micro_batches):
            added = set()
            for index, (kind, number, size_at) in enumerate(zip(kinds, storages, sizes_at, strict=True)):
                storage = micro * width + number
                if index in marks:
                    if marks[index][0] == "loss backward":
                        while held:
                            step.give_back(held.pop())
                    if phase := phase_text(marks[index], depth, micro):
                        step.begin(phase)
                if kind == WORK:
                    continue
                if kind == ALLOCATE:
                    step.take(storage, size_at, layout.labels[index])
                elif kind == WORKSPACE:
                    step.take(WORKSPACE_STORAGE, size_at, "kernel workspaces")
                    step.give_back(WORKSPACE_STORAGE)
                elif kind == GRADIENT and micro:
                    added.add(number)
                    step.give_back(storage)
                elif kind == GRADIENT:
                    gradients.append(storage)
                    step.rename(storage, "gradients")
                elif self._keep_outputs and index >= layout.release:
                    held.append(storage)
                elif number not in added:
                    step.give_back(storage)
        step.begin("optimizer step")
        for size_at, (kind, number, _) in enumerate(optimizer.events):
            storage, stays = OPTIMIZER_STORAGE - number, number in optimizer.states
            if makes_states or not stays:
                if kind == ALLOCATE:
                    step.take(storage, size_at, OPTIMIZER_STATES if stays else OPTIMIZER_TEMPORARIES)
                else:
                    step.give_back(storage)
        for storage in (*held, *gradients):
            step.give_back(storage)
        return Changes(step)


@dataclass(frozen=True)
class TrainingStep:
    """All of one training step at one batch and length, ready to be replayed.

    `fixed` are the storages that are there before the first step, by what they are for; `sizes` the bytes of the
    optimizer's events and then of the pass's.
    """

    fixed: tuple[Part, ...]
    order: Order
    sizes: Ints
    on_cuda: bool
    capability: tuple[int, int]

    def peak(self, limit_bytes: int | None = None) -> Peak:
        """Replay both optimizer steps and explain the highest point of the last.

        With `limit_bytes` on the device the allocator gives cached memory back before it passes it, as PyTorch does.
        What is reserved is then above the limit only where the step does not fit; where its tensors alone do not, it is
        what the step reserves on a card that is large enough.
        """
        last, amounts = self._amounts()
        top = int(amounts.cumsum().argmax())
        held = self._before()
        for label, name in enumerate(last.names):
            held[name] = held.get(name, 0) + int(amounts[: top + 1][last.labels[: top + 1] == label].sum())
        parts = sorted((Part(name, size) for name, size in sorted(held.items()) if size > 0), key=lambda part: -part.bytes)
        allocated = reserved = device = sum(held.values())
        if self.on_cuda:
            room = None if limit_bytes is None else limit_bytes - kernels.CONTEXT_BYTES
            allocator = self.replay(None if room is not None and allocated > room else room)
            allocated, reserved = allocator.peak_allocated_bytes, allocator.peak_reserved_bytes
            device = reserved + kernels.CONTEXT_BYTES
        phase = next(name for name, first in reversed(last.phases) if first <= top)
        return Peak(allocated, reserved, device, phase, tuple(parts))

    def allocated_bytes(self) -> int:
        """The peak of live tensors alone: quick, and never above `peak().allocated_bytes`."""
        return sum(self._before().values()) + int(self._amounts()[1].cumsum().max())

    def replay(self, limit_bytes: int | None = None) -> Allocator:
        """The optimizer steps through the allocator."""
        allocator = Allocator(limit_bytes)
        for number, part in enumerate(self.fixed):
            allocator.allocate(("fixed", number), part.bytes)
        if self.on_cuda:
            allocator.allocate(CUBLAS, kernels.cublas_bytes(self.capability))
        for changes in self.order.steps:
            changes.replay(allocator, self.sizes)
        return allocator

    def timeline(self) -> Timeline:
        """The last optimizer step, thinned to about TIMELINE_POINTS points that keep every local peak."""
        held, phases = self.held()
        total: Ints = sum(held.values(), np.zeros(1, np.int64))
        edges = np.unique(np.linspace(0, len(total), TIMELINE_POINTS + 1, dtype=np.int64))
        kept = np.array([a + int(total[a:b].argmax()) for a, b in pairwise(edges)])
        return Timeline(
            series={name: tuple(held[name][kept].tolist()) for name in sorted(held)},
            phases=tuple((name, int(np.searchsorted(kept, first))) for name, first in phases),
        )

    def held(self) -> tuple[dict[str, Ints], list[tuple[str, int]]]:
        """Bytes after each change of the last optimizer step, by what they are for; and its phases: name, first change."""
        last, amounts = self._amounts()
        before = self._before()
        found = {name: np.where(last.labels == label, amounts, 0).cumsum() for label, name in enumerate(last.names)}
        nothing = np.zeros_like(amounts)
        return {name: found.get(name, nothing) + before.get(name, 0) for name in {*found, *before}}, last.phases

    def _rounded(self, sizes: Ints) -> Ints:
        grain = MIN_BLOCK_BYTES if self.on_cuda else 1
        rounded: Ints = -(-sizes // grain) * grain
        return rounded

    def _before(self) -> dict[str, int]:
        """Bytes held when the last step begins, by what they are for."""
        held: dict[str, int] = {}
        for part, size in zip(self.fixed, self._rounded(np.array([part.bytes for part in self.fixed])).tolist(), strict=True):
            held[part.name] = held.get(part.name, 0) + size
        if self.on_cuda:
            held["cuBLAS workspace"] = kernels.cublas_bytes(self.capability)
        if len(self.order.states_at):
            held[OPTIMIZER_STATES] = int(self._rounded(self.sizes[self.order.states_at]).sum())
        return held

    def _amounts(self) -> tuple[Changes, Ints]:
        """The last step, and the bytes that each of its changes adds."""
        last = self.order.steps[-1]
        return last, last.signs * self._rounded(self.sizes)[last.sizes_at]


def phase_text(mark: tuple[str, int], depth: int, micro: int) -> str:
    """A mark of the trace, for people."""
    name, number = mark
    again = " of a later micro-batch" if micro else ""
    return {
        "forward": f"forward pass{again}, layer {number + 1} of {depth}",
        "head": f"loss head{again}",
        "loss backward": f"backward pass of the loss head{again}",
        "backward": f"backward pass{again}, layer {number + 1} of {depth}",
    }.get(name, "")

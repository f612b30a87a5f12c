"""A plan: what was chosen, what it needs, and what would make it fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ftkit.data.lengths import Batching
from ftkit.gguf.types import GgufModel, gguf_sizes
from ftkit.machine.device import Device, processor
from ftkit.memory.model import Inventory
from ftkit.memory.replay import Peak, Timeline
from ftkit.memory.sizes import DTYPE_BYTES
from ftkit.plan.cost import TRAINING_BYTES, Sizes
from ftkit.plan.speed import Estimate
from ftkit.recipe import Ship

METHODS = ("full", "lora", "qlora")
MARGIN = 0.04  # of the budget, kept free: above the largest error seen against measured runs (docs/plan.md)
RESERVE, CONTEXT, PROBED, PROCESS = "allocator’s reserve", "CUDA context", "more, as measured with this model", "Python and its libraries"


@dataclass(frozen=True)
class Candidate:
    """One method at one batch size and length, against a budget."""

    inventory: Inventory
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    peak: Peak
    budget_bytes: int
    max_tokens: int | None = None  # that a micro-batch holds, padding included: more rows where they are short; None: so many rows always
    packing: bool = False  # rows end to end in one, without padding

    @property
    def limit_bytes(self) -> int:
        return without_margin(self.budget_bytes)

    @property
    def fits(self) -> bool:
        return self.peak.device_bytes <= self.limit_bytes


@dataclass(frozen=True)
class Remedy:
    """A change of the recipe, as `--set` takes it, and what the step then needs."""

    settings: tuple[str, ...]
    words: str
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Workload:
    """What training computes. `seconds` is None until a training of this model on this device has told its throughput."""

    steps: int
    epochs: float
    tokens: int  # of the rows, padding left out, over all epochs
    tokens_per_second: float | None = None
    seconds: float | None = None

    def at(self, tokens_per_second: float | None) -> Workload:
        """The same work at a known speed."""
        return replace(self, tokens_per_second=tokens_per_second, seconds=self.tokens / tokens_per_second if tokens_per_second else None)


@dataclass(frozen=True)
class Together:
    """The same training on several cards of the kind, a process each. Steps stay the same, and their rows are shared."""

    cards: int
    fsdp: bool  # the processes share the weights out; else each holds all
    rows_a_step: int  # that one process computes, at most
    device_bytes: int  # on each card; at most, where weights are shared out
    fits: bool
    exchanged_bytes: int | None  # that each process sends in a step; None where weights travel, as often as they are gathered
    seconds_low: float | None = None  # without that; None where it is not known
    seconds_high: float | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """The chosen fit, the same step under the three methods, and what would fit instead."""

    device: Device
    max_length: int  # tokens of the longest row that the step will see
    labelled_share: float  # of its tokens, those that are learnt, at most; they alone cost in the loss head
    compute_dtype: str
    attention: str
    chosen: Candidate
    methods: tuple[Candidate, ...]
    untraced: dict[str, str]  # methods that cannot be traced for this model, and why
    batches: tuple[tuple[int, bool, int, bool], ...]  # those looked at: batch, checkpointing, bytes on the device, fits
    changes: tuple[Remedy, ...]
    batching: Batching | None
    work: Workload | None  # None without a dataset
    extra_bytes: int  # on the device beyond the trace: the difference of this model's probe, and on a CPU the process itself
    timeline: Timeline
    gguf: GgufModel  # as it will be converted
    estimate: Estimate | None = None  # how long it takes
    not_estimated_because: str | None = None
    together: tuple[Together, ...] = ()  # each holding all weights, and sharing them out; none on a CPU
    alone_because: str | None = None  # why several cards would not train it
    shares: int = 1  # cards that share the weights out: all of this is of each

    @property
    def gguf_bytes(self) -> dict[str, int]:
        """Of each type's tensors."""
        return gguf_sizes(self.gguf)

    def sizes(self, ship: Ship) -> Sizes:
        """What the costs of the steps follow from."""
        vram_bytes = self.device.total_bytes if self.device.kind == "cuda" else None
        compute_bytes = DTYPE_BYTES[self.compute_dtype]
        return Sizes(
            *(self.gguf, self.chosen.inventory, ship, self.max_length, compute_bytes, vram_bytes, self.chosen.peak.device_bytes),
            ram_bytes=processor().total_bytes,
            closing_bytes=2 if self.compute_dtype == "bfloat16" else 4,
        )

    def beside_tensors(self, fit: Candidate) -> dict[str, int]:
        """What the device holds at the peak beside the step's tensors; with them it is `device_bytes`."""
        peak = fit.peak
        if self.device.kind == "cpu":
            beside = {PROCESS: TRAINING_BYTES, PROBED: peak.device_bytes - peak.reserved_bytes - TRAINING_BYTES}
            return {name: size for name, size in beside.items() if size}
        probed = self.extra_bytes if fit.inventory.method == self.chosen.inventory.method else 0
        found = {
            RESERVE: peak.reserved_bytes - sum(part.bytes for part in peak.parts),
            CONTEXT: peak.device_bytes - peak.reserved_bytes - probed,
            PROBED: probed,
        }
        return {name: size for name, size in found.items() if size}

    def holds_with(self, free_bytes: int) -> bool:
        """Whether the same would be chosen with so much free: it fits, and nothing faster does."""
        limit = without_margin(free_bytes)
        faster = (size for _, _, size, fits in self.batches if not fits)
        return free_bytes == self.device.free_bytes or (
            self.chosen.fits and self.chosen.peak.device_bytes <= limit < min(faster, default=math.inf)
        )

    def today(self, free_bytes: int, tokens_per_second: float | None) -> MemoryPlan:
        """The same choice against another budget, with which it holds, and at the speed of the last training."""
        return replace(
            self,
            device=replace(self.device, free_bytes=free_bytes),
            chosen=replace(self.chosen, budget_bytes=free_bytes),
            methods=tuple(replace(fit, budget_bytes=free_bytes) for fit in self.methods),
            work=self.work and self.work.at(tokens_per_second),
        )

    def record(self) -> dict[str, Any]:
        """JSON-able, for `load`."""
        from pydantic import TypeAdapter

        recorded: dict[str, Any] = TypeAdapter(MemoryPlan).dump_python(self, mode="json")
        return recorded

    @classmethod
    def load(cls, record: object) -> MemoryPlan:
        """The plan that was recorded. Raises ValueError for what is none."""
        from pydantic import TypeAdapter

        return TypeAdapter(MemoryPlan).validate_python(record)


def without_margin(budget_bytes: int) -> int:
    return int(budget_bytes * (1 - MARGIN))

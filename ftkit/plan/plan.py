"""A plan: what was chosen, what it needs, and what would make it fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ftkit.data.lengths import Batching
from ftkit.machine.device import Device
from ftkit.memory.model import Inventory
from ftkit.memory.step import Part, Peak, Timeline
from ftkit.plan.cost import FTKIT_BYTES, OLLAMAS_MODELS, RUN_FOLDER, TRAIN, LaterStep, Place

METHODS = ("full", "lora", "qlora")
MARGIN = 0.04  # of the budget, kept free: above the largest error seen against measured runs (docs/plan.md)
RESERVE, CONTEXT, PROBED, PROCESS = "allocator’s reserve", "CUDA context", "more, by the probe of this model", "Python and its libraries"


@dataclass(frozen=True)
class Fit:
    """One method at one batch size and length, against a budget."""

    inventory: Inventory
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    peak: Peak
    budget_bytes: int

    @property
    def limit_bytes(self) -> int:
        return without_margin(self.budget_bytes)

    @property
    def fits(self) -> bool:
        return self.peak.device_bytes <= self.limit_bytes


@dataclass(frozen=True)
class Change:
    """A change of the recipe, as `--set` takes it, and what the step then needs."""

    settings: tuple[str, ...]
    words: str
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Work:
    """What training computes. `seconds` is None until a training of this model on this device has told its throughput."""

    steps: int
    epochs: float
    tokens: int  # of the rows, padding left out, over all epochs
    tokens_per_second: float | None = None
    seconds: float | None = None

    def at(self, tokens_per_second: float | None) -> Work:
        """The same work at a known speed."""
        return replace(self, tokens_per_second=tokens_per_second, seconds=self.tokens / tokens_per_second if tokens_per_second else None)


@dataclass(frozen=True)
class MemoryPlan:
    """The chosen fit, the same step under the three methods, what would fit instead, and the later steps."""

    device: Device
    max_length: int  # tokens of the longest row that the step will see
    labelled_share: float  # of its tokens, those that are learnt, at most; they alone cost in the loss head
    compute_dtype: str
    attention: str
    chosen: Fit
    methods: tuple[Fit, ...]
    untraced: dict[str, str]  # methods that cannot be traced for this model, and why
    batches: tuple[tuple[int, bool, int, bool], ...]  # those looked at: batch, checkpointing, bytes on the device, fits
    changes: tuple[Change, ...]
    batching: Batching | None
    work: Work | None  # None without a dataset
    extra_bytes: int  # on the device beyond the trace: the difference of this model's probe, and on a CPU the process itself
    timeline: Timeline
    later: tuple[LaterStep, ...]  # those after the plan, training first
    gguf_bytes: dict[str, int]  # of each type's tensors
    gguf_estimated_because: str | None  # None: exact

    @property
    def disk_bytes(self) -> int:
        """The most that all steps together keep on disk."""
        return sum(self.disk_by_place().values())

    def disk_by_place(self, *, trained: bool = False) -> dict[Place, int]:
        """The most that is kept in each place; the checkpoints are gone when the steps after training begin.

        `trained`: what those steps alone need.
        """
        sizes = dict.fromkeys((RUN_FOLDER, OLLAMAS_MODELS), 0)
        checkpoints = 0
        for step in self.later:
            if step.name == TRAIN:
                checkpoints = step.disk_bytes
            else:
                sizes[step.disk_is] += step.disk_bytes
        if not trained:
            sizes[RUN_FOLDER] = max(sizes[RUN_FOLDER], checkpoints)
        return sizes

    def beside_tensors(self, fit: Fit) -> dict[str, int]:
        """What the device holds at the peak beside the step's tensors; with them it is `device_bytes`."""
        peak = fit.peak
        if self.device.kind == "cpu":
            beside = {PROCESS: FTKIT_BYTES, PROBED: peak.device_bytes - peak.reserved_bytes - FTKIT_BYTES}
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

    @classmethod
    def load(cls, record: dict[str, Any]) -> MemoryPlan:
        """The plan whose `dataclasses.asdict` was recorded."""

        def fit(entry: dict[str, Any]) -> Fit:
            peak = Peak(**{**entry["peak"], "parts": tuple(Part(**part) for part in entry["peak"]["parts"])})
            return Fit(**{**entry, "inventory": Inventory(**entry["inventory"]), "peak": peak})

        timeline, rows = record["timeline"], record["batching"]
        return cls(
            **{
                **record,
                "device": Device(**{**record["device"], "capability": tuple(record["device"]["capability"])}),
                "chosen": fit(record["chosen"]),
                "methods": tuple(map(fit, record["methods"])),
                "batches": tuple(map(tuple, record["batches"])),
                "changes": tuple(Change(**{**entry, "settings": tuple(entry["settings"])}) for entry in record["changes"]),
                "work": Work(**record["work"]) if record["work"] else None,
                "batching": rows and Batching(**{**rows, "grouped_batch_tokens": tuple(rows["grouped_batch_tokens"])}),
                "timeline": Timeline({k: tuple(v) for k, v in timeline["series"].items()}, tuple(map(tuple, timeline["phases"]))),
                "later": tuple(LaterStep(**entry) for entry in record["later"]),
            }
        )


def without_margin(budget_bytes: int) -> int:
    return int(budget_bytes * (1 - MARGIN))

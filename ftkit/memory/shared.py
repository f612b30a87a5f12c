"""What a process holds of a step where several share the weights out (FSDP 2): computed from the whole step, not traced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ftkit.memory.kernels import CONTEXT_BYTES
from ftkit.memory.model import Adapters, Inventory, Skeleton
from ftkit.memory.replay import OPTIMIZER_STATES, OPTIMIZER_TEMPORARIES, Part, Peak, TrainingStep
from ftkit.memory.settings import StepSettings
from ftkit.memory.sizes import DTYPE_BYTES, nf4_storages

GATHERED = "weights gathered to compute"
LAYERS_AT_ONCE = 3  # the one that computes, and the next, as it arrives and as it will be computed with
SHARED = {
    *("weights", "4-bit weights", "weights that stay 16-bit", "weights that stay 32-bit", "adapter", "gradients"),
    *(OPTIMIZER_STATES, OPTIMIZER_TEMPORARIES),
}  # what each keeps a share of
FLOAT32 = 4  # bytes: gradients are summed in it


def shared_out(step: TrainingStep, whole: Peak, skeleton: Skeleton, counted: Inventory, settings: StepSettings, count: int) -> Peak:
    """The peak on each of `count` cards, of a step that accumulates, and whose peak on one card is `whole`.

    Each keeps its share of weights, adapters, gradients, optimizer states and what the optimizer computes with; the scales of 4-bit
    weights it keeps whole. What stands outside of the decoder layers is gathered from the first layer to the last gradient, the head
    once more for TRL's loss; of layers the one that computes and the next, which has its place twice until it has arrived. Gradients
    are whole, as they are and in float32, until they are summed: a layer's while the next one's come, those outside at the end.
    Weights that are gathered in 16 bits need none of the copies that one card makes. QLoRA's weights are whole on each card once, as
    they are loaded. Left out: that shares are rounded up to whole rows; what the allocator keeps between them is taken as it is on
    one card. Held against torch's own tracker of FSDP 2 (tests/memory/test_shared.py).
    """
    held, phases = step.held()
    shared = {name: -(-series // count) for name, series in held.items() if name in SHARED}
    rest = {name: series for name, series in held.items() if name not in SHARED}
    gathers = _Gathers.of(skeleton, settings)
    beside = np.zeros_like(next(iter(held.values())))
    for (name, first), (_, end) in pairwise([*phases, ("", len(beside))]):
        beside[first:end] = gathers.beside(name)
    total = sum(shared.values(), beside) + sum(rest.values(), np.zeros_like(beside))
    top = int(total.argmax())
    allocated, slack = int(total[top]), whole.reserved_bytes - whole.allocated_bytes
    device_bytes = allocated + slack + whole.device_bytes - whole.reserved_bytes
    if settings.method == "qlora" and settings.device == "cuda":
        device_bytes = max(device_bytes, counted.weights_bytes + CONTEXT_BYTES)
    parts = [Part(name, int(series[top])) for name, series in (shared | rest).items()] + [Part(GATHERED, int(beside[top]))]
    phase = next(name for name, first in reversed(phases) if first <= top)
    shown = tuple(sorted((part for part in parts if part.bytes), key=lambda part: -part.bytes))
    return Peak(allocated, allocated + slack, device_bytes, phase, shown)


@dataclass(frozen=True)
class _Gathers:
    """Bytes of weights that are gathered to compute with, and of their gradients, of the largest layer and outside of the layers."""

    layer: int
    outside: int
    head: int
    layer_gradients: int  # as they are and in float32, to be summed, and the next layer's as they are
    outside_gradients: int  # as they are and in float32
    outside_waiting: int  # of those, as they are
    copies: int  # in 16 bits of the least layer's matrices in float32, which one card alone makes, and keeps until the loss is there
    copies_stay: bool  # or, without checkpointing, until the layer's gradients are
    depth: int

    @classmethod
    def of(cls, skeleton: Skeleton, settings: StepSettings) -> _Gathers:
        compute = DTYPE_BYTES[settings.compute_dtype]
        layer, outside = _gathered(skeleton, settings)
        trained_layer, trained_outside = _trained(skeleton, settings)
        copied = settings.method == "full" and settings.trained_dtype != settings.compute_dtype
        return cls(
            layer,
            outside,
            head=skeleton.model.get_output_embeddings().weight.numel() * compute,
            layer_gradients=(2 * compute + FLOAT32) * trained_layer,
            outside_gradients=(compute + FLOAT32) * trained_outside,
            outside_waiting=compute * trained_outside,
            copies=_least_matrices(skeleton) * compute if copied else 0,
            copies_stay=not settings.gradient_checkpointing,
            depth=skeleton.total_layers,
        )

    def beside(self, phase: str) -> int:
        """What a phase of the step has more than on one card."""
        if phase.startswith("optimizer"):
            return 0
        found, forward = re.search(r"layer (\d+) of", phase), not phase.startswith("backward")
        behind = int(found[1]) - 1 if found else self.depth  # layers whose copies are all there
        weights = self.outside + LAYERS_AT_ONCE * self.layer - (behind * self.copies if forward or self.copies_stay else 0)
        if not found:  # the loss
            return weights + self.head + (0 if forward else self.outside_waiting)
        if forward:
            return weights
        return weights + self.layer_gradients + (self.outside_waiting if behind else self.outside_gradients)


def _weights(skeleton: Skeleton, settings: StepSettings) -> Iterator[tuple[str, int, int]]:
    """(name, bytes that are shared out, bytes once gathered) of each weight."""
    kept = DTYPE_BYTES[settings.trained_dtype if settings.method == "full" else settings.base_dtype]
    for tensor in skeleton.tensors:
        if settings.method == "qlora" and tensor.quantized:
            packed = nf4_storages(tensor.elements, settings.double_quant)[0]
            yield tensor.name, packed, packed
        else:
            yield tensor.name, kept * tensor.elements, DTYPE_BYTES[settings.compute_dtype] * tensor.elements


def _gathered(skeleton: Skeleton, settings: StepSettings) -> tuple[int, int]:
    """Bytes of the largest layer, and of what is outside of the layers."""
    return _by_layer(skeleton, ((name, size) for name, _, size in _weights(skeleton, settings)))


def _trained(skeleton: Skeleton, settings: StepSettings) -> tuple[int, int]:
    """The same, of what is trained, in elements."""
    adapters = Adapters() if settings.method == "full" else skeleton.adapters(settings.lora)
    return _by_layer(skeleton, ((t.name, t.elements) for t in skeleton.trained(settings.method, adapters)))


def _least_matrices(skeleton: Skeleton) -> int:
    """Elements of the linear maps of the layer that has least of them."""
    layers, _ = _of_layers(skeleton, ((t.name, t.elements if t.quantized else 0) for t in skeleton.tensors))
    return min(layers, default=0)


def _by_layer(skeleton: Skeleton, sizes: Iterator[tuple[str, int]]) -> tuple[int, int]:
    """The most of a layer, and all outside of them."""
    layers, outside = _of_layers(skeleton, sizes)
    return max(layers, default=0), outside


def _of_layers(skeleton: Skeleton, sizes: Iterator[tuple[str, int]]) -> tuple[list[int], int]:
    layers: dict[str, int] = {}
    outside = 0
    for name, size in sizes:
        if inside := re.match(re.escape(skeleton.layers_name) + r"\.(\d+)\.", name):
            layers[inside[1]] = layers.get(inside[1], 0) + size
        else:
            outside += size
    return list(layers.values()), outside

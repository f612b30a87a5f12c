"""What a process holds of a step where several share the weights out (FSDP 2): computed from the whole step, not traced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from ftkit.memory.kernels import CONTEXT_BYTES
from ftkit.memory.model import Adapters, Inventory, Skeleton
from ftkit.memory.replay import OPTIMIZER_STATES, Part, Peak
from ftkit.memory.settings import StepSettings
from ftkit.memory.sizes import DTYPE_BYTES, nf4_storages

GATHERED = "weights gathered to compute"
LAYERS_AT_ONCE = 2  # the one that computes, and the next, which is on its way
FLOAT32 = 4  # bytes: gradients are summed in it


def shared_out(peak: Peak, skeleton: Skeleton, counted: Inventory, settings: StepSettings, count: int) -> Peak:
    """The peak on each of `count` cards, of a step whose whole gradients and optimizer states are there all the time.

    Each keeps its share of weights, adapters, gradients and optimizer states; the scales of 4-bit weights it keeps whole. What
    stands outside of the decoder layers is gathered for the whole of a step, the head once more for TRL's loss; of layers two at a
    time, each once as it arrives and once as it is computed with. Gradients of that much are there whole, as they are and in
    float32, until they are summed. QLoRA's weights are whole on each card once, as they are loaded. Left out: that shares are
    rounded up to whole rows, and what the allocator keeps between them.
    """
    sharded = (
        sum(size for _, size, _ in _weights(skeleton, settings)) + counted.adapter_bytes + counted.gradient_bytes + counted.optimizer_bytes
    )
    kept = -(-sharded // count)
    layers, outside = _gathered(skeleton, settings)
    head = skeleton.model.get_output_embeddings().weight.numel() * DTYPE_BYTES[settings.compute_dtype]
    trained_layer, trained_outside = _trained(skeleton, settings)
    width = DTYPE_BYTES[settings.compute_dtype] + FLOAT32
    gathered = outside + head + LAYERS_AT_ONCE * 2 * layers + width * (trained_outside + LAYERS_AT_ONCE * trained_layer)
    less = sharded - kept
    device_bytes = peak.device_bytes - less + gathered
    if settings.method == "qlora" and settings.device == "cuda":
        device_bytes = max(device_bytes, counted.weights_bytes + CONTEXT_BYTES)
    return replace(
        peak,
        allocated_bytes=peak.allocated_bytes - less + gathered,
        reserved_bytes=peak.reserved_bytes - less + gathered,
        device_bytes=device_bytes,
        parts=(*_less(peak.parts, less), Part(GATHERED, gathered)),
    )


def _less(parts: tuple[Part, ...], less: int) -> Iterator[Part]:
    """Those that are shared out, smaller by so much together, each in proportion; and the others."""
    shared = ("weights", "4-bit weights", "weights that stay 16-bit", "weights that stay 32-bit", "adapter", "gradients", OPTIMIZER_STATES)
    whole = sum(part.bytes for part in parts if part.name in shared)
    for part in parts:
        if part.name in shared:
            taken = min(part.bytes, round(less * part.bytes / whole))
            whole, less = whole - part.bytes, less - taken
            yield Part(part.name, part.bytes - taken)
        else:
            yield part


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


def _by_layer(skeleton: Skeleton, sizes: Iterator[tuple[str, int]]) -> tuple[int, int]:
    layers: dict[str, int] = {}
    outside = 0
    for name, size in sizes:
        if inside := re.match(re.escape(skeleton.layers_name) + r"\.(\d+)\.", name):
            layers[inside[1]] = layers.get(inside[1], 0) + size
        else:
            outside += size
    return max(layers.values(), default=0), outside

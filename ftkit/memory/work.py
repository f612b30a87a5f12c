"""What a training step computes and moves, counted in its trace: operations of matrix products, bytes read and written, kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HALF, SINGLE, ROWS, WEIGHTS, KERNELS = (
    "16-bit operations",
    "32-bit operations",
    "bytes of rows",
    "bytes of weights",
    "kernels",
)
NO_KERNEL = ("aten::empty", "aten::detach", "aten::_unsafe_view")
COUNTED = (HALF, SINGLE, ROWS, WEIGHTS, KERNELS)
GATHERS = ("embedding", "index", "gather")  # of what these read from, the rest stays where it is


@dataclass(frozen=True)
class Work:
    """One micro-batch: forward and backward pass, what checkpointing computes again among it.

    Operations are those of matrix products, two a multiply-add. Bytes are what each kernel reads and writes, as PyTorch runs
    them one after the other; `weight_bytes` those that are the same for any number of rows: weights, and what is dequantised.
    """

    half_operations: int  # on 16-bit numbers
    single_operations: int  # on 32-bit numbers
    row_bytes: int
    weight_bytes: int
    kernels: int


class Counter:
    """Counts operators as they are called, until what was counted is taken."""

    def __init__(self) -> None:
        import bitsandbytes  # noqa: F401 – registers its operators
        import torch
        from torch.utils.flop_counter import flop_registry

        self._tensor: Any = torch.Tensor
        self._registry: dict[Any, Any] = flop_registry
        self._gemm_4bit = torch.ops.bitsandbytes.gemm_4bit.default
        self._counts = dict.fromkeys(COUNTED, 0)
        self._weights: set[int] = set()  # storages that are the same whatever the rows: weights, and what is made of them alone

    def weight(self, tensor: Any) -> None:
        self._weights.add(tensor.untyped_storage()._cdata)

    def forget(self, storage: int) -> None:
        """A storage is gone, and its address may be another's next."""
        self._weights.discard(storage)

    def take(self) -> Iterator[tuple[str, int]]:
        """(what, how many) since the last call."""
        counted, self._counts = self._counts, dict.fromkeys(COUNTED, 0)
        yield from counted.items()

    def see(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count a call that a GPU runs: a view moves nothing."""
        if func.is_view or func.namespace == "prim" or func._schema.name.startswith(NO_KERNEL):
            return
        read, written = list(self._tensors((args, kwargs))), list(self._tensors(out))
        self._counts[KERNELS] += 1
        if read and all(tensor.untyped_storage()._cdata in self._weights for tensor in read):
            for tensor in written:
                self.weight(tensor)
        if any(name in func._schema.name for name in GATHERS):
            read = written
        for tensor in (*read, *written):
            self._counts[WEIGHTS if tensor.untyped_storage()._cdata in self._weights else ROWS] += _bytes(tensor)
        if func is self._gemm_4bit:
            x, _, shape = args[:3]
            self._operations(x, 2 * x.numel() * shape[0])
            self._counts[WEIGHTS] += 2 * shape[0] * shape[1] * x.element_size()  # dequantised into a workspace, and read there
        elif count := self._registry.get(func._overloadpacket):
            operations = count(*args, **kwargs, out_val=out)
            self._operations(read[0], operations // 2 if _is_causal(func, args, kwargs) else operations)

    def _operations(self, operand: Any, count: int) -> None:
        self._counts[SINGLE if operand.element_size() > 2 else HALF] += count

    def _tensors(self, values: Any) -> Iterator[Any]:
        if isinstance(values, self._tensor):
            yield values
        elif isinstance(values, (tuple, list)):
            for value in values:
                yield from self._tensors(value)
        elif isinstance(values, dict):
            yield from self._tensors(tuple(values.values()))


def _bytes(tensor: Any) -> int:
    """Those that a kernel touches: an expanded tensor has more elements than there are."""
    return min(int(tensor.numel() * tensor.element_size()), int(tensor.untyped_storage().nbytes()))


def _is_causal(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether attention leaves out what comes later, which is half of it."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "is_causal":
            return bool(args[position] if position < len(args) else kwargs.get("is_causal", False))
    return False

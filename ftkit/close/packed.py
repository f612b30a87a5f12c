"""The weights of a quantised file as they lie in it: some rows are dequantised whenever they are computed with, and none is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from ftkit.close.places import Place

ELEMENTS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 23}  # that are dequantised at a time: a processor's cache holds them


@dataclass(frozen=True)
class Blocks:
    """A tensor of the file: bytes (rows, bytes of a row), of experts (experts, rows, bytes of a row); its type in GGUF, and its name."""

    data: torch.Tensor
    kind: int
    name: str

    @property
    def rows_count(self) -> int:
        return self.data.shape[-2]

    @property
    def columns(self) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        elements, size = map(int, GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)])
        return self.data.shape[-1] // size * elements

    def expert(self, which: int) -> Blocks:
        """Of one expert."""
        return replace(self, data=self.data[which])

    def rows(self, which: slice | torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of it, computed in float32 and rounded once: (rows, columns) on a device, in a format."""
        return dequantise(self.data[which].to(device), self.kind).to(dtype)


class PackedWeight:
    """Stands where a frozen weight (rows, columns) of a model stands, or (experts, rows, columns), and is computed with as it is.

    torch asks `__torch_function__` of what is no tensor, so that the model's own layers stay. What is not in COMPUTED raises
    NotImplementedError by its name.
    """

    COMPUTED: ClassVar[dict[str, Callable[..., torch.Tensor]]] = {}  # by the names of torch's functions; filled below

    def __init__(self, parts: Sequence[tuple[Blocks, Place]], device: torch.device, dtype: torch.dtype) -> None:
        """`parts`: the tensors of the file, and where in the weight they are; together they are all of it."""
        self.parts, self.device, self.dtype = tuple(parts), device, dtype
        self.columns = self.parts[0][0].columns
        self.requires_grad = False

    @property
    def shape(self) -> torch.Size:
        import torch

        *experts, _ = self.parts[0][0].data.shape[:-1]
        return torch.Size((*experts, sum(blocks.rows_count for blocks, _ in self.parts), self.columns))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, which: Any) -> PackedWeight | torch.Tensor:
        """One expert, packed; or one row, as Gemma's that pads."""
        import torch

        if isinstance(which, tuple) and which[1:] == (slice(None),):
            which = which[0]
        if isinstance(which, (tuple, slice)):
            raise NotImplementedError("of packed weights one expert or row is had at a time")
        if self.ndim == 2:
            return self.look_up(torch.tensor(int(which)))
        return self.expert(int(which))

    def expert(self, which: int) -> PackedWeight:
        """Of one expert."""
        return PackedWeight([(blocks.expert(which), place) for blocks, place in self.parts], self.device, self.dtype)

    def in_turn(self) -> Iterator[tuple[slice | torch.Tensor, torch.Tensor]]:
        """All rows, some at a time: which, and their numbers."""
        at_once = max(1, ELEMENTS_AT_ONCE[self.device.type] // self.columns)
        for blocks, place in self.parts:
            for first in range(0, blocks.rows_count, at_once):
                which = slice(first, min(first + at_once, blocks.rows_count))
                yield place.at(which), place.in_columns(blocks.rows(which, self.device, self.dtype))

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """(…,) numbers of rows → (…, columns)."""
        ((blocks, place),) = self.parts
        which = ids.flatten().to(blocks.data.device)
        rows = place.in_columns(blocks.rows(which if place.rows is None else place.rows.argsort()[which], self.device, self.dtype))
        return rows.reshape(*ids.shape, self.columns)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if name not in cls.COMPUTED:
            raise NotImplementedError(f"packed weights are not computed with by {name}")
        return cls.COMPUTED[name](*args, **(kwargs or {}))


def _linear(given: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    flat = given.to(weight.dtype).reshape(-1, weight.columns)
    found: torch.Tensor = _through().apply(flat, weight).reshape(*given.shape[:-1], -1)
    return found if bias is None else found + bias.to(found.dtype)


def _embedding(ids: torch.Tensor, weight: PackedWeight, *_: Any, **__: Any) -> torch.Tensor:
    return weight.look_up(ids)


PackedWeight.COMPUTED.update(linear=_linear, embedding=_embedding)


@cache
def _through() -> Any:
    """(tokens, columns) through a packed weight: (tokens, rows); the weight is dequantised again for the gradient, and has none."""
    import torch

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, given: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
            context.weight = weight
            found = given.new_empty(len(given), weight.shape[0])
            for which, rows in weight.in_turn():
                found[:, which] = given @ rows.T
            return found

        @staticmethod
        def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
            (gradient,) = gradients
            found = torch.zeros(len(gradient), context.weight.columns, device=gradient.device)  # float32: a head is hundreds of pieces
            for which, rows in context.weight.in_turn():
                found += gradient[:, which] @ rows
            return found.to(gradient.dtype), None

    return Through


def dequantise(data: torch.Tensor, kind: int) -> torch.Tensor:
    """(rows, bytes of a row) of a GGUF type → (rows, columns) in float32, where the bytes are.

    By transformers; by ftkit what that leaves out and llama-quantize falls back to; what both leave out by gguf, on the CPU.
    """
    import gguf
    import torch
    from transformers.integrations.gguf.dequant import GGML_BLOCK
    from transformers.integrations.gguf.dequant import dequantize as by_transformers

    name = gguf.GGMLQuantizationType(kind).name
    if name in ("F32", "F16", "BF16"):
        return data.view({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]).float()
    if kind in GGML_BLOCK:
        found: torch.Tensor = by_transformers(data.contiguous(), kind).reshape(len(data), -1)
        return found
    if name in ("Q5_0", "Q5_1"):
        return _five_bits(data, with_minimum=name == "Q5_1")
    return torch.from_numpy(gguf.dequantize(data.cpu().numpy(), gguf.GGMLQuantizationType(kind))).to(data.device)


def _five_bits(data: torch.Tensor, *, with_minimum: bool) -> torch.Tensor:
    """Q5_0 and Q5_1: of 32 numbers a scale (and their minimum) in float16, their fifth bits, and four bits of each (gguf/quants.py)."""
    import torch

    before = 4 if with_minimum else 2
    blocks = data.reshape(-1, before + 20)
    halves, fours = blocks[:, :before].contiguous().view(torch.float16).float(), blocks[:, before + 4 :]
    bits = _fifths(data.device)[blocks[:, before : before + 4].int()].reshape(-1, 32)
    numbers = torch.cat([fours & 15, fours >> 4], -1).add_(bits).float()
    found = numbers.mul_(halves[:, :1]).add_(halves[:, 1:]) if with_minimum else numbers.sub_(16).mul_(halves[:, :1])
    return found.reshape(len(data), -1)


@cache
def _fifths(device: torch.device) -> torch.Tensor:
    """(256, 8): of each byte its bits, the lowest first, as the fifth ones of numbers."""
    import torch

    return (torch.arange(256)[:, None] >> torch.arange(8) & 1).mul(16).to(device, torch.uint8)

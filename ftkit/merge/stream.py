"""Adapter + 16-bit base → merged 16-bit model, some rows at a time."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from ftkit.errors import ModelError
from ftkit.merge.deltas import Delta, deltas_of
from ftkit.model.source import drop_code, header, weight_files
from ftkit.progress import SILENT, Reporter

if TYPE_CHECKING:
    import torch


Base = Literal["source", "dequantised"]
ROWS_ELEMENTS = 1 << 20  # numbers that are changed at once: few enough to stay in a processor's cache
LEAST_ROWS = 256  # and no fewer rows: a few are multiplied by other kernels, which round otherwise than those of the whole
AT_ONCE_BYTES = 1 << 18  # read or written by one call; with 8 MB, or begun within a page, writing took two to five times as long


@dataclass(frozen=True)
class MergeResult:
    base: Base
    merged_tensors: int  # of the checkpoint
    tensors: int
    bytes_written: int


def merge(
    base: Path,
    adapter: Path,
    folder: Path,
    *,
    onto: Base = "source",
    bfloat16: bool = True,
    with_code: bool = False,
    reporter: Reporter = SILENT,
) -> MergeResult:
    """Write `folder`: the model of `base` with the adapter merged in, config and tokenizer beside it.

    W + delta in float32 with PEFT's own delta of each layer, rounded once to the 16-bit dtype of the source; this equals
    PEFT's merge on a float32 base bit for bit. Other tensors, and their order in the files, stay byte for byte.
    Some rows are held at a time, and the adapter: each file is read once and written once, from its beginning to its end.
    `onto="dequantised"` first passes each W that was in 4 bits through NF4 and back, as the adapter saw it in training
    (`bfloat16` says in which format it was quantised), and holds such a W whole (of experts in one weight, all of a layer).
    Python code of the base is taken along `with_code` alone: without it no config names any, so that no program looks for it.
    Raises ModelError where the adapter uses what this merge does not do or fits no tensor of the base, and where a file of the
    base is cut short.
    """
    deltas = {delta.tensor: delta for delta in deltas_of(base, adapter, trust_remote_code=with_code)}
    files = {shard: sorted(header(shard).items(), key=lambda entry: int(entry[1]["begin"])) for shard in weight_files(base)}
    quantised = _Quantised(files, deltas, bfloat16) if onto == "dequantised" else None
    done, written = 0, 0
    with reporter.bar("merging", len(deltas)) as bar:
        for shard, entries in files.items():
            with open(shard, "rb") as source, open(folder / shard.name, "wb", buffering=2 * AT_ONCE_BYTES) as out:
                for name, entry in entries:
                    if name in deltas:
                        _copy(source, out, entry["begin"] - source.tell())
                        whole = quantised.restored(deltas[name]) if quantised and deltas[name].quantized else None
                        _add(deltas[name], entry["dtype"], source, out, whole)
                        done += 1
                        bar.update(done)
                _copy(source, out, shard.stat().st_size - source.tell())
                written += out.tell()
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt", *([".py"] if with_code else [])) and file.is_file():
            shutil.copyfile(file, folder / file.name)
    if not with_code:
        drop_code(folder)
    return MergeResult(onto, done, sum(map(len, files.values())), written)


def _copy(source: BinaryIO, out: BinaryIO, size_bytes: int) -> None:
    """What follows in one file, into another."""
    part = memoryview(bytearray(min(size_bytes, AT_ONCE_BYTES)))
    for begin in range(0, size_bytes, AT_ONCE_BYTES):
        piece = part[: size_bytes - begin]
        _read(source, piece)
        out.write(piece)


def _read(source: BinaryIO, into: memoryview) -> None:
    """Fill `into` with what follows. Raises ModelError where the file ends before."""
    for begin in range(0, len(into), AT_ONCE_BYTES):
        piece = into[begin : begin + AT_ONCE_BYTES]
        if source.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise _cut_short(source)


def _write(out: BinaryIO, data: memoryview) -> None:
    for begin in range(0, len(data), AT_ONCE_BYTES):
        out.write(data[begin : begin + AT_ONCE_BYTES])


def _cut_short(source: BinaryIO) -> ModelError:
    return ModelError(f"{source.name} ends before its last tensor.", "fetch or copy the model again, whole")


def _add(delta: Delta, dtype: str, source: BinaryIO, out: BinaryIO, whole: torch.Tensor | None) -> None:
    """Write the tensor that begins here in the source, changed. `whole`: what is there in its place, in the tensor's shape."""
    import torch

    kind, columns, done = _dtype(dtype, source), delta.shape[-1], 0
    at_once = max(LEAST_ROWS, ROWS_ELEMENTS // columns)
    most = min(delta.rows.shape[1] if not delta.transposed else delta.shape[-2], 2 * at_once)
    read, product, summed = bytearray(most * columns * kind.itemsize), torch.empty(most, columns), torch.empty(most, columns, dtype=kind)
    for left, right in delta.matrices():
        begin = 0
        while begin < len(left):
            rows = at_once if len(left) - begin >= 2 * at_once else len(left) - begin
            part = memoryview(read)[: rows * columns * kind.itemsize]
            _read(source, part)
            there = torch.frombuffer(part, dtype=kind).view(rows, columns) if whole is None else whole[done : done + rows]
            torch.mm(left[begin : begin + rows], right, out=product[:rows]).mul_(delta.factors.scaling)
            summed[:rows].copy_(product[:rows].add_(there))
            _write(out, summed[:rows].view(torch.uint8).flatten().numpy().data)
            begin, done = begin + rows, done + rows


def _dtype(name: str, source: BinaryIO) -> torch.dtype:
    """Of a tensor in a safetensors file. Raises ModelError for what is no plain number of 16 bits or more."""
    import torch

    known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    if name not in known:
        raise ModelError(
            f"{source.name} holds weights in {name}, to which nothing can be added.", "give the 16-bit model that it was made from"
        )
    return known[name]


class _Quantised:
    """The weights of a base as 4-bit loading gives them back, each held until its last tensor is written."""

    def __init__(self, files: Mapping[Path, Sequence[tuple[str, Any]]], deltas: Mapping[str, Delta], bfloat16: bool) -> None:
        self._files = {name: shard for shard, entries in files.items() for name, _ in entries}
        self._deltas, self._bfloat16 = deltas, bfloat16
        self._held: dict[str, torch.Tensor] = {}  # weights of the model, restored
        self._left = Counter(delta.parameter for delta in deltas.values())  # tensors of each that are still to come

    def restored(self, delta: Delta) -> torch.Tensor:
        """The tensor, its rows under one another. A weight that several tensors hold was quantised as one."""
        import torch

        if delta.parameter not in self._held:
            self._held[delta.parameter] = _through_nf4(self._whole(delta.parameter))
        matrices = [self._held[delta.parameter][numbers] for numbers in delta.rows]
        self._left[delta.parameter] -= 1
        if not self._left[delta.parameter]:
            del self._held[delta.parameter]
        rows = [matrix.T if delta.transposed else matrix for matrix in matrices]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _whole(self, parameter: str) -> torch.Tensor:
        """A weight of the model, its rows under one another, in the format in which it is quantised."""
        import torch
        from safetensors import safe_open

        parts = [delta for delta in self._deltas.values() if delta.parameter == parameter]
        weight: torch.Tensor | None = None
        for delta in parts:
            with safe_open(self._files[delta.tensor], framework="pt") as file:
                tensor = file.get_tensor(delta.tensor).to(torch.bfloat16 if self._bfloat16 else torch.float32)
            matrices = tensor.reshape(len(delta.rows), -1, delta.shape[-1])
            matrices = matrices.transpose(1, 2) if delta.transposed else matrices
            if weight is None:
                weight = tensor.new_empty(sum(part.rows.numel() for part in parts), matrices.shape[-1])
            weight[delta.rows.flatten()] = matrices.reshape(-1, matrices.shape[-1])
        assert weight is not None
        return weight


def _through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a 4-bit layer gives it back: NF4 with double quantisation, computed in its own format."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored

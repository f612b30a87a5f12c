"""Adapter + 16-bit base → merged 16-bit model, some rows at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from ftkit.errors import ModelError
from ftkit.merge.deltas import Delta, changes_of
from ftkit.model.given import tokenizer_files
from ftkit.model.source import INDEX, drop_code, header, weight_files
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import Dtype

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
    dtype: Dtype = "bfloat16",
    with_code: bool = False,
    reporter: Reporter = SILENT,
) -> MergeResult:
    """Write `folder`: the model of `base` with the adapter merged in, config and tokenizer beside it.

    In float32 with PEFT's own delta of each layer, rounded once to the dtype of the source; this equals PEFT's merge on a float32
    base bit for bit, but for DoRA's norms over columns, which are summed in another order. Other tensors, and their order in the
    files, stay byte for byte. An embedding and a head that the adapter makes two of one become two; one of more tokens brings the
    adapter's tokenizer with it. Config and index say so, and are the source's otherwise.
    Some rows are held at a time, and the adapter: each file is read once and written once, from its beginning to its end.
    `onto="dequantised"` first passes each W that was in 4 bits through NF4 and back, as the adapter saw it in training
    (`dtype` says in which format it was quantised), and holds such a W whole (of experts in one weight, all of a layer).
    Python code of the base is taken along `with_code` alone: without it no config names any, so that no program looks for it.
    Raises ModelError where the adapter uses what this merge does not do or fits no tensor of the base, where a file of the
    base is cut short, and where a number of the result would be none.
    """
    changes = changes_of(base, adapter, trust_remote_code=with_code)
    deltas = changes.deltas
    tokenizer = _tokenizer_files(adapter) if "vocab_size" in changes.config else []
    files = {shard: sorted(header(shard).items(), key=lambda entry: int(entry[1]["begin"])) for shard in weight_files(base)}
    quantised = _Quantised(files, deltas, dtype) if onto == "dequantised" else None
    done, written, added = 0, 0, dict[str, str]()
    with reporter.bar("merging", len(deltas)) as bar:
        for shard, entries in files.items():
            here, size = dict(entries), shard.stat().st_size
            own = [deltas[name] for name in here if name in deltas]
            new = [delta for delta in deltas.values() if delta.tensor not in here and delta.source in here]  # a head that was tied
            added |= dict.fromkeys((delta.tensor for delta in new), shard.name)
            with open(shard, "rb") as source, open(folder / shard.name, "wb", buffering=2 * AT_ONCE_BYTES) as out:
                if new or any(list(delta.stored) != here[delta.tensor]["shape"] for delta in own):
                    out.write(_header(source, deltas, new))
                for delta in [*own, *new]:
                    entry = here[delta.source]
                    _copy(source, out, (entry["begin"] if delta.tensor in here else size) - source.tell())
                    source.seek(entry["begin"])
                    whole = quantised.restored(delta) if quantised and delta.quantized else None
                    _change(delta, entry["dtype"], source, out, whole)
                    source.seek(entry["end"] if delta.tensor in here else size)
                    done += 1
                    bar.update(done)
                _copy(source, out, size - source.tell())
                written += out.tell()
    for file in [*base.iterdir(), *tokenizer]:
        if file.suffix in (".json", ".jinja", ".model", ".txt", *([".py"] if with_code else [])) and file.is_file():
            shutil.copyfile(file, folder / file.name)
    if changes.config:
        _settle(folder, changes.config, added)
    if not with_code:
        drop_code(folder)
    return MergeResult(onto, done, sum(map(len, files.values())) + len(added), written)


def _tokenizer_files(adapter: Path) -> list[Path]:
    """Those beside an adapter that has other tokens than its base. Raises ModelError where there are none."""
    if not (found := tokenizer_files(adapter)):
        raise ModelError(
            f"The adapter in {adapter} has other tokens than the base, and no tokenizer beside it that says which.",
            "save it there too: tokenizer.save_pretrained(FOLDER)",
        )
    return found


def _header(source: BinaryIO, deltas: Mapping[str, Delta], new: Sequence[Delta]) -> bytes:
    """A safetensors file's header with the shapes of what is written; the source stands behind its own then."""
    length = int.from_bytes(source.read(8), "little")
    there = json.loads(source.read(length))
    tensors = sorted((name for name in there if name != "__metadata__"), key=lambda name: there[name]["data_offsets"])
    end, entries = 0, {"__metadata__": there["__metadata__"]} if "__metadata__" in there else {}
    for name in [*tensors, *(delta.tensor for delta in new)]:
        entry = there[deltas[name].source if name in deltas else name]
        begin, size = end, entry["data_offsets"][1] - entry["data_offsets"][0]
        shape = list(deltas[name].stored) if name in deltas else entry["shape"]
        end += size // max(1, math.prod(entry["shape"])) * math.prod(shape) if name in deltas else size
        entries[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [begin, end]}
    written = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written


def _settle(folder: Path, changed: Mapping[str, Any], added: Mapping[str, str]) -> None:
    """Have config and index say what is other than in the source."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {key: value for key, value in changed.items() if key in config or key == "tie_word_embeddings"}
    if text := config.get("text_config"):
        text |= {key: value for key, value in changed.items() if key in text}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (path := folder / INDEX).is_file():
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] |= added
        if "total_size" in index.get("metadata", {}):
            entries = [entry for shard in weight_files(folder) for entry in header(shard).values()]
            index["metadata"]["total_size"] = sum(entry["end"] - entry["begin"] for entry in entries)
        path.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _change(delta: Delta, dtype: str, source: BinaryIO, out: BinaryIO, whole: torch.Tensor | None) -> None:
    """Write the tensor that begins here in the source, changed. `whole`: what is there in its place, in the tensor's shape."""
    import torch

    kind = _dtype(dtype, source)
    scale, tokens = _lengths(delta, kind, source, whole), _tokens(delta)
    rounded: torch.Tensor | None = None
    for matrix, first, part in _rows(delta, kind, source, whole):
        if scale:
            scale(matrix, first, part)
        if tokens:
            tokens(matrix, first, part)
        if rounded is None or len(rounded) < len(part):
            rounded = torch.empty(len(part), part.shape[1], dtype=kind)
        written = rounded[: len(part)].copy_(part)
        if not math.isfinite(written.sum(dtype=torch.float32 if kind == torch.float16 else None)):  # one that is none makes all none
            raise ModelError(
                f"Merged, {delta.tensor} would hold NaN or Inf.",
                "take an earlier checkpoint of the adapter: its numbers are too large; or copy the base again: it may be damaged",
            )
        _write(out, written.view(torch.uint8).flatten().numpy().data)


def _rows(delta: Delta, kind: torch.dtype, source: BinaryIO, whole: torch.Tensor | None) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(matrix, first row in it, rows): W + delta in float32, some rows at a time, each valid until the next."""
    import torch

    columns, done = delta.shape[-1], 0
    height = delta.shape[-2] if delta.transposed else delta.rows.shape[1]
    at_once = max(LEAST_ROWS, ROWS_ELEMENTS // columns)
    most = min(height, 2 * at_once)
    read, product = bytearray(most * columns * kind.itemsize), torch.empty(most, columns)
    for matrix, numbers in enumerate(delta.rows):
        factors, begin = delta.factors(numbers), 0
        while begin < height:
            rows = at_once if height - begin >= 2 * at_once else height - begin
            there = delta.instead(numbers, begin, begin + rows)
            if there is None or delta.copied:
                part = memoryview(read)[: rows * columns * kind.itemsize]
                _read(source, part)
                own = torch.frombuffer(part, dtype=kind).view(rows, columns) if whole is None else whole[done : done + rows]
                there = own if there is None else torch.where((own.to(there.dtype) == there).all(1, keepdim=True), own, there)
            if factors:
                left, right, scaling = factors
                torch.mm(left[begin : begin + rows], right, out=product[:rows]).mul_(scaling).add_(there)
            else:
                product[:rows].copy_(there)
            yield matrix, begin, product[:rows]
            begin, done = begin + rows, done + rows


Part = Callable[[int, int, "torch.Tensor"], None]  # changes rows in place: number of the matrix, of its first row, the rows in float32


def _lengths(delta: Delta, kind: torch.dtype, source: BinaryIO, whole: torch.Tensor | None) -> Part | None:
    """What gives W + delta the lengths m that DoRA trained: m / ‖W + delta‖ × (W + delta), as PEFT (tuners/lora/variants.py).

    Lengths of columns, as they are stored, are known behind the last row alone: then all rows are read twice.
    """
    import torch

    if not delta.change.factors or (magnitude := delta.change.factors.magnitude) is None:
        return None
    if delta.change.factors.of_columns == delta.transposed:

        def rows(matrix: int, first: int, part: torch.Tensor) -> None:
            last = first + len(part)
            wanted = magnitude[first:last] if delta.transposed else magnitude[delta.rows[matrix, first:last]]
            part.mul_((wanted / torch.linalg.norm(part, dim=1))[:, None])

        return rows
    begin, squares = source.tell(), torch.zeros(len(delta.rows), delta.shape[-1], dtype=torch.float64)
    for matrix, _, part in _rows(delta, kind, source, whole):
        squares[matrix] += part.double().square_().sum(0)
    source.seek(begin)
    scale = (magnitude[delta.rows] if delta.transposed else magnitude) / squares.sqrt_().float()

    def columns(matrix: int, first: int, part: torch.Tensor) -> None:
        part.mul_(scale[matrix])

    return columns


def _tokens(delta: Delta) -> Part | None:
    """What puts trained rows in their places."""
    import torch

    tokens, trained = delta.change.tokens, delta.change.trained
    if tokens is None or trained is None:
        return None
    which = torch.full((delta.rows.numel(),), -1)  # of the trained rows, for each of the weight's
    which[tokens] = torch.arange(len(tokens))
    places = which[delta.rows]  # (matrices, rows)

    def put(matrix: int, first: int, part: torch.Tensor) -> None:
        last = first + len(part)
        at = places[matrix] if delta.transposed else places[matrix, first:last]
        if delta.transposed:
            part[:, at >= 0] = trained[at[at >= 0], first:last].T.float()
        else:
            part[at >= 0] = trained[at[at >= 0]].float()

    return put


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

    def __init__(self, files: Mapping[Path, Sequence[tuple[str, Any]]], deltas: Mapping[str, Delta], dtype: Dtype) -> None:
        self._files = {name: shard for shard, entries in files.items() for name, _ in entries}
        self._deltas, self._dtype = deltas, dtype
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
                tensor = file.get_tensor(delta.tensor).to(getattr(torch, self._dtype))
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

"""Adapter + 16-bit base → merged 16-bit model, some rows at a time."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from ftkit.errors import ModelError
from ftkit.merge.deltas import Delta, changes_of
from ftkit.model.four_bits import partly_rounded
from ftkit.model.given import tokenizer_files
from ftkit.model.rounding import round_by_chance
from ftkit.model.source import DTYPES, INDEX, Shard, drop_code, header, shards_of, weight_files
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import Dtype

if TYPE_CHECKING:
    import torch


ROWS_ELEMENTS = 1 << 20  # numbers of A × B that are computed at once
LEAST_ROWS = 256  # and no fewer rows: a few are multiplied by other kernels, which round otherwise than those of the whole
AT_ONCE_ELEMENTS = 1 << 17  # that are added and rounded at once: few enough to stay in a processor's cache
AT_ONCE_BYTES = 1 << 18  # read or written by one call; with some MB, writing took up to ten times as long
COPY_BYTES = 1 << 26  # of what no adapter changes, that are copied as one part
THREADS = 2  # one computes while the other waits for the disk; each holds some tens of MB
NOT_IN_SYSTEM = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class MergeResult:
    merged_tensors: int  # of the checkpoint
    tensors: int
    bytes_written: int


def merge(
    base: Path,
    adapter: Path,
    folder: Path,
    *,
    rounding: float = 0.0,
    dtype: Dtype = "bfloat16",
    by_chance: bool = True,
    with_code: bool = False,
    shards: Sequence[Shard] | None = None,
    fetch: Callable[[str], Path] | None = None,
    reporter: Reporter = SILENT,
) -> MergeResult:
    """Write `folder`: the model of `base` with the adapter merged in, config and tokenizer beside it.

    In float32 with PEFT's own delta of each layer; this equals PEFT's merge on a float32 base bit for bit, but for DoRA's norms over
    columns, which are summed in another order. It is rounded once to the dtype of the source, `by_chance` or to the nearest, which loses
    small changes (model/rounding.py). Other tensors, and their order in the files, stay byte for byte. An embedding and a head that the
    adapter makes two of one become two; one of more tokens brings the adapter's tokenizer with it. Config and index say so, and are the
    source's otherwise.
    Some rows are held at a time, and the adapter: each file is read once and written once, parts of it side by side by some threads.
    `rounding`: the share, from 0 to 1, of what 4 bits had changed in training that stays in each W which was in 4 bits then, also in
    those without an adapter: with 1 it is what the adapter saw there (`dtype` says in which format it was quantised). Such a W is held
    whole, of experts in one weight all of a layer.
    Of `shards` – the base's weight files, where they are not all in its folder – one that is not here comes by `fetch`, when its turn
    is, and is removed once it is merged; with that it has its name in `folder`, and is not fetched again when the merge was interrupted.
    Python code of the base is taken along `with_code` alone: without it no config names any, so that no program looks for it.
    Raises ModelError where the adapter uses what this merge does not do or fits no tensor of the base, where a file of the
    base is cut short, and where a number of the result would be none.
    """
    shards = shards or shards_of(base)
    shapes = {name: shape for shard in shards for name, shape in shard.shapes.items()}
    changes = changes_of(base, adapter, shapes, rounded=rounding > 0, trust_remote_code=with_code)
    deltas = changes.deltas
    tokenizer = _tokenizer_files(adapter) if "vocab_size" in changes.config else []
    quantised = _Quantised(shards, deltas, dtype, rounding) if rounding else None
    threads = 1 if quantised else THREADS  # several would hold a whole W each
    done, written, added = 0, 0, dict[str, str]()
    with reporter.bar("merging", len(deltas)) as bar, _threads(threads, changes.let_go) as (pool, after_each):
        for shard in shards:
            own = [deltas[name] for name in shard.shapes if name in deltas]
            new = [delta for delta in deltas.values() if delta.tensor not in shard.shapes and delta.source in shard.shapes]  # a tied head
            added |= dict.fromkeys((delta.tensor for delta in new), shard.name)
            target, partial = folder / shard.name, folder / f".{shard.name}.partial"
            if shard.path or not target.is_file():
                assert shard.path or fetch
                path = shard.path or fetch(shard.name)  # type: ignore[misc]
                parts = _parts(path, partial, own, new, deltas)
                begun = [(part, pool.submit(_write_part, part, path, partial, quantised, by_chance, after_each)) for part in parts]
                for part, end in begun:
                    end.result()
                    done += part.delta is not None
                    bar.update(done)
                if not shard.path:
                    with open(partial, "r+b") as out:
                        os.fsync(out.fileno())  # then its name says that it need not be fetched again
                partial.replace(target)
                if not shard.path:
                    path.unlink()
            else:
                done += len(own) + len(new)
            bar.update(done)
            written += target.stat().st_size
    for file in [*base.iterdir(), *tokenizer]:
        if file.suffix in (".json", ".jinja", ".model", ".txt", *([".py"] if with_code else [])) and file.is_file():
            shutil.copyfile(file, folder / file.name)
    if changes.config:
        _settle(folder, changes.config, added)
    if not with_code:
        drop_code(folder)
    return MergeResult(done, len(shapes) + len(added), written)


@contextmanager
def _threads(count: int, let_go: Callable[[], None]) -> Iterator[tuple[Executor, Callable[[], None]]]:
    """Threads for the parts, and what each calls after some rows: once one failed, or on Ctrl-C, it ends them.

    Several compute on one core each: torch's own threads would take longer over some rows, waiting for each other, than one does.
    """
    import torch

    own, stopped = torch.get_num_threads(), Event()

    def after_each() -> None:
        let_go()
        if stopped.is_set():
            raise CancelledError

    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1 if count > 1 else own,))
    try:
        yield pool, after_each
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(own)


@dataclass(frozen=True)
class _Part:
    """Of a merged file: a tensor that is changed, or bytes that are as in the source."""

    begin: int  # in the source
    at: int  # in the merged file
    size_bytes: int  # there
    delta: Delta | None = None
    dtype: str = ""


def _parts(source: Path, out: Path, own: Sequence[Delta], new: Sequence[Delta], deltas: Mapping[str, Delta]) -> list[_Part]:
    """What a file of the source is written once more as; where its header becomes another, that is written here already."""
    entries, size = header(source), source.stat().st_size
    own = sorted(own, key=lambda delta: int(entries[delta.tensor]["begin"]))
    other = new or any(list(delta.stored) != entries[delta.tensor]["shape"] for delta in own)
    begin, written = _header(source, deltas, new) if other else (0, b"")
    at, parts = out.write_bytes(written), list[_Part]()

    def copy(end: int) -> None:
        nonlocal begin, at
        while begin < end:
            parts.append(_Part(begin, at, min(end - begin, COPY_BYTES)))
            begin, at = begin + parts[-1].size_bytes, at + parts[-1].size_bytes

    for delta in [*own, *new]:
        entry, in_place = entries[delta.source], delta.tensor in entries
        copy(entry["begin"] if in_place else size)
        parts.append(_Part(entry["begin"], at, _size_bytes(entry, delta.stored), delta, entry["dtype"]))
        begin, at = entry["end"] if in_place else size, at + parts[-1].size_bytes
    copy(size)
    return parts


def _write_part(
    part: _Part, source: Path, out: Path, quantised: _Quantised | None, by_chance: bool, after_each: Callable[[], None]
) -> None:
    """By files that it opens for itself, and so stands in where nobody else does."""
    with open(source, "rb", buffering=0) as read, open(out, "r+b", buffering=0) as written:
        read.seek(part.begin)
        written.seek(part.at)
        if part.delta:
            whole = quantised.restored(part.delta) if quantised and part.delta.quantized else None
            _change(part.delta, part.dtype, read, written, whole, by_chance, after_each)
        else:
            _copy(read, written, part.size_bytes)


def _tokenizer_files(adapter: Path) -> list[Path]:
    """Those beside an adapter that has other tokens than its base. Raises ModelError where there are none."""
    if not (found := tokenizer_files(adapter)):
        raise ModelError(
            f"The adapter in {adapter} has other tokens than the base, and no tokenizer beside it that says which.",
            "save it there too: tokenizer.save_pretrained(FOLDER)",
        )
    return found


def _header(source: Path, deltas: Mapping[str, Delta], new: Sequence[Delta]) -> tuple[int, bytes]:
    """A safetensors file's header with the shapes of what is written; and how long the source's own is."""
    with open(source, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        there = json.loads(file.read(length))
    tensors = sorted((name for name in there if name != "__metadata__"), key=lambda name: there[name]["data_offsets"])
    end, entries = 0, {"__metadata__": there["__metadata__"]} if "__metadata__" in there else {}
    for name in [*tensors, *(delta.tensor for delta in new)]:
        entry = there[deltas[name].source if name in deltas else name]
        shape = list(deltas[name].stored) if name in deltas else entry["shape"]
        begin, end = end, end + _size_bytes(entry, shape)
        entries[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [begin, end]}
    written = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    return 8 + length, len(written).to_bytes(8, "little") + written


def _size_bytes(entry: Mapping[str, Any], shape: Sequence[int]) -> int:
    """Of a tensor in a safetensors file, were it of this shape."""
    begin, end = entry["data_offsets"]
    return int(end - begin if list(shape) == entry["shape"] else (end - begin) // max(1, math.prod(entry["shape"])) * math.prod(shape))


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


def _copy(source: FileIO, out: FileIO, size_bytes: int) -> None:
    """What follows in one file, into another: by the system itself where it can."""
    size_bytes -= _copy_in_system(source, out, size_bytes)
    part = memoryview(bytearray(min(size_bytes, AT_ONCE_BYTES)))
    for begin in range(0, size_bytes, AT_ONCE_BYTES):
        piece = part[: size_bytes - begin]
        _read(source, piece)
        _write(out, piece)


def _copy_in_system(source: FileIO, out: FileIO, size_bytes: int) -> int:
    """Bytes that were copied; none of a few, nor where the system has no such call or not for these two files."""
    if size_bytes < 2 * AT_ONCE_BYTES or not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < size_bytes:
        try:
            copied = os.copy_file_range(source.fileno(), out.fileno(), size_bytes - done)
        except OSError as error:
            if error.errno not in NOT_IN_SYSTEM:
                raise
            break
        if not copied:
            raise _cut_short(source)
        done += copied
    return done


def _read(source: FileIO, into: memoryview) -> None:
    """Fill `into` with what follows. Raises ModelError where the file ends before."""
    done = 0
    while done < len(into):
        if not (read := source.readinto(into[done : done + AT_ONCE_BYTES])):
            raise _cut_short(source)
        done += read


def _write(out: FileIO, piece: memoryview) -> None:
    """All of it. What begins within a page goes to the end of that first: else all pages take a third longer."""
    while piece:
        within = out.tell() % mmap.PAGESIZE
        piece = piece[out.write(piece[: mmap.PAGESIZE - within] if within else piece) :]


def _cut_short(source: FileIO) -> ModelError:
    return ModelError(f"{source.name} ends before its last tensor.", "fetch or copy the model again, whole")


def _change(
    delta: Delta, dtype: str, source: FileIO, out: FileIO, whole: torch.Tensor | None, by_chance: bool, after_each: Callable[[], None]
) -> None:
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
            rounded = torch.empty(part.shape, dtype=kind)
        finite = math.isfinite(part.sum())  # one that is none makes all none
        if by_chance and finite:
            round_by_chance(part, kind, f"{delta.tensor} {matrix} {first}")
        written = rounded[: len(part)].copy_(part)
        if not finite or not math.isfinite(written.sum(dtype=torch.float32 if kind == torch.float16 else None)):
            raise ModelError(
                f"Merged, {delta.tensor} would hold NaN or Inf.",
                "take an earlier checkpoint of the adapter: its numbers are too large; or copy the base again: it may be damaged",
            )
        _write(out, written.view(torch.uint8).flatten().numpy().data)
        after_each()


def _rows(delta: Delta, kind: torch.dtype, source: FileIO, whole: torch.Tensor | None) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(matrix, first row in it, rows): W + delta in float32, some rows at a time, each valid until the next."""
    import torch

    columns, done = delta.shape[-1], 0  # rows
    height = delta.shape[-2] if delta.transposed else delta.rows.shape[1]
    at_once = max(LEAST_ROWS, ROWS_ELEMENTS // columns)
    most = min(height, 2 * at_once)
    few = max(1, AT_ONCE_ELEMENTS // columns)
    read, product = bytearray(few * columns * kind.itemsize), torch.empty(most, columns)
    for matrix, numbers in enumerate(delta.rows):
        factors, begin = delta.factors(numbers), 0
        while begin < height:
            rows = at_once if height - begin >= 2 * at_once else height - begin
            if factors:
                left, right, scaling = factors
                torch.mm(left[begin : begin + rows], right, out=product[:rows])
            for first in range(0, rows, few):
                last = min(rows, first + few)
                there = delta.instead(numbers, begin + first, begin + last)
                if there is None or delta.copied:
                    part = memoryview(read)[: (last - first) * columns * kind.itemsize]
                    _read(source, part)
                    own = torch.frombuffer(part, dtype=kind).view(-1, columns) if whole is None else whole[done + first : done + last]
                    there = own if there is None else torch.where((own.to(there.dtype) == there).all(1, keepdim=True), own, there)
                if factors:
                    product[first:last].mul_(scaling).add_(there)
                else:
                    product[first:last].copy_(there)
                yield matrix, begin + first, product[first:last]
            begin, done = begin + rows, done + rows


Part = Callable[[int, int, "torch.Tensor"], None]  # changes rows in place: number of the matrix, of its first row, the rows in float32


def _lengths(delta: Delta, kind: torch.dtype, source: FileIO, whole: torch.Tensor | None) -> Part | None:
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


def _dtype(name: str, source: FileIO) -> torch.dtype:
    """Of a tensor in a safetensors file. Raises ModelError for what is no plain number of 16 bits or more."""
    import torch

    if name not in DTYPES:
        raise ModelError(
            f"{source.name} holds weights in {name}, to which nothing can be added.", "give the 16-bit model that it was made from"
        )
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


class _Quantised:
    """A base's weights with a share of what 4-bit loading changes in them, each held until its last tensor is written; for one thread."""

    def __init__(self, shards: Sequence[Shard], deltas: Mapping[str, Delta], dtype: Dtype, share: float) -> None:
        """Of shards that are all here: a weight may stand in several."""
        self._files = {name: shard.path for shard in shards if shard.path for name in shard.shapes}
        self._deltas, self._dtype, self._share = deltas, dtype, share
        self._held: dict[str, torch.Tensor] = {}  # weights of the model, restored
        self._left = Counter(delta.parameter for delta in deltas.values())  # tensors of each that are still to come

    def restored(self, delta: Delta) -> torch.Tensor:
        """The tensor, its rows under one another. A weight that several tensors hold was quantised as one."""
        import torch

        if delta.parameter not in self._held:
            self._held[delta.parameter] = partly_rounded(self._whole(delta.parameter), self._share)
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

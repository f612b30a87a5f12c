"""Rows and tokens in files, so that two million of them need little more memory than two."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, overload

from ftkit.data.rows import Example, Pair, Row
from ftkit.files import cache_folder

IN_MEMORY_BYTES = 64 << 20  # of rows; more of them go into a file without a name
EXAMPLES_WRITTEN_TOGETHER = 1000
E = TypeVar("E", Example, Pair)


class _Lines:
    """A file of JSON lines without a name, which is gone with the last that reads it."""

    def __init__(self) -> None:
        place = str(cache_folder()) if cache_folder().is_dir() else None  # a system's own folder for such files may be memory
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, dir=place)  # noqa: SIM115 – closed below

    def add(self, value: Any) -> int:
        """Where it is from then on."""
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(value).encode() + b"\n")
        return offset

    def read(self, offset: int) -> Any:
        self._file.seek(offset)
        return json.loads(self._file.readline())

    def __del__(self) -> None:
        self._file.close()


class StoredRows(Sequence[Row]):
    """Rows as JSON lines, read when they are asked for; a slice and `take` are views of the same file."""

    def __init__(self, lines: _Lines, offsets: array[int]) -> None:
        self._lines, self._offsets = lines, offsets

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: int | slice) -> Row | StoredRows:
        found = self._offsets[index]
        return StoredRows(self._lines, found) if isinstance(found, array) else self._read(found)

    def __iter__(self) -> Iterator[Row]:
        return map(self._read, self._offsets)

    def take(self, indexes: Iterable[int]) -> StoredRows:
        """The rows with these indexes, in this order."""
        return StoredRows(self._lines, array("q", (self._offsets[index] for index in indexes)))

    def _read(self, offset: int) -> Row:
        messages, line, place, unlearnt, form, rejected, passed_over = self._lines.read(offset)
        return Row(tuple(messages), line, place, frozenset(unlearnt), form, rejected, tuple(passed_over))


def store_rows(rows: Iterable[Row]) -> StoredRows:
    """Keep rows, as they come."""
    lines = _Lines()
    values = ([row.messages, row.line, row.place, sorted(row.unlearnt), row.form, row.rejected, row.passed_over] for row in rows)
    return StoredRows(lines, array("q", map(lines.add, values)))


class _Writer:
    """An Arrow file that examples are written into, some together."""

    def __init__(self, path: Path, kind: type[Example | Pair]) -> None:
        import pyarrow as pa

        numbers = pa.list_(pa.int32())
        self._schema = pa.schema({each.name: numbers for each in fields(kind)})
        self._waiting: list[Example | Pair] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)

    def add(self, example: Example | Pair) -> None:
        self._waiting.append(example)
        if len(self._waiting) == EXAMPLES_WRITTEN_TOGETHER:
            self._write()

    def size_bytes(self) -> int:
        """What is in the file."""
        return int(self._file.tell())

    def close(self) -> None:
        try:
            self._write()
            self._stream.close()
        finally:
            self._file.close()

    def _write(self) -> None:
        import pyarrow as pa

        columns = {name: [getattr(example, name) for example in self._waiting] for name in self._schema.names}
        self._stream.write_batch(pa.RecordBatch.from_pydict(columns, self._schema))
        self._waiting = []


def store_examples(examples: Iterable[Example | Pair], path: Path, kind: type[Example | Pair] = Example) -> Any:
    """A `datasets.Dataset` with a column for each field, int32, mapped from an Arrow file at `path`, which is written anew."""
    with closing(_Writer(path, kind)) as writer:
        for example in examples:
            writer.add(example)
    return stored_examples(path)


def stored_examples(path: Path) -> Any:
    """The `datasets.Dataset` of a file that was written here."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


def storing(examples: Iterable[E], path: Path, kind: type[Example | Pair], max_length: int, most_bytes: int) -> Iterator[E]:
    """Examples as they come, which are written to `path` on the way, cut as training reads them.

    The file is left out where it would grow beyond `most_bytes`, or the disk refuses: whoever wants it writes it anew.
    """
    writer: _Writer | None = None

    def done(*, drop: bool) -> None:
        nonlocal writer
        if writer:
            ended, writer = writer, None
            try:
                ended.close()
            except OSError:
                drop = True
            if drop:
                path.unlink(missing_ok=True)

    with suppress(OSError):
        writer = _Writer(path, kind)
    whole = False
    try:
        for example in examples:
            if writer and (trained := example.cut(max_length)):
                try:
                    writer.add(trained)
                    full = writer.size_bytes() > most_bytes
                except OSError:
                    full = True
                if full:
                    done(drop=True)
            yield example
        whole = True
    finally:
        done(drop=not whole)


def token_counts(dataset: Any) -> list[int]:
    """Tokens of each row of a `datasets.Dataset`, without reading them; of a preference those of its longer answer, twice."""
    import pyarrow.compute as pc

    def lengths(column: str) -> list[int]:
        return [length for chunk in dataset.data.column(column).chunks for length in pc.list_value_length(chunk).to_pylist()]

    if "input_ids" in dataset.column_names:
        return lengths("input_ids")
    columns = (lengths(each.name) for each in fields(Pair))
    return [2 * (prompt + max(answers)) for prompt, *answers in zip(*columns, strict=True)]

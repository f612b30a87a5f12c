"""Files of rows → values, one at a time, each with its place: JSON lines, JSON, CSV, Parquet, packed or not."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import shlex
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ftkit.data.formats import FORMATS, form_of
from ftkit.errors import DataError, ToolMissingError

Place = str  # "line 3", "row 3"
FIELD_CHARACTERS = 1 << 30  # of a CSV's field
ENCODINGS = (  # by the first bytes, the longest first
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


class Fault(ValueError):
    """A row that cannot be read; those after it may be."""


def values(path: Path, *, class_names: bool = True) -> Iterator[tuple[int, Place, Any | Fault]]:
    """(number, place, value) of each row in a file; where it names a column's classes, with names for their numbers.

    Raises DataError where the file as a whole cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from _values(path, file, path.suffix.lower(), class_names)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        words = getattr(error, "strerror", None) or error
        raise DataError(f"Cannot read {path}: {words}.", "name the dataset's file, as in --set data.train=train.jsonl") from None


def _values(path: Path, file: IO[bytes], suffix: str, class_names: bool) -> Iterator[tuple[int, Place, Any]]:
    first = file.read(4)
    file.seek(0)
    if first == b"PAR1":
        yield from _parquet(path, file, class_names)
    elif first[:2] == b"\x1f\x8b":
        inner = Path(path.name.removesuffix(".gz").removesuffix(".GZ")).suffix.lower()
        with gzip.open(file) as unpacked:
            yield from _values(path, unpacked, inner, class_names)  # type: ignore[arg-type]
    elif first == b"PK\x03\x04":
        raise DataError(f"{path} is a zip archive (or a workbook).", "unpack it; of a workbook save a sheet as CSV UTF-8")
    elif suffix in (".csv", ".tsv"):
        with _text(file) as text:
            yield from _csv(path, text, "\t" if suffix == ".tsv" else None)
    else:
        with _text(file) as text:
            yield from _json(path, text)


def _text(file: IO[bytes]) -> io.TextIOWrapper:
    """UTF-8, or UTF-16 or UTF-32 where the first bytes say so, with line ends made one."""
    start = file.read(4)
    file.seek(0)
    encoding = next((name for bom, name in ENCODINGS if start.startswith(bom)), None) or json.detect_encoding(start or b"{}")
    return io.TextIOWrapper(file, encoding)


def _undecodable(path: Path, error: UnicodeError) -> DataError:
    """Where the first byte is that is no text."""
    encoding = str(getattr(error, "encoding", "utf-8"))
    if encoding.replace("_", "-").startswith("utf-8"):
        opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rb") as file:
            line = next((n for n, content in enumerate(file, 1) if _is_no_text(content)), 1)
        hint = f"if it is Latin-1: iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > fixed{path.suffix}"
        return DataError(f"{path}, line {line}: not UTF-8 text.", hint)
    return DataError(f"{path} begins as {encoding.upper()} text, and is not: {getattr(error, 'reason', error)}.", "write it as UTF-8")


def _is_no_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return True
    return False


def _json(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[int, Place, Any]]:
    """An object a line; or one JSON value over several lines: a list of objects, alone or as the one thing in an object."""
    before = 0  # blank lines
    try:
        for first in text:
            if first.strip():
                break
            before += 1
        else:
            return
        value = _value(first, before + 1)
        if first.lstrip().startswith("[") or isinstance(value, Fault):
            whole = "\n" * before + first + text.read()
            rows = _listed(path, whole)
            lines: Iterable[str] = whole.split("\n")[before + 1 :]
        else:
            rows, lines = _only_list(value), text
        if rows is not None:
            yield from ((n, f"row {n}", row) for n, row in enumerate(rows, 1))
            return
        yield before + 1, f"line {before + 1}", value
        for line, content in enumerate(lines, before + 2):
            before = line - 2
            if content.strip():
                yield line, f"line {line}", _value(content, line)
    except UnicodeError as error:
        raise _undecodable(path, error) from None


def _only_list(value: Any) -> list[Any] | None:
    """The rows of an object that is no row and holds one list of them, as {"data": [...]}, and besides at most a few words."""
    if not isinstance(value, dict) or form_of(value):
        return None
    lists = [each for each in value.values() if isinstance(each, list) and each and all(isinstance(row, dict) for row in each)]
    others = [each for each in value.values() if isinstance(each, (list, dict))]
    return lists[0] if len(lists) == len(others) == 1 else None


def _listed(path: Path, whole: str) -> list[Any] | None:
    """The rows of a text that is one JSON value; None where it is none, and each line is to be looked at by itself."""
    try:
        value = json.loads(whole)
    except RecursionError:
        if whole.lstrip().startswith("["):
            raise DataError(f"{path}: not JSON that can be read: nested too deeply.", FORMATS) from None
        return None
    except ValueError as error:
        if whole.lstrip().startswith("["):
            raise DataError(
                f"{path}, line {getattr(error, 'lineno', 1)}: not JSON: {getattr(error, 'msg', error)}.",
                "a list whose end is missing was cut short: write the file again, or close it by hand",
            ) from None
        return None
    return value if isinstance(value, list) else _only_list(value) or [value]


def _value(content: str, line: int) -> Any:
    try:
        return json.loads(content)
    except RecursionError:
        return Fault("nested too deeply")
    except ValueError as error:
        return Fault(f"not JSON: {getattr(error, 'msg', error)} (column {getattr(error, 'colno', 1)})")


def _csv(path: Path, text: io.TextIOWrapper, delimiter: str | None) -> Iterator[tuple[int, Place, Any]]:
    """Rows under a header; an empty field is none. Without a `delimiter` the most frequent of the usual ones in the header."""
    csv.field_size_limit(FIELD_CHARACTERS)
    line = 1
    try:
        header = text.readline()
        text.seek(0)
        reader = csv.DictReader(_without_nul(text), delimiter=delimiter or max(",;\t|", key=header.count), strict=True)
        names = [name.strip() for name in reader.fieldnames or ()]
        columns, line = len(names), reader.line_num + 1
        if twice := next((name for name in names if name and names.count(name) > 1), None):
            raise DataError(f"{path}, line 1: two columns are named {twice!r}.", "give each a name of its own")
        for row in reader:
            place = f"line {line}"
            if None in row:
                yield line, place, Fault(f"more values than the header has columns ({columns})")
            elif None in row.values():
                yield line, place, Fault(f"fewer values than the header has columns ({columns})")
            else:
                yield line, place, {key.strip(): value for key, value in row.items() if value}
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: not CSV: {error}.", "a quote inside a quoted field is written twice") from None
    except UnicodeError as error:
        raise _undecodable(path, error) from None


def _without_nul(text: IO[str]) -> Iterator[str]:
    for line in text:
        yield line.replace("\0", "")


def _parquet(path: Path, file: IO[bytes], class_names: bool) -> Iterator[tuple[int, Place, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise ToolMissingError("Parquet is read with pyarrow, which is not here.", "pip install 'ftkit[train]'") from None
    number = 0
    try:
        table = parquet.ParquetFile(file)
        classes = _classes((table.schema_arrow.metadata or {}).get(b"huggingface")) if class_names else {}
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, f"row {number}", {key: _named(value, classes[key]) if key in classes else value for key, value in row.items()}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is a Parquet file that cannot be read: {str(error).splitlines()[0]}.", "write it again") from None


def _classes(metadata: bytes | None) -> dict[str, list[str]]:
    """Columns whose numbers are classes, or lists of them, and the classes' names, as `datasets` writes them beside a table."""
    try:
        features = json.loads(metadata or b"{}").get("info", {}).get("features", {})
        named = {key: feature.get("feature", feature) if isinstance(feature, dict) else {} for key, feature in features.items()}
        found = {key: feature.get("names") for key, feature in named.items() if feature.get("_type") == "ClassLabel"}
    except (ValueError, AttributeError):
        return {}
    return {key: names for key, names in found.items() if isinstance(names, list) and all(isinstance(name, str) for name in names)}


def _named(value: Any, names: list[str]) -> Any:
    """A class by its name; None for -1, which says that there is none. Another number stays."""
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    if value == -1:
        return None
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value

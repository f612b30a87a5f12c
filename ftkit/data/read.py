"""Dataset files → rows, with every fault by file and line."""

from __future__ import annotations

import difflib
import io
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ftkit.data.formats import FORMATS, messages_of
from ftkit.data.rows import Row
from ftkit.errors import DataError

# Files that hold rows too and are not read yet, by their first bytes or their name: what they are, and what makes JSON lines of them.
_CSV = (
    """python -c "import csv, json, sys; rows = csv.DictReader(open(sys.argv[1], newline='', encoding='utf-8-sig'){more}); """
    """[print(json.dumps(row)) for row in rows]" {file} > {lines}"""
)
OTHER_FILES: tuple[tuple[bytes, str, str, str], ...] = (
    (b"PAR1", ".parquet", "a Parquet file",
     """python -c "import sys, datasets; datasets.Dataset.from_parquet(sys.argv[1]).to_json(sys.argv[2])" {file} {lines}"""),
    (b"\x1f\x8b", ".gz", "packed with gzip", "gzip -dc {file} > {lines}"),
    (b"PK\x03\x04", ".zip", "a zip archive (or a workbook)", "unpack it; of a workbook save a sheet as CSV UTF-8, then give that to ftkit"),
    (b"", ".csv", "CSV", _CSV.replace("{more}", "")),
    (b"", ".tsv", "CSV with tabs", _CSV.replace("{more}", ", delimiter=chr(9)")),
)  # fmt: skip


def read_rows(path: Path) -> list[Row]:
    """The rows of a `.jsonl` or `.json` file. Raises DataError with file and line for the first faults of each kind."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json*")] if path.parent.is_dir() else [], 1)
        raise DataError(f"There is no dataset at {path}.", f"did you mean {path.parent / near[0]}?" if near else FORMATS) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise DataError(
            f"Cannot read {path}: {getattr(error, 'strerror', error)}.", "name the dataset's file, as in --set data.train=train.jsonl"
        ) from None
    text = _text(path, content)
    rows: list[Row] = []
    faults: list[str] = []
    unit = "row" if text.lstrip().startswith("[") else "line"
    for number, value in _values(path, text, faults):
        try:
            rows.append(Row(messages_of(value), number))
        except ValueError as error:
            faults.append(f"{path}, {unit} {number}: {error}")
    if faults:
        more = f"\n… and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError("\n".join(faults[:5]) + more, FORMATS)
    if not rows:
        raise DataError(f"{path} has no rows.", FORMATS)
    return rows


def _text(path: Path, content: bytes) -> str:
    """UTF-8, or UTF-16 or UTF-32 where the first bytes say so. Raises DataError for other text, and for files that are not JSON."""
    lines = f"{path.name.split('.')[0] or 'rows'}.jsonl"
    for first, suffix, what, to_lines in OTHER_FILES:
        if content.startswith(first) if first else path.suffix.lower() == suffix:
            hint = to_lines.format(file=shlex.quote(str(path)), lines=shlex.quote(lines))
            raise DataError(f"{path} is {what}, which ftkit does not read yet; it reads JSON lines.", hint)
    encoding = json.detect_encoding(content)
    try:
        return io.TextIOWrapper(io.BytesIO(content), encoding).read()  # with line ends made one
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        if encoding.startswith("utf-8"):
            hint = f"if it is Latin-1: iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > fixed.jsonl"
            raise DataError(f"{path}, line {line}: not UTF-8 text.", hint) from None
        raise DataError(f"{path} begins as {encoding.upper()} text, and is not: {error.reason}.", "write it as UTF-8") from None


def _values(path: Path, text: str, faults: list[str]) -> list[tuple[int, Any]]:
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), 1))
        except RecursionError:
            faults.append(f"{path}: not JSON that can be read: nested too deeply")
        except ValueError as error:
            faults.append(f"{path}, line {getattr(error, 'lineno', 1)}: not JSON: {getattr(error, 'msg', error)}")
        return []
    values = []
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                values.append((line, json.loads(content)))
            except RecursionError:
                faults.append(f"{path}, line {line}: nested too deeply")
            except ValueError as error:
                faults.append(f"{path}, line {line}: not JSON: {getattr(error, 'msg', error)} (column {getattr(error, 'colno', 1)})")
    return values


def split_validation(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, validation) rows; at least one row stays on each side. Raises DataError for fewer than two rows."""
    import random

    if len(rows) < 2:
        raise DataError("One row cannot be split into training and validation.", "add rows, or name a file in data.validation")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    held = set(order[:count])
    return [row for n, row in enumerate(rows) if n not in held], [row for n, row in enumerate(rows) if n in held]


def only_held_out(training: Sequence[Row], validation: Sequence[Row], kind: Callable[[str], str]) -> list[Row]:
    """A validation row of each kind of answer that no training row has, where kinds are few: on average two rows each or more.

    `kind` is the part of an answer that counts. Nothing where most differ, as in free text.
    """
    taught = {kind(row.answer) for row in training}
    kinds = {kind(row.answer): row for row in reversed(validation)}
    if 2 * len(taught | kinds.keys()) > len(training) + len(validation):
        return []
    return sorted((row for name, row in kinds.items() if name not in taught), key=lambda row: row.line)

"""Dataset files → rows, with every fault by file and line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ftkit.data.files import Fault, values
from ftkit.data.formats import FORMATS, conversation_of
from ftkit.data.rows import Row
from ftkit.errors import DataError

FAULTS_SHOWN = 5


def read_rows(path: Path, columns: Mapping[str, str] | None = None, labels: Sequence[str] = ()) -> list[Row]:
    """The rows of a file. Raises DataError with file and line for the first faults, and how many more."""
    rows: list[Row] = []
    faults: list[str] = []
    try:
        for number, place, value in values(path):
            try:
                if isinstance(value, Fault):
                    raise value
                read = conversation_of(value, columns, labels)
                rows.append(Row(read.messages, number, f"{path}, {place}", read.unlearnt, read.form))
            except ValueError as error:
                faults.append(f"{path}, {place}: {error}")
    except ValueError as error:  # a path with a NUL in it
        raise DataError(f"Cannot read {path}: {error}.", "name the dataset's file, as in --set data.train=train.jsonl") from None
    except FileNotFoundError:
        beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        raise DataError(f"There is no dataset at {path}.", f"did you mean {path.parent / near[0]}?" if near else FORMATS) from None
    if faults:
        more = f"\n… and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise DataError("\n".join(faults[:FAULTS_SHOWN]) + more, FORMATS)
    if not rows:
        raise DataError(f"{path} has no rows.", FORMATS)
    return rows


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

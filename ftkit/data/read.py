"""Dataset files → rows, with every fault by file and line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftkit.data.files import Fault, values
from ftkit.data.formats import FORMATS, conversation_of
from ftkit.data.rows import Row
from ftkit.data.store import StoredRows, store_rows
from ftkit.errors import DataError
from ftkit.recipe import Objective

FAULTS_SHOWN = 5


# By what is learnt: what a row of the other kind is, and what to do.
OTHER_ROWS: dict[Objective, tuple[str, str]] = {
    "sft": (
        "a preference (chosen, rejected), and training.objective is sft",
        "to learn which is better: --set training.objective=dpo; to learn the chosen answers alone: "
        "--set 'data.columns={messages: chosen}' where they are conversations, {chat: chosen} where each is one text, "
        "else {completion: chosen} beside a `prompt`, "
        "{answer: chosen} beside a `question`",
    ),
    "dpo": (
        "no preference, and training.objective is dpo: `chosen` and `rejected` are missing",
        'as in {"prompt": …, "chosen": …, "rejected": …}; to learn the answers as they are: --set training.objective=sft',
    ),
}


class _OtherRow(ValueError):
    """A row that is whole, and of which this objective learns nothing."""


@dataclass
class LeftOut:
    """Rows that could not be read, where that was allowed."""

    count: int = 0
    first: list[str] = field(default_factory=list)  # of them: where each is, and why it cannot be read


def read_rows(
    *paths: Path,
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
    objective: Objective | None = None,
    left_out: LeftOut | None = None,
) -> StoredRows:
    """The rows of files, one after the other; with an `objective` those that it learns of.

    Raises DataError with file and line for a file's first faults, and how many more. With `left_out` such rows are counted there, and
    it is raised only for a file in which nothing can be read.
    """
    return store_rows(row for path in paths for row in _rows(path, columns, labels, objective, left_out))


def _rows(
    path: Path, columns: Mapping[str, str] | None, labels: Sequence[str], objective: Objective | None, left_out: LeftOut | None
) -> Iterator[Row]:
    faults: list[str] = []
    hint = ""
    count, empty = 0, True
    try:
        for number, place, value in values(path, class_names=not labels):
            try:
                if isinstance(value, Fault):
                    raise value
                read = conversation_of(value, columns, labels)
                if objective and (objective == "dpo") != bool(read.rejected):
                    raise _OtherRow(OTHER_ROWS[objective][0])
            except ValueError as error:
                count += 1
                hint = hint or (OTHER_ROWS[objective][1] if objective and isinstance(error, _OtherRow) else FORMATS)
                if count <= FAULTS_SHOWN:
                    faults.append(f"{path}, {place}: {error}")
                continue
            empty = False
            if not faults or left_out:
                yield Row(read.messages, number, f"{path}, {place}", read.unlearnt, read.form, read.rejected, read.passed_over)
    except ValueError as error:  # a path with a NUL in it
        raise DataError(f"Cannot read {path}: {error}.", "name the dataset's file, as in --set data.train=train.jsonl") from None
    except FileNotFoundError:
        beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        raise DataError(f"There is no dataset at {path}.", f"did you mean {path.parent / near[0]}?" if near else FORMATS) from None
    if left_out and not empty:
        left_out.count += count
        left_out.first = [*left_out.first, *faults][:FAULTS_SHOWN]
    elif faults:
        more = f"\n… and {count - FAULTS_SHOWN} more" if count > FAULTS_SHOWN else ""
        way = "" if empty else "; to leave such rows out: --set data.skip_faulty=true"
        raise DataError("\n".join(faults) + more, hint + way)
    elif empty:
        raise DataError(f"{path} has no rows.", FORMATS)


def split_validation(rows: StoredRows, share: float, seed: int) -> tuple[StoredRows, StoredRows]:
    """(training, validation) rows; at least one row stays on each side. Raises DataError for fewer than two rows."""
    import random

    if len(rows) < 2:
        raise DataError("One row cannot be split into training and validation.", "add rows, or name a file in data.validation")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    held = set(order[:count])
    return rows.take(n for n in range(len(rows)) if n not in held), rows.take(sorted(held))


def only_held_out(training: Sequence[Row], validation: Sequence[Row], kind: Callable[[str], str]) -> list[Row]:
    """A validation row of each kind of answer that no training row has, where kinds are few: on average two rows each or more.

    `kind` is the part of an answer that counts. Nothing where most differ, as in free text.
    """
    taught = {hash(kind(row.answer)) for row in training}  # texts of two million rows would not fit
    kinds = {hash(kind(row.answer)): n for n, row in reversed(list(enumerate(validation)))}
    if 2 * len(taught | kinds.keys()) > len(training) + len(validation):
        return []
    return sorted((validation[n] for name, n in kinds.items() if name not in taught), key=lambda row: row.line)

"""The held-out answers given token by token, to the trained model and to all that is made of it.

BEHAVIOUR, beside the answers that a step asked for, holds what was measured of each form; beside `ask` are also the rows and, as
far as they fit, the trained model's logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.data.mask import cut, tokenise
from ftkit.data.rows import IGNORED, Row
from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import ToolFailedError
from ftkit.line.job import Job
from ftkit.line.step import Made, write_json
from ftkit.plan.cost import LOGITS_BYTES
from ftkit.proof.behaviour import Behaviour, measure

if TYPE_CHECKING:
    import numpy as np

BEHAVIOUR, ROWS, LOGITS = "behaviour.json", "given.json", "trained-logits.npy"
TRAINED, MERGED, SHIPPED = "trained", "merged", "shipped"  # forms; before training: "before"
MOST_ROWS, MOST_TOKENS = 64, 128  # that are looked at: the first rows, and of each the first tokens that were learnt


def given_rows(tokenizer: Any, rows: Iterable[Row], max_length: int) -> list[Forced]:
    """Held-out rows as training would have read them, cut after the last token that is looked at."""
    found = []
    for example in cut(tokenise(tokenizer, rows), max_length):
        if places := [n for n, label in enumerate(example.labels) if n and label != IGNORED][:MOST_TOKENS]:
            found.append(Forced(example.input_ids[: places[-1] + 1], places))
        if len(found) == MOST_ROWS:
            break
    return found


def measure_model(
    job: Job, folder: Path, name: str, logits: Iterator[np.ndarray[Any, Any]], rows: Sequence[Forced], label: str
) -> dict[str, Behaviour]:
    """Look at the trained model, whose logits are kept, or after it at the base. What has no room is said, and left out."""
    found: Iterator[Any] = with_bar(job, label, rows, logits)
    trained = _trained(folder, rows) if (folder / LOGITS).exists() else ()
    try:
        return {name: measure(_kept(folder, rows, found) if name == TRAINED else found, _said(rows), trained)} if rows else {}
    except (RuntimeError, MemoryError) as error:
        if refused := hf.out_of_memory(error, "read one answer"):
            job.reporter.warn(f"{label} was left out: {refused.message}")
            return {}
        raise


def measure_file(job: Job, folder: Path, name: str, path: Path, asked: Made[Any]) -> None:
    """Look at a GGUF in llama.cpp. What cannot be looked at is said, and left out."""
    rows, measured, label = _rows(asked), {}, f"reading answers with {path.name}"
    if rows and TRAINED in read(asked):
        try:
            measured[name] = measure(with_bar(job, label, rows, logits.of_file(path, rows)), _said(rows), _trained(asked.folder, rows))
        except ToolFailedError as error:
            job.reporter.warn(f"{label} was left out: {error.message}")
    write(folder, measured)


def write(folder: Path, measured: Mapping[str, Behaviour], rows: Sequence[Forced] | None = None) -> None:
    """What a step measured; of `ask` also the rows."""
    write_json(folder / BEHAVIOUR, {name: asdict(form) for name, form in measured.items()})
    if rows is not None:
        write_json(folder / ROWS, [asdict(row) for row in rows])


def read(made: Made[Any]) -> dict[str, Behaviour]:
    """What a step measured, by the names of forms; nothing of a run by an earlier ftkit."""
    path = made.folder / BEHAVIOUR
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: Behaviour(**form) for name, form in found.items()}


def _rows(asked: Made[Any]) -> list[Forced]:
    path = asked.folder / ROWS
    return [Forced(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def _said(rows: Sequence[Forced]) -> list[list[int]]:
    return [[row.ids[place] for place in row.places] for row in rows]


def with_bar(job: Job, label: str, rows: Sequence[Forced], found: Iterator[Any]) -> Iterator[Any]:
    """What is found of each row, one after the other, and a bar meanwhile."""
    with job.reporter.bar(label, len(rows)) as bar:
        for done, one in enumerate(found, 1):
            bar.update(done)
            yield one


def _kept(folder: Path, rows: Sequence[Forced], found: Iterator[Any]) -> Iterator[np.ndarray[Any, Any]]:
    """The trained model's logits, those of the first rows also written to a file."""
    import numpy as np

    file, begin = None, 0
    for one in found:
        if file is None:
            ends = np.cumsum([len(row.places) for row in rows])
            size = max((int(end) for end in ends if end * one.shape[1] * 4 <= LOGITS_BYTES), default=0)
            file = np.lib.format.open_memmap(folder / LOGITS, mode="w+", dtype=np.float32, shape=(size, one.shape[1]))
        if begin + len(one) <= len(file):
            file[begin : begin + len(one)] = one
        begin += len(one)
        yield one


def _trained(folder: Path, rows: Sequence[Forced]) -> Iterator[np.ndarray[Any, Any]]:
    """The trained model's logits, row by row, of the rows that were kept."""
    import numpy as np

    file, begin = np.load(folder / LOGITS, mmap_mode="r", allow_pickle=False), 0
    for row in rows:
        if begin + len(row.places) > len(file):
            return
        yield file[begin : begin + len(row.places)]
        begin += len(row.places)

"""Answers given token by token, to the trained model and to all that is made of it.

BEHAVIOUR, beside the answers that a step asked for, holds what was measured of each form on the held-out rows; beside `ask` are also
these rows and, as far as they fit, the trained model's logits. The folder CHOICE in it holds the same of other rows: by them it is
chosen what ships, so that those by which it is judged have chosen nothing. The folder OUTSIDE holds that of text that has nothing to
do with the task, without logits: what training, merge and quantisation cost there. The folder PAIRS holds that of held-out
preferences, each chosen answer before its rejected one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.data.general import general_text
from ftkit.data.mask import cut, pair_of, tokenise
from ftkit.data.rows import IGNORED, Row
from ftkit.data.store import StoredRows
from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import ToolFailedError
from ftkit.line.job import Job, Rows
from ftkit.line.step import write_json
from ftkit.plan.cost import LOGITS_BYTES
from ftkit.proof.behaviour import Behaviour, measure

if TYPE_CHECKING:
    import numpy as np

BEHAVIOUR, ROWS, LOGITS = "behaviour.json", "given.json", "trained-logits.npy"
TRAINED, MERGED, SHIPPED = "trained", "merged", "shipped"  # forms; before training: "before"
CHOICE, OUTSIDE, PAIRS = "choice", "outside", "pairs"
MOST_ROWS, MOST_TOKENS = 64, 128  # that are looked at: the first rows, and of each the first tokens that were learnt
CHOICE_ROWS = PAIRS_LOOKED_AT = 32
WHAT = {OUTSIDE: "text outside the task", PAIRS: "pairs of answers"}  # in words; else answers
OUTSIDE_ROWS, OUTSIDE_TOKENS = 16, 128
OUTSIDE_CHARACTERS = 8 * OUTSIDE_ROWS * OUTSIDE_TOKENS  # the first of that text: what is learnt from comes after


def choice_and_others(job: Job, rows: Rows) -> tuple[StoredRows, StoredRows]:
    """Rows by which is chosen what ships, and training rows in any order that are not among them.

    The former are of validation, or where the held-out ones are those, some that were learnt.
    """
    count = len(rows.train)
    drawn = rows.train.take(random.Random(job.recipe.training.seed).sample(range(count), count))
    if "test" in job.data and len(rows.validation):
        return rows.validation, drawn
    few = min(2 * CHOICE_ROWS, count // 4)
    return drawn[:few], drawn[few:]


def outside_rows(tokenizer: Any, count: int = OUTSIDE_ROWS, *, after: int = 0, every: int = 1) -> list[Forced]:
    """Text of nobody's task, after so many characters of it; of each row `every` so many tokens, not the first."""
    ids = tokenizer(general_text(8 * count * OUTSIDE_TOKENS, after=after))["input_ids"][: count * OUTSIDE_TOKENS]
    rows = [ids[begin : begin + OUTSIDE_TOKENS] for begin in range(0, len(ids), OUTSIDE_TOKENS)]
    return [Forced(row, list(range(1, len(row), every))) for row in rows if len(row) > 1]


def given_rows(tokenizer: Any, rows: Iterable[Row], max_length: int, most: int = MOST_ROWS) -> list[Forced]:
    """Rows as training would have read them, cut after the last token that is looked at."""
    found = []
    for example in cut(tokenise(tokenizer, rows), max_length):
        if places := [n for n, label in enumerate(example.labels) if n and label != IGNORED][:MOST_TOKENS]:
            found.append(Forced(example.input_ids[: places[-1] + 1], places))
        if len(found) == most:
            break
    return found


def pair_rows(tokenizer: Any, rows: Iterable[Row], max_length: int) -> list[Forced]:
    """Preferences as training would have read them: a chosen answer, its rejected one, the next chosen, … Each its first tokens."""
    found: list[Forced] = []
    for pair in cut((pair_of(tokenizer, row) for row in rows if row.rejected), max_length):
        for said in (pair.chosen_ids[:MOST_TOKENS], pair.rejected_ids[:MOST_TOKENS]):
            begin = len(pair.prompt_ids)
            found.append(Forced(pair.prompt_ids + said, list(range(begin, begin + len(said)))))
        if len(found) == 2 * PAIRS_LOOKED_AT:
            break
    return found


def measure_model(
    job: Job,
    folder: Path,
    name: str,
    logits: Iterator[np.ndarray[Any, Any]],
    rows: Sequence[Forced],
    label: str,
    *,
    keeps: bool = True,
) -> dict[str, Behaviour]:
    """Look at the trained model, whose logits are kept, or after it at the base. What has no room is said, and left out."""
    found: Iterator[Any] = with_bar(job, label, rows, logits)
    trained = trained_logits(folder, rows) if (folder / LOGITS).exists() else ()
    try:
        return {name: measure(_kept(folder, rows, found) if keeps and name == TRAINED else found, _said(rows), trained)} if rows else {}
    except (RuntimeError, MemoryError) as error:
        if refused := hf.out_of_memory(error, "read one answer"):
            job.reporter.warn(f"{label} was left out: {refused.message}")
            return {}
        raise


def measure_file(job: Job, path: Path, asked: Path, adapter: Path | None = None) -> Behaviour | None:
    """Look at a GGUF in llama.cpp, with a GGUF LoRA or without, on the rows of a folder of `ask`.

    None, which is said, where it cannot be looked at. Raises ModelError for an adapter that is not of this file.
    """
    rows, label = (
        read_rows(asked),
        f"reading {WHAT.get(asked.name, 'answers')} with {path.name}" + (f" and {adapter.name}" if adapter else ""),
    )
    if not rows or TRAINED not in read(asked):
        return None
    trained = trained_logits(asked, rows) if (asked / LOGITS).exists() else ()
    try:
        return measure(with_bar(job, label, rows, logits.of_file(path, rows, adapter)), _said(rows), trained)
    except ToolFailedError as error:
        job.reporter.warn(f"{label} was left out: {error.message}")
        return None


def measure_form(job: Job, folder: Path, name: str, path: Path, asked: Path) -> None:
    """Look at a GGUF on the held-out answers, pairs of them, and text outside the task, and write it into a step's folder."""
    for inside in ("", OUTSIDE, *([PAIRS] if read_rows(asked / PAIRS) else [])):
        (folder / inside).mkdir(exist_ok=True)
        write(folder / inside, {name: measure_file(job, path, asked / inside)})


def write(folder: Path, measured: Mapping[str, Behaviour | None], rows: Sequence[Forced] | None = None) -> None:
    """What a step measured; of `ask` also the rows."""
    write_json(folder / BEHAVIOUR, {name: asdict(form) for name, form in measured.items() if form})
    if rows is not None:
        write_json(folder / ROWS, [asdict(row) for row in rows])


def read(folder: Path) -> dict[str, Behaviour]:
    """What a step measured, by the names of forms; nothing of a run by an earlier ftkit."""
    path = folder / BEHAVIOUR
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: Behaviour(**form) for name, form in found.items()}


def read_rows(asked: Path) -> list[Forced]:
    """The rows that `ask` looked at."""
    path = asked / ROWS
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


def trained_logits(folder: Path, rows: Sequence[Forced]) -> Iterator[np.ndarray[Any, Any]]:
    """The trained model's logits, row by row, of the rows that were kept."""
    import numpy as np

    file, begin = np.load(folder / LOGITS, mmap_mode="r", allow_pickle=False), 0
    for row in rows:
        if begin + len(row.places) > len(file):
            return
        yield file[begin : begin + len(row.places)]
        begin += len(row.places)

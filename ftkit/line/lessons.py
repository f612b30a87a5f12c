"""What a form of the model learns from, to come nearer to the trained model: rows, and what that says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ftkit.close.closing import ROWS_A_STEP, Lesson, distribution
from ftkit.close.kept import readings
from ftkit.engines import logits
from ftkit.engines.logits import Forced
from ftkit.errors import ModelError
from ftkit.line.adopt import trained_model
from ftkit.line.behaviour import (
    CHOICE,
    OUTSIDE_CHARACTERS,
    choice_and_others,
    given_rows,
    outside_rows,
    read_rows,
    trained_logits,
    with_bar,
)
from ftkit.line.job import Job, read_data
from ftkit.line.step import Made

PROMPT_TOKENS = 32  # of each row that are looked at, evenly; of an answer as many as elsewhere
OUTSIDE_ROWS = 96
Reads = Callable[[Sequence[Forced]], Iterator[Any]]  # logits of rows, one after the other


def checks_as_trained(asked: Made[Any]) -> list[Lesson]:
    """Rows by which is chosen what ships: from them nothing is learnt. Raises ModelError where the trained model did not read them."""
    choice = asked.folder / CHOICE
    rows = read_rows(choice)
    checks = [Lesson(row, distribution(found)) for row, found in zip(rows, trained_logits(choice, rows), strict=False)] if rows else []
    if not checks:
        raise ModelError("The trained model was not looked at token by token.", "look again: ftkit ship --from ask")
    return checks


def rows_to_learn(job: Job, tokenizer: Any, steps: int) -> list[Forced]:
    """Training rows for so many steps, each once, none of them among the checks."""
    _, others = choice_and_others(job, read_data(job))
    return given_rows(tokenizer, others, job.recipe.training.max_length, steps * ROWS_A_STEP)


def as_trained(job: Job, trained: Made[Any], rows: Sequence[Forced]) -> Iterator[Any]:
    """What the trained model says, which is loaded where it is asked."""
    yield from with_bar(job, "reading answers as trained", rows, logits.of_model(trained_model(job, trained), rows))


def outside(job: Job, tokenizer: Any, reads: Reads, kept: Path) -> list[Lesson]:
    """Text of nobody's task, as `reads` has it; kept in a folder."""
    rows = outside_rows(tokenizer, OUTSIDE_ROWS, after=OUTSIDE_CHARACTERS, every=4)
    told = readings(kept, rows, partial(read, job, "reading text outside the task", reads))
    return [Lesson(row, found) for row, found in zip(rows, told, strict=True)]


def read(job: Job, label: str, reads: Reads, rows: Sequence[Forced]) -> Iterator[Any]:
    """With a bar."""
    return with_bar(job, label, rows, reads(rows))


def prompt(row: Forced) -> Forced:
    """Of a row whose answer is given, some tokens that are none of it."""
    answer = set(row.places)
    places = [n for n in range(1, len(row.ids)) if n not in answer]
    return Forced(row.ids, places[:: max(1, -(-len(places) // PROMPT_TOKENS))])

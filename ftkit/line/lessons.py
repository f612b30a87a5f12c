"""What a form of the model learns from, to come nearer to the trained model: rows, and what that says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
BASE_WEIGHT = 0.05  # of them beside answers, towards the base: what training did there is a hundred times what is left to learn of the task
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


@dataclass(frozen=True)
class Teacher:
    """The trained model, loaded once, where it is first asked."""

    job: Job
    trained: Made[Any]

    @cached_property
    def model(self) -> Any:
        return trained_model(self.job, self.trained)

    def as_trained(self, rows: Sequence[Forced]) -> Iterator[Any]:
        return read(self.job, "reading answers as trained", partial(logits.of_model, self.model), rows)

    def as_base(self, rows: Sequence[Forced]) -> Iterator[Any]:
        """Of an adapter: what its base says."""
        with self.model.disable_adapter():
            yield from read(self.job, "reading text outside the task", partial(logits.of_model, self.model), rows)


def lessons(teacher: Teacher, rows: Sequence[Forced], kept: Path) -> list[Lesson]:
    """Rows with what the trained model says at the tokens of their answers and prompts; kept in a folder."""
    prompts = [prompt(row) for row in rows]
    both = [Forced(row.ids, [*row.places, *asked.places]) for row, asked in zip(rows, prompts, strict=True)]
    told = readings(kept, both, teacher.as_trained)
    return [
        Lesson(row, found[: len(row.places)], asked, found[len(row.places) :]) if asked.places else Lesson(row, found)
        for row, asked, found in zip(rows, prompts, told, strict=True)
    ]


def outside(tokenizer: Any, reads: Reads, kept: Path) -> list[Lesson]:
    """Text of nobody's task, as `reads` has it; kept in a folder."""
    rows = outside_rows(tokenizer, OUTSIDE_ROWS, after=OUTSIDE_CHARACTERS, every=4)
    told = readings(kept, rows, reads)
    return [Lesson(row, found) for row, found in zip(rows, told, strict=True)]


def read(job: Job, label: str, reads: Reads, rows: Sequence[Forced]) -> Iterator[Any]:
    """With a bar."""
    return with_bar(job, label, rows, reads(rows))


def prompt(row: Forced) -> Forced:
    """Of a row whose answer is given, some tokens that are none of it."""
    answer = set(row.places)
    places = [n for n in range(1, len(row.ids)) if n not in answer]
    return Forced(row.ids, places[:: max(1, -(-len(places) // PROMPT_TOKENS))])

"""The step `teach`: what the trained model says of training rows, and its base of other text: what a file of any type is closed by.

It stands beside the line, and is made where a closing first needs it; the next one, of another type, finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ftkit.close.closing import Lesson
from ftkit.engines import hf, logits
from ftkit.line.adopt import ADOPT, trained_tokenizer
from ftkit.line.ask import ASK
from ftkit.line.gguf import GGUF, Converted
from ftkit.line.job import Job
from ftkit.line.lessons import BASE_WEIGHT, Teacher, lessons, outside, read, rows_to_learn
from ftkit.line.step import Made, Step, ensure
from ftkit.line.train import TRAIN

MERGE_WEIGHT = 0.5  # of text outside the task, which is to stay as the merge has it


@dataclass(frozen=True)
class Taught:
    """What was read: so many rows, and of other text."""

    rows: int
    outside: int


@dataclass(frozen=True)
class Lessons:
    """What a closing learns from: training rows as the trained model reads them, and text outside the task, which weighs so much."""

    rows: list[Lesson]
    outside: list[Lesson]
    outside_weight: float


def taught(job: Job, trained: Made[Any], converted: Made[Converted]) -> Lessons:
    """Read where no closing of this training has read them yet. The run must be open."""
    return _lessons(job, ensure(job, TEACH).folder, trained, converted)


def _make(job: Job, folder: Path, trained: Made[Any], _: Made[Any], converted: Made[Converted]) -> Taught:
    found = _lessons(job, folder, trained, converted)
    hf.release_memory()
    return Taught(len(found.rows), len(found.outside))


def _lessons(job: Job, folder: Path, trained: Made[Any], converted: Made[Converted]) -> Lessons:
    """From the files in the folder; what is in none of them is read, and put there."""
    tokenizer, teacher = trained_tokenizer(job, trained), Teacher(job, trained)
    rows = lessons(teacher, rows_to_learn(job, tokenizer, job.closing_steps), folder / "rows")
    others, weight = _outside(job, tokenizer, converted, teacher, folder / "outside")
    return Lessons(rows, others, weight)


def _outside(job: Job, tokenizer: Any, converted: Made[Converted], teacher: Teacher, kept: Path) -> tuple[list[Lesson], float]:
    """Text outside the task, as the base of the adapter says it, and its weight; of other trained models as the merge does, in 16 bits
    where this machine's memory holds them; none, which is said, where it holds no file of it."""
    if job.recipe.training.method != "full":
        return outside(tokenizer, teacher.as_base, kept), BASE_WEIGHT
    if not (file := converted.result.in_memory()):
        job.reporter.warn("the merged model is larger than this machine's memory: closing does not look at text outside the task")
        return [], MERGE_WEIGHT
    told = partial(read, job, "reading text outside the task", partial(logits.of_file, converted.folder / file.path))
    return outside(tokenizer, told, kept), MERGE_WEIGHT


TEACH = Step(
    name="teach",
    does="what closing learns from",
    command="ftkit ship",
    result=Taught,
    after=(TRAIN, ADOPT, ASK),
    needs=(GGUF,),
    follows_from=lambda job: [job.closing_steps],
    make=_make,
    resumable=lambda _: True,
    applies=lambda job: job.closing_steps > 0,
)

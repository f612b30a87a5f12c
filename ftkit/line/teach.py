"""The step `teach`: what the trained model says of training rows, and how other text is to stay: what a file of any type is closed by.

It stands beside the line, and is made where a closing first needs it; the next one, of another type, finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ftkit.close.closing import Lesson
from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.line.adopt import ADOPT, trained_tokenizer
from ftkit.line.ask import ASK
from ftkit.line.gguf import GGUF, Converted
from ftkit.line.job import Job
from ftkit.line.lessons import BASE_WEIGHT, Teacher, lessons, outside, read, rows_to_learn
from ftkit.line.step import Made, Step, ensure
from ftkit.line.train import TRAIN

ROWS, OUTSIDE = "rows", "outside"  # folders of the step
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


def taught(job: Job, trained: Made[Any], converted: Made[Converted], rows: Sequence[Forced]) -> Lessons:
    """What is said of these rows; read where no closing has read them yet. The run must be open."""
    made, teacher = ensure(job, TEACH), Teacher(job, trained)
    learnt = lessons(teacher, rows, made.folder / ROWS)
    others = _outside(job, teacher, converted, made.folder) if made.result.outside else []
    del teacher
    hf.release_memory()  # a file that was damaged was read again
    return Lessons(learnt, others, MERGE_WEIGHT if job.recipe.training.method == "full" else BASE_WEIGHT)


def _make(job: Job, folder: Path, trained: Made[Any], _: Made[Any], converted: Made[Converted]) -> Taught:
    teacher = Teacher(job, trained)
    learnt = lessons(teacher, rows_to_learn(job, trained_tokenizer(job, trained), job.closing_steps), folder / ROWS)
    if job.recipe.training.method == "full" and not converted.result.in_memory():
        job.reporter.warn("the merged model is larger than this machine's memory: closing does not look at text outside the task")
        return Taught(len(learnt), 0)
    return Taught(len(learnt), len(_outside(job, teacher, converted, folder)))


def _outside(job: Job, teacher: Teacher, converted: Made[Converted], folder: Path) -> list[Lesson]:
    """Text outside the task as the base of the adapter says it; of other trained models as the merge does, in the largest of its files
    that this machine's memory holds."""
    told = teacher.as_base
    if job.recipe.training.method == "full":
        file = converted.result.in_memory() or converted.result.files[-1]
        told = partial(read, job, "reading text outside the task", partial(logits.of_file, converted.folder / file.path))
    return outside(trained_tokenizer(job, teacher.trained), told, folder / OUTSIDE)


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

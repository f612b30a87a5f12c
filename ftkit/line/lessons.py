"""What a form of the model learns from, to come nearer to the trained model: answers as that gives them, prompts as they were read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftkit.close.closing import ROWS_A_STEP, Lesson, distribution
from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import ModelError
from ftkit.line.adopt import trained_model
from ftkit.line.behaviour import CHOICE, choice_and_others, given_rows, read_rows, trained_logits, with_bar
from ftkit.line.job import Job, read_data
from ftkit.line.step import Made

if TYPE_CHECKING:
    import numpy as np

OUTSIDE_ROWS = 96
PROMPT_TOKENS = 32  # of each row that are looked at, evenly; of an answer as many as elsewhere


def checks_as_trained(asked: Made[Any]) -> list[Lesson]:
    """Rows by which is chosen what ships: from them nothing is learnt. Raises ModelError where the trained model did not read them."""
    choice = asked.folder / CHOICE
    rows = read_rows(choice)
    checks = [Lesson(row, distribution(found)) for row, found in zip(rows, trained_logits(choice, rows), strict=False)]
    if not checks:
        raise ModelError("The trained model was not looked at token by token.", "look again: ftkit ship --from ask")
    return checks


def rows_as_trained(job: Job, trained: Made[Any], tokenizer: Any, steps: int, *, prompts: bool = False) -> list[Lesson]:
    """Training rows for so many steps, each once, none of them among the checks: the answers as the trained model gives them, and
    its prompts where they are wanted."""
    _, others = choice_and_others(job, read_data(job))
    rows = given_rows(tokenizer, others, job.recipe.training.max_length, steps * ROWS_A_STEP)
    asked = [Forced(row.ids, [*row.places, *_prompt(row).places]) for row in rows] if prompts else rows
    teacher = trained_model(job, trained)
    told = with_bar(job, "reading answers as trained", asked, logits.of_model(teacher, asked))
    lessons = []
    for row, found in zip(rows, told, strict=True):
        answers, prompt = len(row.places), _prompt(row) if prompts else None
        prompted = distribution(found[answers:]) if prompt and prompt.places else None
        lessons.append(Lesson(row, distribution(found[:answers]), prompt if prompted else None, prompted))
    del teacher
    hf.release_memory()
    return lessons


def with_prompts(job: Job, lessons: Sequence[Lesson], read: Callable[[list[Forced]], Iterator[np.ndarray[Any, Any]]]) -> list[Lesson]:
    """The lessons, and what `read` says of their prompts, which is to stay."""
    prompts = [_prompt(lesson.answer) for lesson in lessons]
    told = with_bar(job, "reading prompts", prompts, read(prompts))
    return [
        replace(lesson, prompt=prompt, prompted=distribution(found)) if prompt.places else lesson
        for lesson, prompt, found in zip(lessons, prompts, told, strict=True)
    ]


def _prompt(row: Forced) -> Forced:
    """Of a row whose answer is given, some tokens that are none of it."""
    answer = set(row.places)
    places = [n for n in range(1, len(row.ids)) if n not in answer]
    return Forced(row.ids, places[:: max(1, -(-len(places) // PROMPT_TOKENS))])

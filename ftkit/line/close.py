"""The step `close`: the file that ships, its lossless numbers trained towards the trained model; and which of the files ships.

`ship.closing_steps` has the step made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ftkit.close.closing import RATE, ROWS_A_STEP, Lesson, Trained, close, distribution, mean_divergence
from ftkit.close.student import load_student, lossless, running, write_back
from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import DoesNotFitError, ModelError, ToolFailedError
from ftkit.gguf.files import GgufFile
from ftkit.line.adopt import ADOPT, trained_model
from ftkit.line.ask import ASK
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
from ftkit.line.gguf import GGUF, QUANTISE, Converted
from ftkit.line.job import Job, computes_on, read_data, tokenizer_of
from ftkit.line.merge import MERGE, MODEL, Merged
from ftkit.line.step import Made, Step
from ftkit.line.train import TRAIN
from ftkit.plan.cost import of_closing

PROMPT_TOKENS = 32  # of each row that are looked at, evenly; of an answer as many as elsewhere
OUTSIDE_ROWS = 96
MOST_APART = 0.1  # KL a token between the file in llama.cpp, which also rounds activations, and in transformers


@dataclass(frozen=True)
class Closed:
    """The file, and what closing did: KL a token from the trained model, in llama.cpp on rows that closing did not learn from."""

    file: GgufFile | None  # None: it ships as it was
    vectors: int  # that were trained
    steps: int
    before: float | None
    after: float | None
    why_not: str | None  # made no better, or not made at all


def _close(
    job: Job, folder: Path, trained: Made[Any], asked: Made[Any], merged: Made[Merged], converted: Made[Converted], *later: Made[Any]
) -> Closed:
    shipped = shipping(job, converted, *later)
    try:
        return _closed(job, folder, trained, asked, merged, converted, shipped)
    except (ModelError, DoesNotFitError, ToolFailedError) as error:
        job.reporter.warn(f"{shipped.path.name} is not closed: {error.message}")
        return Closed(None, 0, 0, None, None, error.message)


def _closed(
    job: Job, folder: Path, trained: Made[Any], asked: Made[Any], merged: Made[Merged], converted: Made[Converted], shipped: Shipping
) -> Closed:
    recipe, (cuda, dtype), path = job.recipe, computes_on(job, hf.model_type(merged.folder / MODEL)), shipped.path
    choice, tokenizer = asked.folder / CHOICE, tokenizer_of(job, merged.folder / MODEL)
    rows = read_rows(choice)
    checks = [Lesson(row, distribution(found)) for row, found in zip(rows, trained_logits(choice, rows), strict=False)]
    if not checks:
        raise ModelError("The trained model was not looked at token by token.", "look again: ftkit ship --from ask")
    _, others = choice_and_others(job, read_data(job))
    answers = given_rows(tokenizer, others, recipe.training.max_length, recipe.ship.closing_steps * ROWS_A_STEP)
    teacher = trained_model(job, trained)
    told = with_bar(job, "reading answers as trained", answers, logits.of_model(teacher, answers))
    lessons = [Lesson(row, distribution(found)) for row, found in zip(answers, told, strict=True)]
    del teacher
    hf.release_memory()
    before = mean_divergence(logits.of_file(path, [lesson.answer for lesson in checks]), checks)
    student = load_student(
        path, merged.folder / MODEL, bfloat16=cuda and dtype == "bfloat16", cuda=cuda, trust_remote_code=recipe.trust_remote_code
    )
    vectors = lossless(student, path)
    if not vectors:
        raise ModelError(f"no norm or bias of {path.name} is known in transformers.", "ship it as it is: ship.closing_steps=0")

    def measured() -> float:
        with running(student):
            return mean_divergence(logits.of_model(student, [lesson.answer for lesson in checks]), checks)

    if abs((first := measured()) - before) > MOST_APART:
        raise ModelError(f"transformers reads {path.name} otherwise than llama.cpp.", "ship it as it is: ship.closing_steps=0")
    prompts = [_prompt(row) for row in answers]
    with running(student):
        lessons = [
            replace(lesson, prompt=prompt, prompted=distribution(found)) if prompt.places else lesson
            for lesson, prompt, found in zip(
                lessons, prompts, with_bar(job, "reading prompts", prompts, logits.of_model(student, prompts)), strict=False
            )
        ]
    outside = _outside(job, tokenizer, converted)
    numbers, steps = sum(vector.parameter.numel() for vector in vectors), recipe.ship.closing_steps
    job.reporter.step(f"closing {path.name}: {numbers:,} numbers of {len(vectors)} vectors, at most {steps} steps")
    with job.reporter.bar("closing", steps) as bar:
        trained_ones = [Trained(vector.parameter, RATE * vector.scale) for vector in vectors]
        learn = partial(close, student, trained_ones, lessons, outside, steps, measured, first)
        done, _ = learn(seed=recipe.training.seed, told=lambda step, _: bar.update(step))
    target = folder / path.name
    write_back(path, vectors, target)
    after = mean_divergence(logits.of_file(target, [lesson.answer for lesson in checks]), checks)
    if not after < before:
        target.unlink()
        return Closed(None, len(vectors), done, before, after, f"{done} steps made it no better: KL a token {before:.3g}, then {after:.3g}")
    return Closed(replace(shipped.file, path=Path(target.name)), len(vectors), done, before, after, None)


def _outside(job: Job, tokenizer: Any, converted: Made[Converted]) -> list[Lesson]:
    """Text of nobody's task as the merge reads it, in 16 bits where this machine's memory holds them; none, which is said, where it
    holds no file of the merge."""
    if not (file := converted.result.in_memory()):
        job.reporter.warn("the merged model is larger than this machine's memory: closing does not look at text outside the task")
        return []
    rows = outside_rows(tokenizer, OUTSIDE_ROWS, after=OUTSIDE_CHARACTERS, every=4)
    told = with_bar(job, "reading text outside the task", rows, logits.of_file(converted.folder / file.path, rows))
    return [Lesson(row, distribution(found)) for row, found in zip(rows, told, strict=True)]


def _prompt(row: Forced) -> Forced:
    """Of a row whose answer is given, some tokens that are none of it."""
    answer = set(row.places)
    places = [n for n in range(1, len(row.ids)) if n not in answer]
    return Forced(row.ids, places[:: max(1, -(-len(places) // PROMPT_TOKENS))])


CLOSE: Step[Closed] = Step(
    name="close",
    does="the file that ships, nearer to the trained model",
    command="ftkit ship",
    result=Closed,
    after=(TRAIN, ADOPT, ASK, MERGE, GGUF, QUANTISE),
    follows_from=lambda job: [job.recipe.ship.quantization, job.recipe.ship.closing_steps],
    costs=of_closing,
    make=_close,
    applies=lambda job: job.recipe.ship.closing_steps > 0,
    keep=True,
)


@dataclass(frozen=True)
class Shipping:
    """The file that ships, and the step that made it."""

    path: Path
    file: GgufFile
    step: str
    fingerprint: str  # of the step
    missing: str | None  # the wanted type, where llama-quantize is not here: then Q8_0 ships


def shipping(job: Job, converted: Made[Converted], *later: Made[Any]) -> Shipping:
    """Which of the files ships: the closed one, else the type that is wanted, else Q8_0, or the file that came."""
    made, wanted = {step.name: step for step in later}, job.recipe.ship.quantization
    step: Made[Any] = converted
    file = next((file for file in converted.result.files if file.quantization == wanted), converted.result.files[-1])
    if quantised := made.get(QUANTISE.name):
        step, file = quantised, quantised.result
    if (closed := made.get(CLOSE.name)) and closed.result.file:
        step, file = closed, closed.result.file
    return Shipping(step.folder / file.path, file, step.name, step.fingerprint, None if file.quantization == wanted else wanted)

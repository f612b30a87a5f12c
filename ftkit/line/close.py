"""The step `close`: the file that ships, its lossless numbers trained towards the trained model; and which of the files ships.

`ship.closing_steps` has the step made.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftkit.close.closing import Lesson, close, distribution, mean_divergence
from ftkit.close.student import load_student, lossless, running, write_back
from ftkit.data.mask import cut, tokenise
from ftkit.data.rows import IGNORED, Example
from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import DoesNotFitError, ModelError, ToolFailedError
from ftkit.gguf.files import GgufFile
from ftkit.line.adopt import ADAPTER, ADOPT
from ftkit.line.behaviour import with_bar
from ftkit.line.gguf import GGUF, QUANTISE, Converted
from ftkit.line.job import Job, base_folder, computes_on, read_data, tokenizer_of
from ftkit.line.merge import MERGE, MODEL, Merged
from ftkit.line.step import Made, Step
from ftkit.line.train import TRAIN
from ftkit.plan.cost import of_closing

LEARNT_ROWS, CHECKED_ROWS = 160, 24  # training rows that are gone through again and again, and others that are looked at
ANSWER_TOKENS, PROMPT_TOKENS = 128, 32  # of each row that are looked at: an answer's first, of a prompt's all some, evenly
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


def _close(job: Job, folder: Path, trained: Made[Any], converted: Made[Converted], *others: Made[Any]) -> Closed:
    merged = next(made for made in others if made.name == MERGE.name)
    shipped = shipping(job, converted, *others)
    try:
        return _closed(job, folder, trained, merged, shipped)
    except (ModelError, DoesNotFitError, ToolFailedError) as error:
        job.reporter.warn(f"{shipped.path.name} is not closed: {error.message}")
        return Closed(None, 0, 0, None, None, error.message)


def _closed(job: Job, folder: Path, trained: Made[Any], merged: Made[Merged], shipped: Shipping) -> Closed:
    recipe, (cuda, bfloat16), path = job.recipe, computes_on(), shipped.path
    tokenizer, rows = tokenizer_of(job, merged.folder / MODEL), read_data(job)
    learnt, checked = _chosen(cut(tokenise(tokenizer, rows.train), recipe.training.max_length), recipe.training.seed)
    answers = [_places(example, answer=True) for example in (*learnt, *checked)]
    teacher = _teacher(job, trained)
    told = with_bar(job, "reading answers as trained", answers, logits.of_model(teacher, answers))
    lessons = [Lesson(row, distribution(found)) for row, found in zip(answers, told, strict=True)]
    del teacher
    hf.release_memory()
    checks = lessons[len(learnt) :]
    before = mean_divergence(logits.of_file(path, [lesson.answer for lesson in checks]), checks)
    student = load_student(path, merged.folder / MODEL, bfloat16=bfloat16 and cuda, cuda=cuda, trust_remote_code=recipe.trust_remote_code)
    vectors = lossless(student, path)
    if not vectors:
        raise ModelError(f"no norm or bias of {path.name} is known in transformers.", "ship it as it is: ship.closing_steps=0")

    def measured() -> float:
        with running(student):
            return mean_divergence(logits.of_model(student, [lesson.answer for lesson in checks]), checks)

    if abs(measured() - before) > MOST_APART:
        raise ModelError(f"transformers reads {path.name} otherwise than llama.cpp.", "ship it as it is: ship.closing_steps=0")
    prompts = [_places(example, answer=False) for example in learnt]
    with running(student):
        lessons = [
            replace(lesson, prompt=prompt, prompted=distribution(found)) if prompt.places else lesson
            for lesson, prompt, found in zip(
                lessons, prompts, with_bar(job, "reading prompts", prompts, logits.of_model(student, prompts)), strict=False
            )
        ]
    numbers, steps = sum(vector.parameter.numel() for vector in vectors), recipe.ship.closing_steps
    job.reporter.step(f"closing {path.name}: {numbers:,} numbers of {len(vectors)} vectors, at most {steps} steps")
    with job.reporter.bar("closing", steps) as bar:
        done, _ = close(student, vectors, lessons, steps, measured, seed=recipe.training.seed, told=lambda step, _: bar.update(step))
    target = folder / path.name
    write_back(path, vectors, target)
    after = mean_divergence(logits.of_file(target, [lesson.answer for lesson in checks]), checks)
    if not after < before:
        target.unlink()
        return Closed(None, len(vectors), done, before, after, f"{done} steps made it no better: KL a token {before:.3g}, then {after:.3g}")
    return Closed(replace(shipped.file, path=Path(target.name)), len(vectors), done, before, after, None)


def _teacher(job: Job, trained: Made[Any]) -> Any:
    """The trained model: an adapter on the base that it was trained on, as it was."""
    (cuda, bfloat16), recipe = computes_on(), job.recipe
    if recipe.training.method == "full":
        return hf.load_model(trained.folder / MODEL, None, bfloat16=bfloat16, cuda=cuda, trust_remote_code=recipe.trust_remote_code)
    return hf.load_adapted(
        base_folder(job), trained.folder / ADAPTER, recipe.training.method, bfloat16=bfloat16, cuda=cuda,
        trust_remote_code=recipe.trust_remote_code,
    )  # fmt: skip


def _chosen(examples: Iterator[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Training rows to learn from, and others to look at: not those that are held out, by which the file is judged."""
    every = [example for example in examples if any(label != IGNORED for label in example.labels[1:])]
    drawn = random.Random(seed).sample(every, min(len(every), LEARNT_ROWS + CHECKED_ROWS))
    checked = min(CHECKED_ROWS, max(1, len(drawn) // 8))
    return drawn[checked:] or drawn, drawn[:checked]


def _places(example: Example, *, answer: bool) -> Forced:
    """The tokens of an answer, or some of those before it."""
    places = [n for n, label in enumerate(example.labels) if n and (label != IGNORED) == answer]
    last = max(n for n, label in enumerate(example.labels) if label != IGNORED)
    before = [n for n in places if n <= last]
    every = max(1, -(-len(before) // PROMPT_TOKENS))
    return Forced(example.input_ids[: last + 1], before[:ANSWER_TOKENS] if answer else before[::every])


CLOSE: Step[Closed] = Step(
    name="close",
    does="the file that ships, nearer to the trained model",
    command="ftkit ship",
    result=Closed,
    after=(TRAIN, ADOPT, GGUF, MERGE, QUANTISE),
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

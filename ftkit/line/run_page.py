"""What `ftkit train --html` shows: a training that is finished, runs, or was stopped, gathered from the run as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ftkit.errors import RunError
from ftkit.line.ask import ASK, read_questions
from ftkit.line.job import Job
from ftkit.line.page import words_of
from ftkit.line.plan import Recorded, recorded
from ftkit.line.step import Made, find, fingerprint_of
from ftkit.line.train import TRAIN, Trained
from ftkit.machine import device
from ftkit.proof.score import is_right
from ftkit.report.run_page import Memory, RunPage
from ftkit.report.ship_page import Answer
from ftkit.run import CHECKPOINTS
from ftkit.train.checkpoints import last_checkpoint, state_of
from ftkit.train.curve import Point, best_point, points
from ftkit.train.metrics import read_metrics
from ftkit.train.verdict import read_curve


def run_page(job: Job) -> RunPage:
    """Of this recipe's training as it stands. Nothing is computed anew or waited for. Raises RunError where nothing was trained yet."""
    trained, planned = find(job, TRAIN), recorded(job.run)
    if trained:
        return _finished(job, trained, planned)
    folder = job.run.folder / f".{TRAIN.name}-{fingerprint_of(job, TRAIN)}.partial"
    metrics = read_metrics(folder)
    curve = [one.point for one in metrics] or _of_checkpoint(folder)
    if not curve:
        raise RunError(f"{job.run.folder} holds no step of this training yet.", f"begin it: {TRAIN.command}")
    last = metrics[-1] if metrics else None
    best = best_point(curve, job.recipe.training.metric_for_best_model)
    cuda = device.choose().kind == "cuda"
    steps = planned.memory.work.steps if planned and planned.memory.work else None
    return RunPage(
        name=job.recipe.ship.name,
        state="running" if job.run.is_busy() else "stopped",
        step=curve[-1].step,
        steps=steps,
        best_step=best.step if best else None,
        verdict=read_curve(curve, job.recipe.training, ended=False, max_steps=steps),
        curve=curve,
        seconds=last.seconds if last else None,
        trained_tokens=last.tokens if last else None,
        memory=_memory(planned, last.peak_bytes if last else None, "allocated on the GPU" if cuda else "held in RAM"),
        tokens=planned.tokens if planned else None,
        settings=_settings(job),
    )


def _finished(job: Job, trained: Made[Trained], planned: Recorded | None) -> RunPage:
    result, training = trained.result, job.recipe.training
    memory = _memory(planned, result.peak_bytes, result.peak_is)
    return RunPage(
        name=job.recipe.ship.name,
        state="finished",
        step=result.steps,
        steps=None,
        best_step=result.best_step,
        verdict=result.reading or read_curve(result.curve, training),
        curve=result.curve,
        seconds=result.seconds,
        trained_tokens=result.trained_tokens,
        memory=memory,
        tokens=planned.tokens if planned else None,
        answers=list(_answers(job)),
        settings=_settings(job),
    )


def _memory(planned: Recorded | None, peak_bytes: int | None, peak_is: str) -> Memory | None:
    """What is measured is of the process on a CPU, and of its tensors on a GPU: so is what it is held against."""
    if not planned:
        return None
    chosen = planned.memory.chosen
    against = chosen.peak.device_bytes if "RAM" in peak_is else chosen.peak.allocated_bytes
    return Memory(planned.memory.device.name, against, chosen.budget_bytes, peak_bytes or None, peak_is)


def _of_checkpoint(folder: Path) -> list[Point]:
    """The curves as the last checkpoint has them, of a training that an earlier ftkit began."""
    last = last_checkpoint(folder / CHECKPOINTS)
    try:
        return points(state_of(last)["log_history"]) if last else []
    except (OSError, ValueError, KeyError):
        return []


def _answers(job: Job) -> Iterator[Answer]:
    """Where they were asked already, by shipping."""
    asked = find(job, ASK)
    if not asked:
        return
    found = read_questions(asked)
    for number, (question, expected) in enumerate(zip(found.questions, found.expected, strict=True)):
        said = {name: answers[number] for name, answers in found.answers.items()}
        right = {name: is_right(expected, text, job.recipe.evaluate) for name, text in said.items()}
        yield Answer(words_of(question), expected, said, right)


def _settings(job: Job) -> dict[str, object]:
    """Of the training: what only shipping reads is left out."""
    return job.recipe.model_dump(mode="json", exclude={"ship", "tools", "trained", "evaluate"})

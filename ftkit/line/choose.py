"""The step `weigh`: what a type keeps of the training, so that `ship.quantization: smallest` finds the smallest that keeps enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftkit.line import behaviour
from ftkit.line.ask import ASK, Asked
from ftkit.line.behaviour import CHOICE, SHIPPED, measure_file
from ftkit.line.close import OF_FILE, shipping
from ftkit.line.gguf import GGUF, QUANTISE, Converted
from ftkit.line.job import Job
from ftkit.line.step import Made, Step
from ftkit.plan.cost import of_proving
from ftkit.proof.behaviour import least_kept
from ftkit.recipe import SMALLEST

TRIED = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")  # from small to large


@dataclass(frozen=True)
class Weighed:
    """A file, and the percent of the training that it keeps on the rows by which is chosen; None: they could not be looked at."""

    quantization: str
    bytes: int
    kept_percent: float | None


def of_type(job: Job, quantization: str) -> Job:
    """The job, as if the recipe named this type."""
    ship = job.recipe.ship.model_copy(update={"quantization": quantization})
    return replace(job, recipe=job.recipe.model_copy(update={"ship": ship}))


def candidates(job: Job) -> Iterator[Job]:
    """The job with each type that can be made here; without llama-quantize that is one."""
    for quantization in TRIED:
        tried = of_type(job, quantization)
        if quantization == TRIED[-1] or QUANTISE.applies(tried):
            yield tried


def _weigh(job: Job, folder: Path, asked: Made[Asked], converted: Made[Converted], *later: Made[Any]) -> Weighed:
    shipped = shipping(job, converted, *later)
    job.reporter.step(f"weighing {shipped.path.name}")
    form = measure_file(job, shipped.path, asked.folder / CHOICE)
    behaviour.write(folder, {SHIPPED: form})
    forms = behaviour.read(asked.folder / CHOICE) | ({SHIPPED: form} if form else {})
    known = {"before", behaviour.TRAINED, SHIPPED} <= forms.keys()
    kept = least_kept(forms, SHIPPED, by_loss=job.recipe.training.objective == "sft") if known else None
    return Weighed(shipped.file.quantization, shipped.file.bytes, kept)


WEIGH = Step(
    name="weigh",
    does="what a type keeps of the training",
    command="ftkit ship",
    result=Weighed,
    after=(ASK, GGUF, *OF_FILE),
    follows_from=lambda job: [job.recipe.ship.quantization],
    costs=of_proving,
    make=_weigh,
    keep=True,
)


def trials(job: Job, weighed: Callable[[Job], Weighed | None]) -> Iterator[tuple[Job, Weighed, bool]]:
    """Types in their order, what each keeps, and whether it ships: the first that keeps enough, else the largest.

    `weighed`: what is known of one; where it is nothing, no more is tried.
    """
    every = list(candidates(job))
    for tried in every:
        if (found := weighed(tried)) is None:
            return
        ships = (found.kept_percent or 0) >= job.recipe.ship.keep or tried is every[-1]
        yield tried, found, ships
        if ships:
            return


def is_smallest(job: Job) -> bool:
    """Whether the type is to be chosen."""
    return job.recipe.ship.quantization == SMALLEST

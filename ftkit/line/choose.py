"""The step `weigh`: what a type keeps of the training, so that `ship.quantization: smallest` finds the smallest that keeps enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftkit.line import behaviour
from ftkit.line.ask import ASK, Asked
from ftkit.line.behaviour import CHOICE, SHIPPED, measure_file
from ftkit.line.close import CLOSE, OF_FILE, shipping
from ftkit.line.gguf import GGUF, QUANTISE, Converted
from ftkit.line.job import Job
from ftkit.line.prove import PROVE, Proof, limits_of
from ftkit.line.step import Made, Step, fingerprint_of
from ftkit.plan.cost import of_proving
from ftkit.proof.behaviour import least_kept
from ftkit.recipe import SMALLEST

FAILED_TYPES = "failed_types"  # in the run's manifest, by the fingerprint of the proof: what it said, and at which limits it would pass
TRIED = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")  # from small to large


@dataclass(frozen=True)
class Weighed:
    """A file, and the percent of the training that it keeps on the rows by which is chosen; None: they could not be looked at."""

    quantization: str
    bytes: int
    kept_percent: float | None
    fails: str | None = None  # why it does not ship though it keeps enough: what its proof says, or that it is not closed by itself
    not_closed: str | None = None  # why not, where that was tried


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
    closed = next((made.result for made in later if made.name == CLOSE.name), None)
    not_closed = f"not closed: {closed.why_not}" if closed and closed.why_not else None
    return Weighed(shipped.file.quantization, shipped.file.bytes, kept, not_closed=not_closed)


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
    """Types in their order, what each keeps, and whether it ships: the first that keeps enough and did not fail its proof, else the
    largest.

    `weighed`: what is known of one; where it is nothing, no more is tried.
    """
    *smaller, largest = candidates(job)
    for tried in smaller:
        if (found := weighed(tried)) is None:
            return
        enough = (found.kept_percent or 0) >= job.recipe.ship.keep
        fails = ((found.not_closed if tried.closes else None) or _fails(tried)) if enough else None
        yield tried, replace(found, fails=fails), enough and not fails
        if enough and not fails:
            return
    if found := weighed(largest):
        yield largest, found, True


def passed_over(job: Job, proven: Job, proof: Proof) -> bool:
    """Note that the type of the job `proven` fails its proof; whether a larger one can be tried in its place."""
    *_, largest = candidates(job)
    if not proof.would_pass or not is_smallest(job) or proven.recipe.ship.quantization == largest.recipe.ship.quantization:
        return False
    said = next(check for check in proof.checks if check.outcome == "failed")
    known = {"says": f"{said.name}: {said.detail}", "would_pass": proof.would_pass, "evaluate": limits_of(job.recipe)["evaluate"]}
    job.run.record(**{FAILED_TYPES: {**_failed_types(job), fingerprint_of(proven, PROVE): known}})
    return True


def _fails(job: Job) -> str | None:
    """What the proof of this type said, if that would fail with the limits of today too; None: nothing is known of one."""
    known, ship = _failed_types(job).get(fingerprint_of(job, PROVE)), job.recipe.ship
    if not known or known["evaluate"] != limits_of(job.recipe)["evaluate"]:
        return None
    passes = known["would_pass"]
    failing = ship.keep > passes.get("ship.keep", 100) or ship.max_loss_points < passes.get("ship.max_loss_points", 0)
    return str(known["says"]) if failing else None


def _failed_types(job: Job) -> dict[str, Any]:
    return job.run.manifest().get(FAILED_TYPES) or {}


def is_smallest(job: Job) -> bool:
    """Whether the type is to be chosen."""
    return job.recipe.ship.quantization == SMALLEST

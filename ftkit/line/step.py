"""A step of the line as a value: what its files follow from, what it costs, and how it is made, once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ftkit import run
from ftkit.engines import hf
from ftkit.errors import RunError
from ftkit.files import fingerprint, write_atomically
from ftkit.line.job import Job
from ftkit.plan.cost import Cost, Sizes

R = TypeVar("R")


@dataclass(frozen=True)
class Made(Generic[R]):
    """A finished step: its folder, and what it recorded about itself."""

    name: str
    fingerprint: str
    folder: Path
    result: R
    seconds: float
    fresh: bool  # made just now, not found finished


def _nothing(_: object) -> list[Any]:
    return []


def _always(_: Job) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Step(Generic[R]):
    """One step. Its folder in the run is named by what it follows from, and made once for that."""

    name: str  # letters alone: its folders are known as ftkit's own by it
    does: str  # for a person
    command: str  # that makes it
    result: type[R]  # a dataclass: what the step records about itself, small and JSON-able
    after: tuple[Step[Any], ...] = ()  # those whose files it follows from
    needs: tuple[Step[Any], ...] = ()  # those that are made first, where it has to be made, and that its files do not follow from
    follows_from: Callable[[Job], list[Any]] = _nothing  # and what else of the job, JSON-able
    costs: Callable[[Sizes], tuple[Cost, ...]] = lambda _: ()
    make: Callable[..., R] | None  # (job, folder, *finished steps of `after` and `needs`); writes into the folder. None: Ollama keeps it
    applies: Callable[[Job], bool] = _always  # whether this job has the step at all
    resumable: Callable[[Job], bool] = lambda _: False  # whether what a killed run left is gone on with
    keep: bool = False  # took long: stays when it is made with other settings


def fingerprint_of(job: Job, step: Step[Any]) -> str:
    """The name that the step has for this job."""
    return fingerprint(step.name, _inputs(job, step))


def _inputs(job: Job, step: Step[Any]) -> list[Any]:
    return [*(fingerprint_of(job, before) for before in step.after if before.applies(job)), *step.follows_from(job)]


def find(job: Job, step: Step[R]) -> Made[R] | None:
    """The step, if it is finished for this job."""
    found = job.run.finished(step.name, fingerprint_of(job, step))
    return _made(step, found) if found else None


def last(job: Job, step: Step[R]) -> Made[R] | None:
    """The step as it was finished last, whatever for."""
    found = job.run.finished(step.name)
    return _made(step, found) if found else None


def ensure(job: Job, step: Step[R]) -> Made[R]:
    """The finished step, made if it is not there, and before it all that it comes after. The run must be open."""
    before = [ensure(job, earlier) for earlier in step.after if earlier.applies(job)]

    def make(folder: Path) -> dict[str, Any]:
        assert step.make
        needed = [ensure(job, earlier) for earlier in step.needs if earlier.applies(job)]
        recorded = _record(step, step.make(job, folder, *before, *needed))
        if "torch" in sys.modules:
            hf.release_memory()  # else the next step finds it taken: torch keeps a GPU's memory, and a trainer is held by its callbacks
        return recorded

    found = job.run.ensure(
        step.name,
        _inputs(job, step),
        make,
        after={made.name: made.fingerprint for made in before},
        resumable=step.resumable(job),
        keep=step.keep,
    )
    return _made(step, found)


def _record(step: Step[R], result: R) -> dict[str, Any]:
    from pydantic import TypeAdapter

    recorded: dict[str, Any] = TypeAdapter(step.result).dump_python(result, mode="json")
    return recorded


def _made(step: Step[R], found: run.Finished) -> Made[R]:
    """Raises RunError for what another version of ftkit recorded in another form."""
    from pydantic import TypeAdapter, ValidationError

    try:
        result = TypeAdapter(step.result).validate_python(found.result)
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(
            f"{found.folder} was recorded by another version of ftkit ({'.'.join(map(str, first['loc']))}: {first['msg']}).",
            f"have it made again: rm -r '{found.folder}', then {step.command}",
        ) from None
    return Made(found.name, found.fingerprint, found.folder, result, found.seconds, found.fresh)


def write_json(path: Path, content: object) -> None:
    """A value of the line as a file, whole."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

"""The step `close`: the file that ships, its lossless numbers trained towards the trained model; and which of the files ships.

`ship.closing_steps` has the step made, or that the file loses too much as it was quantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.close.closing import close, mean_divergence, to_train
from ftkit.close.kept import keep, last
from ftkit.close.student import Weights, find_weights, load_student, lossless, running, scales, ways_of, write_back
from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import DoesNotFitError, InterruptedRunError, ModelError, ToolFailedError
from ftkit.gguf.files import GgufFile
from ftkit.line.adopt import ADOPT
from ftkit.line.ask import ASK
from ftkit.line.bits import BITS, Bits
from ftkit.line.gguf import GGUF, QUANTISE, Converted
from ftkit.line.job import Job, computes_on, tokenizer_of
from ftkit.line.lessons import checks_as_trained, rows_to_learn
from ftkit.line.merge import MERGE, MODEL, Merged
from ftkit.line.step import Made, Step
from ftkit.line.teach import taught
from ftkit.line.train import TRAIN
from ftkit.machine import device
from ftkit.machine.device import Device
from ftkit.memory.kernels import CONTEXT_BYTES
from ftkit.plan.cost import WAYS, ClosingWay, Way, fitting, of_closing
from ftkit.plan.plan import without_margin
from ftkit.run import CHECKPOINTS
from ftkit.units import bytes_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    scales: int = 0  # that were trained, one a row of its linear layers

    @property
    def words(self) -> str:
        if self.why_not:
            return f"not closed: {self.why_not}"
        scales = f" and {self.scales:,} scales" if self.scales else ""
        told = f"KL a token {self.before or 0:.2g} → {self.after or 0:.2g}, on rows that it did not learn from"
        return f"closed: {self.vectors} norms and biases{scales}, {self.steps} steps; {told}."


def _close(
    job: Job, folder: Path, trained: Made[Any], asked: Made[Any], merged: Made[Merged], converted: Made[Converted], *later: Made[Any]
) -> Closed:
    shipped = shipping(job, converted, *later)
    try:
        with hf.room_to(f"close {shipped.path.name}"):
            return _closed(job, folder, trained, asked, merged, converted, shipped)
    except KeyboardInterrupt:
        raise InterruptedRunError("Interrupted.", "the same command goes on with the closing, from its last check") from None
    except (ModelError, DoesNotFitError, ToolFailedError) as error:
        if job.closes and isinstance(error, DoesNotFitError):
            raise  # there may be room another time
        job.reporter.warn(f"{shipped.path.name} is not closed: {error.message}")
        return Closed(None, 0, 0, None, None, error.message)


def _closed(
    job: Job, folder: Path, trained: Made[Any], asked: Made[Any], merged: Made[Merged], converted: Made[Converted], shipped: Shipping
) -> Closed:
    recipe, path = job.recipe, shipped.path
    tokenizer, kept = tokenizer_of(job, merged.folder / MODEL), folder / CHECKPOINTS
    checks, answers = checks_as_trained(asked), rows_to_learn(job, tokenizer, job.closing_steps)
    begun = last(kept)
    ways = _ways_that_fit(job, path, merged.folder / MODEL, answers, begun[1] if begun else None)
    found = find_weights(path, merged.folder / MODEL, trust_remote_code=recipe.trust_remote_code)  # or refuse, before anything is read
    kept.mkdir(parents=True, exist_ok=True)  # from here on it is begun
    lessons = taught(job, trained, converted, answers)
    before = mean_divergence(logits.of_file(path, [lesson.answer for lesson in checks]), checks)
    student, way = _student(job, path, merged.folder / MODEL, ways, found)
    vectors, stretched = lossless(student, path), scales(student, path, found)
    learning = to_train(vectors, stretched)
    if not learning:
        raise ModelError(f"no norm, bias or scale of {path.name} is known in transformers.", "ship it as it is: ship.closing_steps=0")
    if begun and [value.shape for value in begun[0].values] == [one.parameter.shape for one in learning]:
        job.reporter.note(f"closing goes on from step {begun[0].step}")
    else:
        begun = None

    def measured() -> float:
        with running(student):
            return mean_divergence(logits.of_model(student, [lesson.answer for lesson in checks]), checks)

    if abs((first := measured()) - before) > MOST_APART:
        raise ModelError(f"transformers reads {path.name} otherwise than llama.cpp.", "ship it as it is: ship.closing_steps=0")
    steps, numbers = job.closing_steps, sum(vector.parameter.numel() for vector in vectors)
    scaled = sum(one.stretch.numel() for one in stretched)
    job.reporter.step(f"closing {path.name}: {numbers:,} numbers of {len(vectors)} vectors, {scaled:,} scales, at most {steps} steps")
    with job.reporter.bar("closing", steps) as bar:
        done, _ = close(
            student,
            learning,
            lessons.rows,
            lessons.outside,
            steps,
            measured,
            first,
            outside_weight=lessons.outside_weight,
            seed=recipe.training.seed,
            told=lambda step, _: bar.update(step),
            begun=begun[0] if begun else None,
            keep=lambda progress: keep(kept, progress, way),
        )
    target = folder / path.name
    write_back(path, vectors, stretched, target)
    after = mean_divergence(logits.of_file(target, [lesson.answer for lesson in checks]), checks)
    if not after < before:
        target.unlink()
        why_not = f"none of up to {steps} steps brought it nearer: KL a token {before:.3g}" + (f", then {after:.3g}." if done else ".")
        return Closed(None, len(vectors), done, before, after, why_not, scaled)
    return Closed(replace(shipped.file, path=Path(target.name)), len(vectors), done, before, after, None, scaled)


def _ways_that_fit(job: Job, path: Path, model: Path, rows: Sequence[Forced], begun: Way | None) -> tuple[ClosingWay, ...]:
    """How the file's weights can be computed with: as it was begun, else in the first way that this machine's memory has room for, and
    those after it. Raises DoesNotFitError where there is room for none."""
    on, (cuda, dtype) = device.choose(), computes_on(job, hf.model_type(model))
    ways = ways_of(path, rows, bfloat16=dtype == "bfloat16", cuda=cuda)
    chosen = next((way for way in ways if way.name == begun), None) or fitting(
        ways, device.processor().free_bytes, _room_on(on) if cuda else None
    )
    if not chosen:
        least = ways[-1]
        needed = f"{bytes_text(least.ram_bytes)} of RAM" + (f" and {bytes_text(least.device_bytes)} of {on.name}" if cuda else "")
        raise DoesNotFitError(f"closing {path.name} needs {needed}.", "ship it as it is: ship.closing_steps=0")
    if chosen is not ways[0]:
        needed = bytes_text(ways[0].device_bytes or ways[0].ram_bytes)
        job.reporter.note(f"closing {path.name} with its weights {WAYS[chosen.name]}; dequantised it takes {needed}")
    return ways[ways.index(chosen) :]


def _room_on(card: Device) -> int:
    """What this process may have of a GPU, whose context it may have already."""
    import torch

    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return without_margin(min(card.total_bytes, card.free_bytes + (CONTEXT_BYTES if begun else 0)))


def _student(job: Job, path: Path, model: Path, ways: Sequence[ClosingWay], found: Weights) -> tuple[PreTrainedModel, Way]:
    """The file in torch, in the first of the ways that can be had. Raises ModelError or DoesNotFitError where none can."""
    cuda, dtype = computes_on(job, hf.model_type(model))
    trust, bfloat16 = job.recipe.trust_remote_code, dtype == "bfloat16"

    def load(way: ClosingWay) -> tuple[PreTrainedModel, Way]:
        return load_student(path, model, way.name, bfloat16=bfloat16, cuda=cuda, trust_remote_code=trust, found=found), way.name

    for way, following in pairwise(ways):
        try:
            return load(way)
        except DoesNotFitError as error:
            said = error.message
        hf.release_memory()  # once the error is gone, which holds all that was loaded
        job.reporter.note(f"{said} It is tried with its weights {WAYS[following.name]}")
    return load(ways[-1])


CLOSE: Step[Closed] = Step(
    name="close",
    does="the file that ships, nearer to the trained model",
    command="ftkit ship",
    result=Closed,
    after=(TRAIN, ADOPT, ASK, MERGE, GGUF, QUANTISE, BITS),
    follows_from=lambda job: [job.recipe.ship.quantization, job.closing_steps],
    costs=of_closing,
    make=_close,
    resumable=lambda _: True,
    applies=lambda job: job.closing_steps > 0,
    keep=True,
)


OF_FILE: tuple[Step[Any], ...] = (QUANTISE, BITS, CLOSE)  # what makes the file that ships of one that is always made, in order


@dataclass(frozen=True)
class Shipping:
    """The file that ships, and the step that made it."""

    path: Path
    file: GgufFile
    step: str
    fingerprint: str  # of the step
    missing: str | None  # the wanted type, where llama-quantize is not here: then Q8_0 ships
    bits: Bits | None = None  # None: not asked for


def shipping(job: Job, converted: Made[Converted], *later: Made[Any]) -> Shipping:
    """Which of the files ships: the closed one, else that with more bits by task, the type that is wanted, Q8_0, or the file that came."""
    made, wanted = {step.name: step for step in later}, job.recipe.ship.quantization
    step: Made[Any] = converted
    file = next((file for file in converted.result.files if file.quantization == wanted), converted.result.files[-1])
    if quantised := made.get(QUANTISE.name):
        step, file = quantised, quantised.result
    if (bits := made.get(BITS.name)) and bits.result.file:
        step, file = bits, bits.result.file
    if (closed := made.get(CLOSE.name)) and closed.result.file:
        step, file = closed, closed.result.file
    missing = None if file.quantization == wanted else wanted
    return Shipping(step.folder / file.path, file, step.name, step.fingerprint, missing, bits.result if bits else None)

"""The step `bits`: a few tensors of the file get more bits, those whose rounding costs this task's answers most.

`ship.bits_by_task` has the step made. Half of the rows by which is chosen rank the tensors, the other half judges: the file ships if
it is nearer to the trained model there than the plain one, and than one of its own size whose tensors nothing chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftkit.close.closing import mean_divergence
from ftkit.close.ranking import gains
from ftkit.engines import hf, logits
from ftkit.errors import DoesNotFitError, ModelError, ToolFailedError
from ftkit.gguf.bits import MORE_BYTES, at_random, finer_types, tensors_in, type_file, worth_most
from ftkit.gguf.files import GgufFile, quantize
from ftkit.gguf.types import CONVERTED
from ftkit.line.ask import ASK
from ftkit.line.gguf import GGUF, IMATRIX, QUANTISE, Converted, matrix_of, read_made
from ftkit.line.job import Job, computes_on
from ftkit.line.lessons import checks_as_trained
from ftkit.line.merge import MERGE, MODEL
from ftkit.line.step import Made, Step, fingerprint_of
from ftkit.machine.llama_cpp import find_program
from ftkit.plan.cost import of_bits

TYPES = "tensor-types.txt"  # beside the file: what llama-quantize was told
LEAST_ROWS = 8  # half of which rank, and half judge


@dataclass(frozen=True)
class Bits:
    """The file with more bits here and there, and how each is on the rows that judge: KL a token from the trained model."""

    file: GgufFile | None  # None: the plain one ships
    tensors: int  # that got more bits
    more_percent: float  # of bytes
    plain: float | None
    by_task: float | None
    why_not: str | None
    at_random: float | None = None  # as many more bytes in tensors that nothing chose; None: not made, as by ftkit before 0.3

    @property
    def words(self) -> str:
        """What more bits did, with all figures."""
        far = f"KL a token {self.plain or 0:.3g} → {self.by_task or 0:.3g}"
        beside = f" ({self.at_random:.3g} in tensors at random)" if self.at_random is not None else ""
        return f"{self.tensors} tensors, {self.more_percent:.1f} % more bytes: {far}{beside}, on rows that did not choose them"


def _bits(job: Job, folder: Path, *before: Made[Any]) -> Bits:
    made = {step.name: step for step in before}
    plain = made[QUANTISE.name].folder / made[QUANTISE.name].result.path
    try:
        return _raised(job, folder, plain, made)
    except (ModelError, DoesNotFitError, ToolFailedError) as error:
        job.reporter.warn(f"{plain.name} is shipped with the plain bits: {error.message}")
        return Bits(None, 0, 0, None, None, error.message)


def _raised(job: Job, folder: Path, plain: Path, made: Mapping[str, Made[Any]]) -> Bits:
    model, converted, lessons = made[MERGE.name].folder / MODEL, made[GGUF.name], checks_as_trained(made[ASK.name])
    if len(lessons) < LEAST_ROWS:
        raise ModelError(f"{len(lessons)} rows are too few to rank by some and judge by others; {LEAST_ROWS} are enough.")
    rank, judge = lessons[::2], lessons[1::2]
    there = tensors_in(plain)
    finer, own = finer_types(there), {name: tensor.kind for name, tensor in there.items() if tensor.kind != "F32"}

    def quantised(path: Path, more: Mapping[str, str]) -> Path:
        program, matrix = find_program("llama-quantize", job.llama_cpp_dir), made.get(IMATRIX.name)
        assert program  # else the step does not apply
        types = folder / TYPES
        types.write_text(type_file({**own, **more}), encoding="utf-8")
        result: Converted = converted.result
        quantize(
            converted.folder / result.files[0].path, path, job.recipe.ship.quantization, program, job.reporter,
            imatrix=matrix_of(matrix) if matrix else None, again=job.recipe.ship.allow_requantize, types=types,
        )  # fmt: skip
        return path

    every = quantised(folder / "finer.gguf", finer)
    cuda, dtype = computes_on(job, hf.model_type(model))
    job.reporter.step(f"ranking the tensors of {plain.name} by what their rounding costs {len(rank)} answers")
    found = gains(
        plain, every, model, rank, bfloat16=cuda and dtype == "bfloat16", cuda=cuda, trust_remote_code=job.recipe.trust_remote_code
    )
    hf.release_memory()
    more = {name: tensor.size_bytes - there[name].size_bytes for name, tensor in tensors_in(every).items() if name in finer}
    every.unlink()
    chosen = worth_most({name: gain for name, gain in found.items() if name in more}, more, int(MORE_BYTES * plain.stat().st_size))
    if not chosen:
        return Bits(None, 0, 0, None, None, f"no tensor gains by more bits within {MORE_BYTES:.0%} of the bytes")
    asked = [lesson.answer for lesson in judge]
    job.reporter.step(f"judging by {len(judge)} other answers")

    def distance(path: Path) -> float:
        return mean_divergence(logits.of_file(path, asked), judge)

    drawn, names = None, at_random(more, sum(more[name] for name in chosen))
    if set(names) != set(chosen):
        control = quantised(folder / "random.gguf", {name: finer[name] for name in names})
        drawn = distance(control)
        control.unlink()
    path = quantised(folder / plain.name, {name: finer[name] for name in chosen})
    before, after = distance(plain), distance(path)
    percent = 100 * (path.stat().st_size / plain.stat().st_size - 1)
    beside = "" if drawn is None else f", in tensors at random {drawn:.3g}"
    figures, why_not = f"KL a token {before:.3g}, with more bits {after:.3g}{beside}", None
    if not after < before:
        why_not = f"it is no nearer: {figures}"
    elif drawn is not None and not after < drawn:
        why_not = f"as many bits in tensors at random bring it as near: {figures}"
    if why_not:
        path.unlink()
        return Bits(None, len(chosen), percent, before, after, why_not, drawn)
    file = read_made(job, path, made[MERGE.name], converted)
    return Bits(replace(file, path=Path(path.name)), len(chosen), percent, before, after, None, drawn)


def _applies(job: Job) -> bool:
    """Where it is wanted, for a type that llama-quantize makes, and can be made here or was made before."""
    if not job.recipe.ship.bits_by_task or job.recipe.ship.quantization in CONVERTED or not QUANTISE.applies(job):
        return False
    return bool(find_program("llama-quantize", job.llama_cpp_dir) or job.run.finished(BITS.name, fingerprint_of(job, BITS)))


BITS: Step[Bits] = Step(
    name="bits",
    does="more bits where rounding costs this task most",
    command="ftkit ship",
    result=Bits,
    after=(ASK, MERGE, GGUF, IMATRIX, QUANTISE),
    costs=of_bits,
    make=_bits,
    applies=_applies,
    keep=True,
)

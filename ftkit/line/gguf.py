"""The steps `gguf` and `quantise`: the merged model as GGUF files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftkit.data.template import begins_with_bos
from ftkit.engines import llamacpp
from ftkit.files import link
from ftkit.gguf.files import CONVERTER_TYPES, Corrections, GgufFile, convert, correct, quantize, read_back, template_in
from ftkit.line.job import Job, tokenizer_of
from ftkit.line.merge import MERGE, MODEL, Merged
from ftkit.line.step import Made, Step, fingerprint_of
from ftkit.machine.llama_cpp import find_program, need_converter
from ftkit.plan.cost import of_converting, of_quantising

ALWAYS_MADE = ("F16", "Q8_0")  # by the converter, which needs no llama-quantize


def _there(job: Job) -> tuple[str, ...]:
    """The types that need no llama-quantize: those that are always made, or the one that came."""
    return (str(job.given.quantization),) if job.given and job.given.kind == "gguf" else ALWAYS_MADE


@dataclass(frozen=True)
class Converted:
    """The files that are always made (or the one that came), the finest first, and what each file of this model is corrected in.

    Their paths are from the step's folder.
    """

    files: tuple[GgufFile, ...]
    corrections: Corrections = field(default_factory=Corrections)


def _convert(job: Job, folder: Path, merged: Made[Merged]) -> Converted:
    model, stem = merged.folder / MODEL, job.recipe.ship.name.replace(":", "-")
    tokenizer, paths = tokenizer_of(job, model), {quantization: folder / f"{stem}-{quantization}.gguf" for quantization in _there(job)}
    for quantization, path in paths.items():
        if job.given and job.given.kind == "gguf":
            link(job.given.path, path)
        else:
            convert(model, path, quantization, need_converter(job.llama_cpp_dir), job.reporter)
    last = [*paths.values()][-1]
    corrections = corrections_of(last, tokenizer, merged.result.stops)
    if tokenizer.chat_template != template_in(last):  # it came without one, or with one that ftkit fixes: its date, its thinking
        corrections = replace(corrections, chat_template=tokenizer.chat_template)
    for path in paths.values():
        if correct(path, corrections) and last.samefile(path) and job.given:
            job.reporter.note(f"the file is written anew: its {corrections.words} would be read otherwise")
    return Converted(tuple(_read(path, quantization, tokenizer) for quantization, path in paths.items()), corrections)


def corrections_of(path: Path, tokenizer: Any, stops: Sequence[int]) -> Corrections:
    """What llama.cpp would do otherwise with a converted file than training did."""
    with llamacpp.load(path, 64) as engine:
        unknown = [token for token in stops if not engine.stops_at(token)]
        adds_bos = engine.tokenize("x", begins=True) != engine.tokenize("x")
    return Corrections(
        eot_token_id=unknown[0] if unknown else None,
        add_bos_token=False if adds_bos and not begins_with_bos(tokenizer) else None,  # training saw none
    )


def _read(path: Path, quantization: str, tokenizer: Any) -> GgufFile:
    return replace(read_back(path, quantization, tokenizer.chat_template), path=Path(path.name))


GGUF = Step(
    name="gguf",
    does="F16 and Q8_0",
    command="ftkit ship",
    result=Converted,
    after=(MERGE,),
    costs=lambda sizes: of_converting(sizes, *ALWAYS_MADE),
    make=_convert,
)


def _is_converted(job: Job, quantization: str) -> bool:
    """Whether the converter makes a file of this type: of a model's folder alone."""
    return quantization in CONVERTER_TYPES and not (job.given and job.given.kind == "gguf")


def _quantise(job: Job, folder: Path, converted: Made[Converted], merged: Made[Merged]) -> GgufFile:
    wanted, finest, model = job.recipe.ship.quantization, converted.result.files[0], merged.folder / MODEL
    path = folder / f"{finest.path.stem.removesuffix(finest.quantization)}{wanted}.gguf"
    if _is_converted(job, wanted):
        convert(model, path, wanted, need_converter(job.llama_cpp_dir), job.reporter)
        correct(path, converted.result.corrections)
    else:
        program = find_program("llama-quantize", job.llama_cpp_dir)
        assert program  # else the step does not apply
        quantize(converted.folder / finest.path, path, wanted, program, job.reporter, again=job.recipe.ship.allow_requantize)
    return _read(path, wanted, tokenizer_of(job, model))


def _is_quantised(job: Job) -> bool:
    """Whether the type that is wanted is a file of its own, and can be made here or was made before."""
    wanted = job.recipe.ship.quantization
    if wanted in _there(job):
        return False
    if _is_converted(job, wanted) or find_program("llama-quantize", job.llama_cpp_dir):
        return True
    return job.run.finished(QUANTISE.name, fingerprint_of(job, QUANTISE)) is not None


QUANTISE: Step[GgufFile] = Step(
    name="quantise",
    does="the type that ships",
    command="ftkit ship",
    result=GgufFile,
    after=(GGUF,),
    needs=(MERGE,),
    follows_from=lambda job: [job.recipe.ship.quantization],
    costs=lambda sizes: () if sizes.ship.quantization in ALWAYS_MADE else of_quantising(sizes),
    make=_quantise,
    applies=_is_quantised,
)

"""The steps `gguf`, `imatrix` and `quantise`: the merged model as GGUF files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftkit.data.template import begins_with_bos, render
from ftkit.engines import llamacpp
from ftkit.errors import RecipeError, RunError, ToolMissingError
from ftkit.files import file_fingerprint, link
from ftkit.gguf.files import CONVERTER_TYPES, Corrections, GgufFile, Wanted, convert, correct, quantize, read_back, takes, template_in
from ftkit.gguf.imatrix import importance
from ftkit.gguf.types import CONVERTED, needs_imatrix
from ftkit.line.adopt import trained_by
from ftkit.line.job import READ_BY, Job, read_data, tokenizer_of
from ftkit.line.merge import MERGE, MODEL, Merged
from ftkit.line.step import Made, Step, fingerprint_of
from ftkit.machine.device import processor
from ftkit.machine.llama_cpp import find_program, need_converter
from ftkit.model.card import in_gguf
from ftkit.model.source import open_gguf
from ftkit.plan.cost import FTKIT_BYTES, of_converting, of_imatrix, of_quantising
from ftkit.recipe import SMALLEST

LLAMA_IMATRIX = "llama-imatrix"
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

    def in_memory(self) -> GgufFile | None:
        """The finest that this machine's memory holds beside ftkit."""
        room = processor().total_bytes - FTKIT_BYTES
        return next((file for file in self.files if file.bytes < room), None)


def _convert(job: Job, folder: Path, merged: Made[Merged]) -> Converted:
    model, stem = merged.folder / MODEL, job.recipe.ship.name.replace(":", "-")
    tokenizer, paths = tokenizer_of(job, model), {quantization: folder / f"{stem}-{quantization}.gguf" for quantization in _there(job)}
    last, came = [*paths.values()][-1], job.given if job.given and job.given.kind == "gguf" else None
    if came:
        link(came.path, last)
    else:
        convert(model, paths, need_converter(job.llama_cpp_dir), job.reporter)
    corrections = corrections_of(last, tokenizer, merged.result.stops, converted=not came)
    if tokenizer.chat_template != template_in(last):  # it came without one, or with one that ftkit fixes: its date, its thinking
        corrections = replace(corrections, chat_template=tokenizer.chat_template)
    for path in paths.values():
        if correct(path, corrections) and last.samefile(path) and job.given:
            job.reporter.note(f"the file is written anew: its {corrections.words} would be read otherwise")
    wanted = wanted_of(job, model, tokenizer, merged.result.stops, corrections)
    return Converted(tuple(_read(path, quantization, wanted) for quantization, path in paths.items()), corrections)


def corrections_of(path: Path, tokenizer: Any, stops: Sequence[int], *, converted: bool = False) -> Corrections:
    """What llama.cpp would do otherwise with a file than training did; or a server with one that was just `converted`."""
    with llamacpp.load(path, 64) as engine:
        unknown = [token for token in stops if not engine.stops_at(token)]
        adds_bos = engine.tokenize("x", begins=True) != engine.tokenize("x")
    twice = converted and _says_what_is_added_anyway(path)
    return Corrections(
        eot_token_id=unknown[0] if unknown else None,
        add_bos_token=False if twice or (adds_bos and not begins_with_bos(tokenizer)) else None,  # training saw none
    )


# Kinds of tokenizer to which llama.cpp adds a BOS whatever the file says. Ollama before 0.30 goes by the file, and its own format of
# these models writes one too.
ALWAYS_ADDS_BOS = ("gemma4",)


def _says_what_is_added_anyway(path: Path) -> bool:
    """Whether a file asks for a BOS that llama.cpp would add without being asked."""
    reader = open_gguf(path)
    says, kind = (reader.get_field(f"tokenizer.ggml.{key}") for key in ("add_bos_token", "model"))
    return says is not None and bool(says.contents()) and kind is not None and kind.contents() in ALWAYS_ADDS_BOS


CONTEXT_KEYS = ("max_position_embeddings", "n_ctx", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")  # in a config


def read_made(job: Job, path: Path, merged: Made[Merged], converted: Made[Converted]) -> GgufFile:
    """A file of the wanted type that was just made of a merged model, checked; its path from its own folder."""
    model = merged.folder / MODEL
    wanted = wanted_of(job, model, tokenizer_of(job, model), merged.result.stops, converted.result.corrections)
    return _read(path, job.recipe.ship.quantization, wanted)


def _read(path: Path, quantization: str, wanted: Wanted) -> GgufFile:
    return replace(read_back(path, quantization, wanted), path=Path(path.name))


def wanted_of(job: Job, model: Path, tokenizer: Any, stops: Sequence[int], corrections: Corrections) -> Wanted:
    """What a file of a merged model must say, by its folder; one that came as a GGUF has no config, and keeps its own words."""
    came = job.given is not None and job.given.kind == "gguf"
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) if (model / "config.json").is_file() else {}
    lengths = [part[key] for part in (config.get("text_config") or {}, config) for key in CONTEXT_KEYS if isinstance(part.get(key), int)]
    return Wanted(
        tokenizer.chat_template,
        tuple(lengths),
        len(tokenizer),
        tuple(dict.fromkeys(token for token in (*stops, tokenizer.eos_token_id) if token is not None)),
        corrections.eot_token_id,
        {} if came else in_gguf(model),
    )


GGUF = Step(
    name="gguf",
    does="F16 and Q8_0",
    command="ftkit ship",
    result=Converted,
    after=(MERGE,),
    costs=lambda sizes: of_converting(sizes, *ALWAYS_MADE),
    make=_convert,
)


@dataclass(frozen=True)
class Importance:
    """An importance matrix, its path from the step's folder, and what it is known by; None: measured by an earlier ftkit."""

    path: Path
    sha256: str | None = None


def matrix_of(made: Made[Importance]) -> Path:
    """The matrix of this model. Raises RunError where another was put in its place: rows of another model's weights matter otherwise."""
    path = made.folder / made.result.path
    if made.result.sha256 not in (None, file_fingerprint(path) if path.is_file() else ""):
        raise RunError(
            f"{path} is not the importance matrix that was measured on this model.", "measure it again: ftkit ship --from imatrix"
        )
    return path


def _imatrix(job: Job, folder: Path, converted: Made[Converted], merged: Made[Merged]) -> Importance:
    program, finest = find_program(LLAMA_IMATRIX, job.llama_cpp_dir), converted.folder / converted.result.files[0].path
    assert program  # else the step does not apply
    tokenizer, train, path = tokenizer_of(job, merged.folder / MODEL), read_data(job).train, folder / "imatrix.gguf"
    rows = train.take(random.Random(job.recipe.training.seed).sample(range(len(train)), len(train)))
    texts = (row.messages[0]["content"] if row.is_text else render(tokenizer, row.messages, ask=False) for row in rows)
    importance(finest, texts, path, program, job.reporter)
    return Importance(Path(path.name), file_fingerprint(path))


def _has_imatrix(job: Job) -> bool:
    """Whether one is wanted, for a type that llama-quantize makes, and can be made here or was made before."""
    if not job.recipe.ship.imatrix or job.recipe.ship.quantization in CONVERTED:
        return False
    return bool(find_program(LLAMA_IMATRIX, job.llama_cpp_dir) or job.run.finished(IMATRIX.name, fingerprint_of(job, IMATRIX)))


def refuse_type(job: Job) -> None:
    """Raise RecipeError or ToolMissingError for a type that llama-quantize would not make: before the long work."""
    ship, wanted = job.recipe.ship, job.recipe.ship.quantization
    if wanted in _there(job) or _is_converted(job, wanted):
        return
    if needs_imatrix(wanted) and not ship.imatrix:
        raise RecipeError(
            f"{wanted} needs an importance matrix: without one llama-quantize does not round weights to so few bits.",
            "have it measured: --set ship.imatrix=true; or take a type that needs none: --set ship.quantization=Q3_K_M",
        )
    program = find_program("llama-quantize", job.llama_cpp_dir)
    if program and wanted != SMALLEST and not takes(program, wanted):
        raise ToolMissingError(
            f"{program.path} does not make {wanted}.", "take a newer llama.cpp, or another type: --set ship.quantization=Q4_K_M"
        )
    if program and ship.bits_by_task and not takes(program, "--tensor-type-file"):
        raise ToolMissingError(
            f"{program.path} does not know --tensor-type-file, which ship.bits_by_task needs.",
            "take a newer llama.cpp, or the plain file: --set ship.bits_by_task=false",
        )


def refuse_missing_imatrix(job: Job) -> None:
    """Raise ToolMissingError where one is wanted and cannot be made, of a type that can."""
    if job.recipe.ship.imatrix and find_program("llama-quantize", job.llama_cpp_dir) and not find_program(LLAMA_IMATRIX, job.llama_cpp_dir):
        raise ToolMissingError("ship.imatrix needs llama-imatrix, which is not here.", "ftkit setup llama.cpp, or --set ship.imatrix=false")


IMATRIX = Step(
    name="imatrix",
    does="where rounding matters",
    command="ftkit ship",
    result=Importance,
    after=(GGUF,),
    needs=(MERGE,),
    follows_from=lambda job: [
        fingerprint_of(job, trained_by(job)),
        [data.fingerprint for data in job.data.values()] if job.given else None,
        *(filter(None, [job.recipe.data.model_dump(include=READ_BY, exclude_defaults=True)]) if job.given else ()),
    ],
    costs=of_imatrix,
    make=_imatrix,
    applies=_has_imatrix,
)


def _is_converted(job: Job, quantization: str) -> bool:
    """Whether the converter makes a file of this type: of a model's folder alone."""
    return quantization in CONVERTER_TYPES and not (job.given and job.given.kind == "gguf")


def _quantise(job: Job, folder: Path, converted: Made[Converted], *others: Made[Any]) -> GgufFile:
    made = {step.name: step for step in others}
    wanted, finest, model = job.recipe.ship.quantization, converted.result.files[0], made[MERGE.name].folder / MODEL
    path = folder / f"{finest.path.stem.removesuffix(finest.quantization)}{wanted}.gguf"
    if _is_converted(job, wanted):
        convert(model, {wanted: path}, need_converter(job.llama_cpp_dir), job.reporter)
        correct(path, converted.result.corrections)
    else:
        program = find_program("llama-quantize", job.llama_cpp_dir)
        assert program  # else the step does not apply
        matrix = made.get(IMATRIX.name)
        imatrix = matrix_of(matrix) if matrix else None
        again = job.recipe.ship.allow_requantize
        quantize(converted.folder / finest.path, path, wanted, program, job.reporter, imatrix=imatrix, again=again)
    return read_made(job, path, made[MERGE.name], converted)


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
    after=(GGUF, IMATRIX),
    needs=(MERGE,),
    follows_from=lambda job: [job.recipe.ship.quantization],
    costs=lambda sizes: () if sizes.ship.quantization in ALWAYS_MADE else of_quantising(sizes),
    make=_quantise,
    applies=_is_quantised,
)

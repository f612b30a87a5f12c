"""The step `adapter`: what was trained as a GGUF LoRA, looked at beside a GGUF of the base; and the judgement of the two."""

from __future__ import annotations

import math
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.check import Check, not_made
from ftkit.data.stops import configured_stops, stops
from ftkit.errors import ProofError, RecipeError
from ftkit.files import write_atomically
from ftkit.gguf.files import Corrections, convert
from ftkit.gguf.lora import convert_adapter, refuse_what_it_cannot_hold
from ftkit.line import behaviour
from ftkit.line.adopt import ADOPT, trained_by, trained_tokenizer
from ftkit.line.ask import ASK, Asked
from ftkit.line.behaviour import measure_file
from ftkit.line.gguf import corrections_of
from ftkit.line.job import Job, base_folder, config_folder, tokenizer_of
from ftkit.line.step import Made, Step, find
from ftkit.line.train import TRAIN
from ftkit.line.transfer import TRANSFER, Transferred, adapter_of
from ftkit.machine.llama_cpp import LORA_CONVERTER, need_converter
from ftkit.model.open import weight_bytes
from ftkit.plan.cost import LOOKED_AT_BYTES, of_adapting
from ftkit.proof.behaviour import GAIN, Behaviour, judge_distance, judge_gain, least_kept
from ftkit.units import bytes_text

FORM = "adapter"  # its name among the forms of the model
BASE = "BASE.gguf"  # in the line that serves it, where no file of the base is known


@dataclass(frozen=True)
class Adapted:
    """The adapter, its path from the step's folder, and what llama-server must be told to ask the base as training asked it."""

    path: Path
    bytes: int
    layers: int
    template: Path | None  # None: the base's own
    corrections: Corrections
    base: str | None  # the file beside which it was looked at, for a person
    why_not: str | None  # looked at beside none


def _make(job: Job, folder: Path, trained: Made[Any], asked: Made[Asked], fitted: Made[Transferred] | None = None) -> Adapted:
    """Raises ModelError for what a GGUF LoRA cannot hold, and for an adapter that is not of the base."""
    script, base = need_converter(job.llama_cpp_dir, LORA_CONVERTER), config_folder(job)
    path = folder / f"{job.recipe.ship.name.replace(':', '-')}-lora.gguf"
    with_code = job.recipe.trust_remote_code
    made = convert_adapter(adapter_of(trained, fitted), base, path, script, trust_remote_code=with_code, reporter=job.reporter)
    tokenizer, template = trained_tokenizer(job, trained), None
    if tokenizer.chat_template != tokenizer_of(job, base).chat_template:
        template = path.with_suffix(".jinja")
        write_atomically(template, tokenizer.chat_template.encode())
    ends = stops(tokenizer, configured_stops(base))
    size, corrections, why_not = weight_bytes(job.source), Corrections(), None
    name: str | None = None
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        file = job.source.gguf
        if not file and size <= LOOKED_AT_BYTES:
            file, name = Path(temporary) / "base-F16.gguf", "an F16 file of the base"
            convert(base_folder(job), {"F16": file}, need_converter(job.llama_cpp_dir), job.reporter)
        if file:
            name, corrections = name or job.source.reference, corrections_of(file, tokenizer, ends)
            behaviour.write(folder, {FORM: measure_file(job, file, asked.folder, path)})
        else:
            why_not = f"no GGUF file of the base is here, and one of {bytes_text(size)} is not made for this"
    return Adapted(
        path=Path(path.name),
        bytes=made.bytes,
        layers=made.layers,
        template=Path(template.name) if template else None,
        corrections=corrections,
        base=name,
        why_not=why_not,
    )


ADAPTER = Step(
    name="adapter",
    does="the adapter alone, beside a GGUF of the base",
    command="ftkit ship",
    result=Adapted,
    after=(TRAIN, ADOPT, ASK, TRANSFER),
    costs=of_adapting,
    make=_make,
    applies=lambda job: job.recipe.ship.adapter,
)


def refuse_adapter(job: Job) -> None:
    """Raise RecipeError, ModelError or ToolMissingError, before the long work, where the step could not be made."""
    if not job.recipe.ship.adapter:
        return
    if job.recipe.training.method == "full":
        raise RecipeError("ship.adapter: training.method is full, which makes no adapter.", "leave it out: --set ship.adapter=false")
    if kind := next((key for key in ("use_dora", "modules_to_save", "target_parameters") if getattr(job.recipe.lora, key)), None):
        raise RecipeError(f"ship.adapter: a GGUF LoRA cannot hold lora.{kind}.", "leave one out: --set ship.adapter=false")
    if not find(job, ADAPTER):
        need_converter(job.llama_cpp_dir, LORA_CONVERTER)
    if trained := find(job, trained_by(job)):
        refuse_what_it_cannot_hold(trained.folder / "adapter")


@dataclass(frozen=True)
class ServedAdapter:
    """The adapter's file, and the command that serves it."""

    path: Path
    bytes: int
    serve: str
    base: str | None  # what BASE.gguf stands for in the command; None: the file is named there


def told_of(template: Path | None, corrections: Corrections) -> list[str]:
    """What llama-server is told of a base file, which stays as it is. It takes the last `--override-kv` alone, with commas between."""
    values = {
        "eot_token_id=int": corrections.eot_token_id,
        "add_bos_token=bool": None if corrections.add_bos_token is None else str(corrections.add_bos_token).lower(),
    }
    given = [f"tokenizer.ggml.{name}:{value}" for name, value in values.items() if value is not None]
    return [
        *(["--jinja", "--chat-template-file", str(template)] if template else []),
        *(["--override-kv", ",".join(given)] if given else []),
    ]


def adapter_files(made: Made[Adapted]) -> list[Path]:
    """What is handed on of it."""
    return [made.folder / path for path in (made.result.path, made.result.template) if path]


def served(job: Job, made: Made[Adapted], folder: Path) -> ServedAdapter:
    """How llama-server serves the adapter with the base, from the folder that is handed on."""
    adapted = made.result
    path, template = folder / adapted.path, folder / adapted.template if adapted.template else None
    told = ["llama-server", "-m", job.source.gguf or BASE, "--lora", path, *told_of(template, adapted.corrections)]
    return ServedAdapter(path, adapted.bytes, shlex.join(map(str, told)), None if job.source.gguf else job.source.reference)


def adapter_checks(job: Job, asked: Made[Asked], made: Made[Adapted]) -> list[Check]:
    """Base and adapter against the trained model, by what was recorded."""
    adapted, keep = made.result, job.recipe.ship.keep
    if adapted.why_not:
        return [not_made(f"{FORM}: {GAIN}", adapted.why_not)]
    forms = _forms(asked, made)
    return [
        Check(f"{FORM}: {check.name}", check.outcome, f"with {adapted.base}: {check.detail}")
        for check in (judge_gain(forms, FORM, keep), judge_distance(forms, FORM, keep))
    ]


def judge_adapter(job: Job, asked: Made[Asked], made: Made[Adapted]) -> list[Check]:
    """The same checks. Raises ProofError where one fails."""
    checks = adapter_checks(job, asked, made)
    if failing := next((check for check in checks if check.outcome == "failed"), None):
        kept = kept_beside(asked, made)
        raise ProofError(
            f"{made.result.path.name} beside its base does not answer as the trained model. {failing.words}",
            "ship without it: --set ship.adapter=false" + (f"; or allow it: --set ship.keep={math.floor(kept)}" if kept >= 0 else ""),
        )
    return checks


def kept_beside(asked: Made[Asked], made: Made[Adapted]) -> float:
    """The `ship.keep` that base and adapter would pass with."""
    return least_kept(_forms(asked, made), FORM)


def _forms(asked: Made[Asked], made: Made[Adapted]) -> dict[str, Behaviour]:
    return {**behaviour.read(asked.folder), **behaviour.read(made.folder)}

"""The step `merge`: adapter + base → the trained model in 16 bits, with the template, BOS and stops that it was trained with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.data.stops import seal
from ftkit.engines import hf
from ftkit.line.adopt import ADOPT, MODEL, TOKENIZER, lay_out, trained_tokenizer
from ftkit.line.job import Job, Onto, base_folder, computes_on
from ftkit.line.step import Made, Step
from ftkit.line.train import TRAIN
from ftkit.line.transfer import TRANSFER, Transferred, adapter_of
from ftkit.merge.stream import merge
from ftkit.model.given import tokenizer_files
from ftkit.model.source import drop_code
from ftkit.plan.cost import of_merging

__all__ = ["MERGE", "MODEL", "Merged"]
ONTO_WORDS: dict[Onto, str] = {"source": "the 16-bit source", "dequantised": "the dequantised 4-bit base"}


@dataclass(frozen=True)
class Merged:
    """`onto`: for a person. `stops`: ids that end an answer, the one that training learnt first."""

    onto: str
    stops: tuple[int, ...]


def _make(job: Job, folder: Path, trained: Made[Any], fitted: Made[Transferred] | None = None) -> Merged:
    target, tokenizer = folder / MODEL, trained_tokenizer(job, trained)
    if job.given and job.given.kind != "adapter":
        lay_out(trained.folder / MODEL, target, with_code=job.recipe.trust_remote_code)
        if not job.recipe.trust_remote_code:
            drop_code(target)
        return Merged(f"nothing: it was {'a GGUF' if job.given.kind == 'gguf' else 'a whole model'}", tuple(seal(target, tokenizer)))
    base = base_folder(job)
    if job.recipe.training.method == "full":
        shutil.copytree(trained.folder / MODEL, target)
        shutil.copy(base / "config.json", target)  # transformers writes some kinds of layers under names that the converter does not know
        if not job.recipe.trust_remote_code:
            drop_code(target)
        return Merged("nothing: all weights were trained", tuple(seal(target, tokenizer)))
    job.reporter.step("merging into the 16-bit source" if job.onto == "source" else "merging onto the dequantised base")
    target.mkdir()
    _, dtype = computes_on(job, hf.model_type(base))
    merge(
        base,
        adapter_of(trained, fitted),
        target,
        onto=job.onto,
        dtype=dtype,
        with_code=job.recipe.trust_remote_code,
        reporter=job.reporter,
    )
    if job.given:  # the tokenizer that was trained with, in place of the base's
        for file in tokenizer_files(target):
            file.unlink()
        for file in tokenizer_files(trained.folder / TOKENIZER):
            shutil.copyfile(file, target / file.name)
    words = f"{ONTO_WORDS[job.onto]}, {fitted.result.words}" if fitted else ONTO_WORDS[job.onto]
    return Merged(words, tuple(seal(target, tokenizer)))


MERGE = Step(
    name="merge",
    does="the trained model in 16 bits",
    command="ftkit ship",
    result=Merged,
    after=(TRAIN, ADOPT, TRANSFER),
    follows_from=lambda job: [job.onto],
    costs=of_merging,
    make=_make,
)

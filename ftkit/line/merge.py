"""The step `merge`: adapter + base → the trained model in 16 bits, with the template, BOS and stops that it was trained with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ftkit.data.stops import seal
from ftkit.line.job import Job, Onto, base_folder, computes_on, tokenizer_of
from ftkit.line.step import Made, Step
from ftkit.line.train import TRAIN, Trained
from ftkit.merge.stream import merge
from ftkit.model.source import drop_code
from ftkit.plan.cost import of_merging

MODEL = "model"
ONTO_WORDS: dict[Onto, str] = {"source": "the 16-bit source", "dequantised": "the dequantised 4-bit base"}


@dataclass(frozen=True)
class Merged:
    """`onto`: for a person. `stops`: ids that end an answer, the one that training learnt first."""

    onto: str
    stops: tuple[int, ...]


def _make(job: Job, folder: Path, trained: Made[Trained]) -> Merged:
    base, target = base_folder(job), folder / MODEL
    tokenizer = tokenizer_of(job, base, base=True)
    if job.recipe.training.method == "full":
        shutil.copytree(trained.folder / MODEL, target)
        shutil.copy(base / "config.json", target)  # transformers writes some kinds of layers under names that the converter does not know
        if not job.recipe.trust_remote_code:
            drop_code(target)
        return Merged("nothing: all weights were trained", tuple(seal(target, tokenizer)))
    job.reporter.step("merging into the 16-bit source" if job.onto == "source" else "merging onto the dequantised base")
    target.mkdir()
    _, bfloat16 = computes_on()
    merge(
        base,
        trained.folder / "adapter",
        target,
        onto=job.onto,
        bfloat16=bfloat16,
        with_code=job.recipe.trust_remote_code,
        reporter=job.reporter,
    )
    return Merged(ONTO_WORDS[job.onto], tuple(seal(target, tokenizer)))


MERGE = Step(
    name="merge",
    does="the trained model in 16 bits",
    command="ftkit ship",
    result=Merged,
    after=(TRAIN,),
    follows_from=lambda job: [job.onto],
    costs=of_merging,
    make=_make,
)

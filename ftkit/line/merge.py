"""The step `merge`: adapter + base → the trained model in 16 bits, with the template, BOS and stops that it was trained with."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.data.stops import seal
from ftkit.engines import hf
from ftkit.errors import DoesNotFitError
from ftkit.line.adopt import ADOPT, MODEL, TOKENIZER, lay_out, trained_tokenizer
from ftkit.line.job import Job, Onto, base_folder, base_to_fetch, config_folder, dtype_on
from ftkit.line.step import Made, Step, find
from ftkit.line.train import TRAIN
from ftkit.line.transfer import TRANSFER, Transferred, adapter_of
from ftkit.machine import device
from ftkit.merge.stream import merge
from ftkit.model.card import write_card
from ftkit.model.given import tokenizer_files
from ftkit.model.hub import fetch_file
from ftkit.model.open import open_shards
from ftkit.model.source import Shard, drop_code, shards_of
from ftkit.plan.cost import of_merging
from ftkit.units import bytes_text

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
        return Merged(f"nothing: it was {'a GGUF' if job.given.kind == 'gguf' else 'a whole model'}", _finish(job, target, tokenizer))
    base = config_folder(job)
    if job.recipe.training.method == "full":
        shutil.copytree(trained.folder / MODEL, target)
        shutil.copy(base / "config.json", target)  # transformers writes some kinds of layers under names that the converter does not know
        if not job.recipe.trust_remote_code:
            drop_code(target)
        return Merged("nothing: all weights were trained", _finish(job, target, tokenizer))
    job.reporter.step("merging into the 16-bit source" if job.onto == "source" else "merging onto the dequantised base")
    shards = open_shards(job.source, job.reporter) if _one_at_a_time(job) else shards_of(base_folder(job))
    target.mkdir(exist_ok=True)
    _refuse_full_disk(target, shards)
    fetched, missing = folder / "source", [shard for shard in shards if not shard.path]

    def fetch(name: str) -> Path:
        number, size = next((number, shard.size_bytes) for number, shard in enumerate(missing, 1) if shard.name == name)
        job.reporter.step(f"fetching {name} of {job.source.reference}: {bytes_text(size)}, file {number} of {len(missing)}")
        return fetch_file(job.source, name, fetched, job.reporter)

    dtype = dtype_on(device.choose(), job.recipe, hf.model_type(base))
    merge(
        base,
        adapter_of(trained, fitted),
        target,
        rounding=job.rounding,
        dtype=dtype,
        with_code=job.recipe.trust_remote_code,
        shards=shards,
        fetch=fetch,
        reporter=job.reporter,
    )
    shutil.rmtree(fetched, ignore_errors=True)
    if job.given:  # the tokenizer that was trained with, in place of the base's
        for file in tokenizer_files(target):
            file.unlink()
        for file in tokenizer_files(trained.folder / TOKENIZER):
            shutil.copyfile(file, target / file.name)
    words = [ONTO_WORDS[job.onto]]
    if job.rounded:
        words.append(f"with {100 * job.rounding:g} % of the rounding that it was trained with")
    elif job.recipe.ship.rounding_kept and not job.rounding:
        words.append("which has no rounding to keep")
    if fitted:
        words.append(fitted.result.words)
    return Merged(", ".join(words), _finish(job, target, tokenizer))


def _finish(job: Job, target: Path, tokenizer: Any) -> tuple[int, ...]:
    """The model's card, and the template and stops that it was trained with; the stops."""
    write_card(target, job.source, has_base=job.has_base)
    return tuple(seal(target, tokenizer))


def _merges(job: Job) -> bool:
    """Whether there is an adapter to be merged."""
    return job.recipe.training.method != "full" and (not job.given or job.given.kind == "adapter")


def _one_at_a_time(job: Job) -> bool:
    """Whether files of the source are fetched, merged and let go one after the other: then a merge that was stopped goes on."""
    return not find(job, MERGE) and base_to_fetch(job).at_once_bytes > 0


def _refuse_full_disk(target: Path, shards: Sequence[Shard]) -> None:
    """Raise DoesNotFitError where the merged files, and the largest of those that are fetched one at a time, have no room."""
    left = [shard for shard in shards if shard.path or not (target / shard.name).is_file()]
    needed = sum(shard.size_bytes for shard in left) + max((shard.size_bytes for shard in left if not shard.path), default=0)
    if needed > (free := shutil.disk_usage(target).free):
        raise DoesNotFitError(
            f"The merge writes {bytes_text(needed)} to {target.parent}, where {bytes_text(free)} are free.",
            "free some space, or put the run elsewhere with --run-dir",
        )


MERGE: Step[Merged] = Step(
    name="merge",
    does="the trained model in 16 bits",
    command="ftkit ship",
    result=Merged,
    after=(TRAIN, ADOPT, TRANSFER),
    follows_from=lambda job: [job.onto, *job.rounded, *(["rounded by chance"] if _merges(job) else [])],
    costs=of_merging,
    make=_make,
    resumable=_one_at_a_time,
)

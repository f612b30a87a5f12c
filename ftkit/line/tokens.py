"""The dataset in tokens: written down by the plan as it counts them, and taken by the training, so that it is tokenised once.

It lies in the plan's folder until a training takes it, or the next plan; beside the rows stands what they follow from.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ftkit.data.lengths import Tally, tally
from ftkit.data.mask import KINDS, cut, learnt
from ftkit.data.store import store_examples, stored_examples, storing
from ftkit.files import cache_folder, fingerprint
from ftkit.line.job import Job, Rows
from ftkit.line.step import write_json
from ftkit.train.staging import is_remote

FOLDER, RECORD = "tokens", "tokens.json"
MOST_BYTES = 1 << 30  # of a file: about 130 million tokens; more of them are tokenised again to be trained on
VERSIONS = ("ftkit", "tokenizers", "transformers")


def _follows_from(job: Job) -> str:
    """What the tokens of this job are known by."""
    recipe = job.recipe
    return fingerprint(
        FOLDER,
        job.source.fingerprint,
        {purpose: files.fingerprint for purpose, files in job.data.items() if purpose != "test"},
        recipe.data.model_dump(exclude={"train", "validation", "test", "template"}),
        job.chat_template,
        recipe.training.model_dump(include={"max_length", "objective", "seed"}),
        recipe.trust_remote_code,
        {name: version(name) for name in VERSIONS},
    )


def _parts(rows: Rows) -> dict[str, Any]:
    return {"train": rows.train, "validation": rows.validation}


def _find(job: Job, *folders: Path) -> tuple[Path, list[Tally]] | None:
    """The first of these folders, or the last plan's, that holds this job's tokens, and what was counted of them."""
    plan = job.run.finished("plan")
    for folder in (*folders, *([plan.folder / FOLDER] if plan else [])):
        try:
            kept = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if kept["follows_from"] == _follows_from(job):
                lists = ({"lengths": array("l", each["lengths"]), "kept": array("l", each["kept"])} for each in kept["counted"])
                return folder, [Tally(**{**each, **arrays}) for each, arrays in zip(kept["counted"], lists, strict=True)]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def count(job: Job, tokenizer: Any, rows: Rows, folder: Path | None) -> tuple[Tally, ...]:
    """The dataset in tokens, (training, validation), each row looked at as the trainer sees it.

    They stay in a plan's `folder`; but not of a plan without a recipe, which nothing is trained by, nor on a drive that is mounted
    from elsewhere.
    """
    if folder and (folder.is_relative_to(cache_folder()) or is_remote(folder)):
        folder = None
    if found := _find(job):
        if folder:
            shutil.move(found[0], folder / FOLDER)
        return tuple(found[1])
    objective, max_length = job.recipe.training.objective, job.recipe.training.max_length

    def passing(name: str, part: Any) -> Iterator[Any]:
        examples = learnt(tokenizer, part, objective)
        return storing(examples, folder / FOLDER / f"{name}.arrow", KINDS[objective], max_length, MOST_BYTES) if folder else examples

    counted = tuple(tally(passing(name, part), max_length) for name, part in _parts(rows).items())
    if folder and all((folder / FOLDER / f"{name}.arrow").exists() for name in _parts(rows)):
        told = [{**asdict(each), "lengths": list(each.lengths), "kept": list(each.kept)} for each in counted]
        write_json(folder / FOLDER / RECORD, {"follows_from": _follows_from(job), "counted": told})
    return counted


def take(job: Job, tokenizer: Any, rows: Rows, folder: Path) -> list[Any]:
    """What is trained on and validated with, two `datasets.Dataset`, in `folder`: the plan's, or what a killed training left there."""
    found, objective = _find(job, folder), job.recipe.training.objective
    if found and found[0] != folder:
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(f".{folder.name}.partial")  # the folder may be on another disk
        shutil.rmtree(partial, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(found[0], partial)
        partial.rename(folder)
    if found:
        return [stored_examples(folder / f"{name}.arrow") for name in _parts(rows)]
    (folder / RECORD).unlink(missing_ok=True)
    return [
        store_examples(cut(learnt(tokenizer, part, objective), job.recipe.training.max_length), folder / f"{name}.arrow", KINDS[objective])
        for name, part in _parts(rows).items()
    ]

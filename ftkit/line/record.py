"""What is handed on: one folder of the run with the file that ships, its Modelfile, its record and its card.

Its name stays the same, whatever the steps are called; it holds what last passed the proof, and nothing of the machine that it was
made on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ftkit.errors import ModelError, RecipeError, RunError
from ftkit.files import cache_folder, disk_fault, file_fingerprint, sync_folder, user_path, write_atomically
from ftkit.gguf.says import says, tensors, types_of
from ftkit.line.choose import Weighed
from ftkit.line.close import Closed, Shipping
from ftkit.line.job import Job, base_folder, tokenizer_of
from ftkit.line.merge import MODEL, Merged
from ftkit.line.prove import Proof, Proven, limits_of
from ftkit.line.step import Made
from ftkit.machine.llama_cpp import Found, find_converter, find_program
from ftkit.model.card import licence, reference_of
from ftkit.model.dataset import HubData
from ftkit.model.source import open_gguf, weight_files
from ftkit.proof.record import (
    CARD,
    PROBES,
    RECORD,
    Probes,
    Record,
    ShippedFile,
    probes_beside,
    probes_text,
    read_probes,
    read_record,
    write_record,
)
from ftkit.report.card import card
from ftkit.run import RECORD as STEP_RECORD

SHIPPED = "shipped"  # in the run directory
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")  # of the hub


def shipped_folder(job: Job) -> Path:
    return job.run.folder / SHIPPED


def hand_over(
    job: Job, merged: Made[Merged], shipped: Shipping, proven: Made[Proven], trained: Made[Any], closed: Closed | None, proof: Proof,
    weighed: Sequence[Weighed] = (), beside: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """The folder, with all that is new in it; the record. Raises RunError where the disk refuses.

    `beside`: other files that are handed on, as those of the adapter alone.

    The file is linked, so that it takes its place on the disk once; where a disk knows no links, it is copied.
    """
    folder = shipped_folder(job)
    try:
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".*.partial"):
            left.unlink()
        others = {path.name: path for path in beside}
        hashes = _hashes(job, {shipped.path.name: shipped.path, **others, **_adapter(job, trained), **_base(job), **_data(job)})
        old, untouched = _last(folder)
        same = old if old and untouched and old.file.sha256 == hashes[shipped.path.name] else None
        record = _record(job, merged, shipped, proven, trained, closed, proof, weighed, hashes, same)
        record = replace(record, beside={name: hashes[name] for name in others})
        _write(job, record, _probes(folder, proven, shipped, same), (shipped.path, *beside), old, untouched=untouched)
    except OSError as error:
        fault = disk_fault(error) or error.strerror
        raise RunError(f"Cannot write to {folder}: {fault}.", "free some space, or put the run elsewhere with --run-dir") from None
    return folder / RECORD


def _write(job: Job, record: Record, probes: Probes | None, files: Sequence[Path], old: Record | None, *, untouched: bool) -> None:
    """What was handed over before goes first, and the record comes last: it never stands beside another file than its own.

    A card that somebody changed stays.
    """
    folder = shipped_folder(job)
    texts = {**({PROBES: probes_text(probes)} if probes else {}), CARD: card(record).encode()}
    written = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    record, card_file = replace(record, beside={**record.beside, **written}), folder / CARD
    if old == record and untouched and _is_there(folder, record, files):
        return
    by_hand = old and card_file.is_file() and file_fingerprint(card_file) != old.beside.get(CARD)
    if not old or old.file != record.file:
        (folder / RECORD).unlink(missing_ok=True)
    for name in {old.file.name, *old.beside} - {record.file.name, *record.beside, CARD, PROBES} if old else ():
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    for path in files:
        _link(path, folder / path.name)
    if probes:
        write_atomically(folder / PROBES, texts[PROBES])
    else:
        (folder / PROBES).unlink(missing_ok=True)
    if by_hand:
        job.reporter.warn(f"{card_file} was changed by hand and stays; to have ftkit's own again, remove it: ftkit ship writes it")
    else:
        write_atomically(card_file, texts[CARD])
    write_record(folder / RECORD, record)


def _is_there(folder: Path, record: Record, files: Sequence[Path]) -> bool:
    """Whether all that belongs to this record lies in the folder."""
    probes, recorded = folder / PROBES, record.beside.get(PROBES)
    same_probes = file_fingerprint(probes) == recorded if probes.is_file() else recorded is None
    return same_probes and (folder / CARD).is_file() and all(_is_linked(path, folder / path.name) for path in files)


def _is_linked(source: Path, target: Path) -> bool:
    """Whether the two are one file; or where no link could be made, a copy that nobody touched."""
    if not target.is_file():
        return False
    there, here = target.stat(), source.stat()
    return target.samefile(source) or (there.st_size, there.st_mtime_ns) == (here.st_size, here.st_mtime_ns)


def _link(source: Path, target: Path) -> None:
    if _is_linked(source, target):
        return
    partial = target.with_name(f".{target.name}.partial")
    try:
        os.link(source.resolve(), partial)  # where it is a link itself, to what it names
    except OSError:
        shutil.copy2(source, partial)
    partial.replace(target)
    sync_folder(target.parent)


def _last(folder: Path) -> tuple[Record | None, bool]:
    """What was handed over before, and whether nobody changed its record."""
    try:
        return read_record(folder / RECORD)
    except ModelError:
        return None, False


def _probes(folder: Path, proven: Made[Proven], shipped: Shipping, same: Record | None) -> Probes | None:
    """Those of the proof, with each tensor's hash; None of a run that an earlier ftkit proved. `same`: the last record of this file."""
    if not (proven.folder / PROBES).is_file():
        return None
    last = probes_beside(folder / RECORD, same)[0] if same else None
    return replace(read_probes(proven.folder / PROBES), tensors=last.tensors if last else tensors(open_gguf(shipped.path)))


def _record(
    job: Job, merged: Made[Merged], shipped: Shipping, proven: Made[Proven], trained: Made[Any], closed: Closed | None,
    proof: Proof, weighed: Sequence[Weighed], hashes: Mapping[str, str], same: Record | None,
) -> Record:  # fmt: skip
    """`same`: the last record of this file, whose metadata need not be read again; that takes seconds where there are many tokens."""
    recipe, tokenizer, reader = job.recipe, tokenizer_of(job, merged.folder / MODEL), None if same else open_gguf(shipped.path)
    stops, texts = merged.result.stops, tokenizer.convert_ids_to_tokens(list(merged.result.stops))
    scores = {name: {**asdict(score), "percent": score.percent} for name, score in proof.scores.items()}
    forms = {name: asdict(form) for name, form in proof.forms.items()}
    learnt = {key: value for key, value in asdict(trained.result).items() if key != "curve"}
    record = Record(
        name=recipe.ship.name,
        file=ShippedFile(
            shipped.path.name,
            hashes[shipped.path.name],
            shipped.path.stat().st_size,
            shipped.file.quantization,
            round(shipped.file.bits_per_weight, 4),
        ),
        says=same.says if same else says(reader),
        tensor_types=same.tensor_types if same else types_of(reader),
        stops=[{"id": token, "token": str(text)} for token, text in zip(stops, texts, strict=True)],
        base=_base_words(job, hashes),
        trained={**learnt, "sha256": {name: hashes[name] for name in _adapter(job, trained)}},
        data=_data_words(job, hashes),
        settings=_settings(job),
        versions={
            "training": _made_with(trained),
            "shipping": _made_with(proven),
            "llama.cpp": {
                "converter": _build(find_converter(job.llama_cpp_dir)),
                "llama-quantize": _build(find_program("llama-quantize", job.llama_cpp_dir)),
            },
        },
        merged_onto=merged.result.onto,
        closed={key: value for key, value in asdict(closed).items() if key != "file"} if closed else None,
        proof={
            "limits": limits_of(recipe),
            "right_by": proof.right_by,
            "checks": [asdict(check) for check in proof.checks],
            "scores": scores,
            "forms": forms,
            "weighed": [asdict(one) for one in weighed],
            "bits_by_task": {key: value for key, value in asdict(shipped.bits).items() if key != "file"} if shipped.bits else None,
            "same_answers": asdict(proof.same_answers) if proof.same_answers else None,
        },
        beside={},
    )
    kept = _without_places(job, json.loads(json.dumps(asdict(record), default=str)))
    kept["settings"]["ship"]["system"] = recipe.ship.system  # the user's own words, as in the Modelfile
    return Record(**{**kept, "file": record.file})


def _build(found: Found | None) -> str | None:
    """Which llama.cpp, without its place."""
    if not found:
        return None
    return found.build if found.where.startswith("ftkit setup") else f"the user's own, found by {found.where}"


def _made_with(made: Made[Any]) -> dict[str, str]:
    """Versions that a step was made with; nothing of one that an earlier ftkit made."""
    try:
        return dict(json.loads((made.folder / STEP_RECORD).read_text(encoding="utf-8")).get("made_with", {}))
    except (OSError, ValueError):
        return {}


def _settings(job: Job) -> dict[str, Any]:
    """The recipe, files by their names."""

    def named(text: str) -> str:
        with suppress(OSError, ValueError, RecipeError):
            path = job.folder / user_path(text)
            return path.resolve().name if text and path.exists() else text
        return text

    settings: dict[str, Any] = _mapped(job.recipe.model_dump(mode="json", exclude={"tools"}), named)
    return settings


def _base(job: Job) -> dict[str, Path]:
    """The base's files, by the names that they have in the record; a hub model is known by its commit."""
    if job.source.gguf:
        return {f"base/{job.source.gguf.name}": job.source.gguf}
    if job.source.kind == "hub":
        return {}
    folder = base_folder(job)
    return {f"base/{path.name}": path for path in (folder / "config.json", *weight_files(folder), *sorted(folder.glob("tokenizer*.json")))}


def _base_words(job: Job, hashes: Mapping[str, str]) -> dict[str, Any]:
    source = job.source
    return {
        "reference": reference_of(source),
        "kind": source.kind,
        "revision": source.fingerprint if source.kind == "hub" else None,
        "sha256": {name.removeprefix("base/"): hashes[name] for name in _base(job)},
        "licence": licence(source),
    }


def _adapter(job: Job, trained: Made[Any]) -> dict[str, Path]:
    """What was trained: the adapter, or of a full training the weights."""
    folder = trained.folder / (MODEL if job.recipe.training.method == "full" else "adapter")
    return {f"{folder.name}/{path.name}": path for path in (*weight_files(folder), *folder.glob("adapter_config.json"))}


def _data(job: Job) -> dict[str, Path]:
    """The dataset's own files; of the hub's the commit is known."""
    return {
        f"data/{purpose}/{number}": path
        for purpose, data in job.data.items()
        for number, path in enumerate(data.files)
        if isinstance(path, Path)
    }


def _data_name(file: Path | HubData) -> str:
    return file.name if isinstance(file, Path) else f"{file.repository}@{file.commit}:{file.part}"


def _data_words(job: Job, hashes: Mapping[str, str]) -> dict[str, Any]:
    return {
        purpose: [{"name": _data_name(file), "sha256": hashes.get(f"data/{purpose}/{number}")} for number, file in enumerate(data.files)]
        for purpose, data in job.data.items()
    }


def _hashes(job: Job, files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of files, by the names that the record has for them. What was hashed is known again by its size and time."""
    known, found, slow = job.run.manifest().get("hashes", {}), {}, 0
    for name, path in files.items():
        if not path.is_file():
            continue
        stat = path.stat()
        seen = [stat.st_size, stat.st_mtime_ns]
        if known.get(name, {}).get("seen") != seen:
            slow += 1
            if slow == 1:
                job.reporter.step("recording what was made of what")
            known[name] = {"seen": seen, "sha256": file_fingerprint(path)}
        found[name] = known[name]["sha256"]
    if slow:
        job.run.record(hashes={name: known[name] for name in found})
    return found


def _without_places(job: Job, value: Any) -> Any:
    """Texts without this machine's folders and without tokens of the hub."""
    from ftkit.model.hub import hub_cache

    places = {job.folder, job.run.folder, Path.home(), Path.cwd(), cache_folder(), hub_cache(), Path(tempfile.gettempdir())}
    named = sorted({str(place) for path in places for place in (path, path.resolve()) if place.parent != place}, key=len, reverse=True)

    def cleaned(text: str) -> str:
        for place in named:
            text = text.replace(place + os.sep, "").replace(place, Path(place).name)
        return TOKEN.sub("hf_…", text)

    return _mapped(value, cleaned)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    return [_mapped(entry, change) for entry in value] if isinstance(value, list) else value

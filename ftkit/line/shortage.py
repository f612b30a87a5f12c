"""What the steps to come need of this machine, and it does not have: said before the long work."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftkit.engines.ollama import models_folder
from ftkit.errors import DoesNotFitError
from ftkit.files import size_bytes
from ftkit.line.job import Job, ToFetch
from ftkit.machine.device import Device, processor
from ftkit.model.hub import hub_cache
from ftkit.plan.cost import MERGE, OLLAMAS_MODELS, RUN_FOLDER, TRAIN, Cost, disk_by_place
from ftkit.units import bytes_text


@dataclass(frozen=True)
class Shortage:
    """One thing that is too small."""

    what: str  # "RAM", or the folders on the disk that is too small
    step: str | None  # that needs the RAM
    needed_bytes: int
    available_bytes: int

    @property
    def words(self) -> str:
        needed, available = bytes_text(self.needed_bytes), bytes_text(self.available_bytes)
        if self.step:
            return f"`{self.step}` needs {needed} of {self.what}, and this machine has {available}"
        return f"the steps to come write {needed} to {self.what}, where {available} are free"


def shortages(job: Job, costs: Sequence[Cost], fetch: ToFetch, *, begun: Path | None = None, trained: bool = False) -> list[Shortage]:
    """Of the steps after the plan; `trained`: of those after training alone.

    What a training that was `begun` in this folder has written already is not needed once more.
    """
    found, costs = [], [cost for cost in costs if not cost.if_needed]
    held = size_bytes(begun) if begun and begun.is_dir() else 0
    by_disk: dict[int, list[tuple[Path, Path, int]]] = {}  # a folder, what is there already of its path, bytes
    for folder, size in disk_by_folder(job, costs, fetch, trained=trained).items():
        size -= min(size, held) if folder == job.run.folder else 0
        if size:
            there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
            by_disk.setdefault(there.stat().st_dev, []).append((folder, there, size))
    for entries in by_disk.values():
        size, free = sum(size for _, _, size in entries), shutil.disk_usage(entries[0][1]).free
        if size > free:
            found.append(Shortage(" and ".join(str(folder) for folder, _, _ in entries), None, size, free))
    if hungry := ram_shortage(costs, processor().total_bytes):
        found.append(hungry)
    if job.device.kind == "cuda" and (hungry := vram_shortage(costs, job.device)):
        found.append(hungry)
    return found


def disk_by_folder(job: Job, costs: Sequence[Cost], fetch: ToFetch, *, trained: bool = False) -> dict[Path, int]:
    """The most bytes that the steps write into each folder. A file of the base that is fetched for the merge alone is gone after it."""
    sizes = disk_by_place(costs, trained=trained)
    merging = fetch.at_once_bytes + sum(cost.disk_bytes for cost in costs if cost.name == MERGE)
    found = {hub_cache(): 0 if fetch.at_once_bytes else fetch.bytes, job.run.folder: max(sizes[RUN_FOLDER], merging)}
    if (models := models_folder()) and models.is_dir():  # None: another machine's; none there: no server keeps anything there
        found[models] = sizes[OLLAMAS_MODELS]
    return {folder: size for folder, size in found.items() if size}


def ram_shortage(costs: Sequence[Cost], total_bytes: int) -> Shortage | None:
    """The step after training that needs more RAM than there is, if one does. Asking can be slow or left out, and is none."""
    hungry = max((cost for cost in costs if cost.name != TRAIN and cost.needed), key=lambda cost: cost.peak_ram_bytes)
    return Shortage("RAM", hungry.name, hungry.peak_ram_bytes, total_bytes) if hungry.peak_ram_bytes > total_bytes else None


def vram_shortage(costs: Sequence[Cost], card: Device) -> Shortage | None:
    """The step after training that needs more of the GPU's memory than there is, if one does."""
    hungry = max((cost for cost in costs if cost.name != TRAIN and cost.needed), key=lambda cost: cost.vram_bytes)
    return Shortage(card.name, hungry.name, hungry.vram_bytes, card.total_bytes) if hungry.vram_bytes > card.total_bytes else None


def refuse_shortages(found: Sequence[Shortage]) -> None:
    """Raise DoesNotFitError before long work whose result could not be shipped from here."""
    if found:
        raise DoesNotFitError(
            f"This machine is too small for what follows: {'; '.join(shortage.words for shortage in found)}.",
            "free some space, put the run elsewhere with --run-dir, or --set a smaller model"
            + ("; to ship the file as it was quantised: --set ship.closing_steps=0" if any(_closes(one) for one in found) else ""),
        )


def _closes(shortage: Shortage) -> bool:
    return (shortage.step or "").startswith("close ")

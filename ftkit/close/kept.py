"""What an interrupted closing goes on from: distributions that were read, and how far its steps were at their last check.

All of it is safetensors, whole files alone; a file that cannot be read, or is of other rows, is as if it were not there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.close.closing import Distribution, Progress, distribution
from ftkit.engines.logits import Forced
from ftkit.files import fingerprint, write_atomically
from ftkit.plan.cost import Way

if TYPE_CHECKING:
    import numpy as np
    import torch

ROWS_A_FILE = 16
CHECKPOINT, STATE = "checkpoint-", "closing.safetensors"  # a folder a check, named by its step


def readings(
    folder: Path, rows: Sequence[Forced], read: Callable[[Sequence[Forced]], Iterator[np.ndarray[Any, Any]]]
) -> list[Distribution]:
    """Of each row what `read` finds of it, some rows a file; it is asked for those alone that are in no file yet."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    parts = [rows[begin : begin + ROWS_A_FILE] for begin in range(0, len(rows), ROWS_A_FILE)]
    paths = [folder / f"{number}.safetensors" for number in range(len(parts))]
    found: list[Distribution] = []
    for path, part in zip(paths, parts, strict=True):
        if (kept := _read(path, _mark(part))) is None:
            break
        sizes = [len(row.places) for row in part]
        split = (torch.split(kept[0][name], sizes) for name in ("ids", "likeliest", "rest"))
        found += [Distribution(*one) for one in zip(*split, strict=True)]
    if len(found) == len(rows):
        return found
    begin, told = len(found) // ROWS_A_FILE, read(rows[len(found) :])
    for path, part in zip(paths[begin:], parts[begin:], strict=True):
        new = [distribution(next(told)) for _ in part]
        columns = dict(zip(("ids", "likeliest", "rest"), map(torch.cat, zip(*map(_fields, new), strict=True)), strict=True))
        _write(path, columns, _mark(part))
        found += new
    for _ in told:  # to its end, so that it lets its model go
        pass
    return found


def _fields(one: Distribution) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return one.ids, one.likeliest, one.rest


def _mark(rows: Sequence[Forced]) -> dict[str, Any]:
    return {"rows": fingerprint([astuple(row) for row in rows])}


def keep(folder: Path, progress: Progress, way: Way | None = None) -> None:
    """The state of a check in the place of the one before, and how a file's weights were computed with."""
    tensors = {f"values.{n}": value for n, value in enumerate(progress.values)}
    tensors |= {f"best.{n}": value.clone() for n, value in enumerate(progress.best_values)}  # may be the same tensors
    tensors |= {f"optimizer.{n}.{name}": value for n, state in progress.optimizer.items() for name, value in state.items()}
    said = {"step": progress.step, "best": progress.best, "best_step": progress.best_step, "worse": progress.worse, "way": way}
    here = folder / f"{CHECKPOINT}{progress.step}"
    here.mkdir(parents=True, exist_ok=True)
    _write(here / STATE, tensors, said)
    for other in folder.glob(f"{CHECKPOINT}*"):
        if other != here:
            shutil.rmtree(other, ignore_errors=True)


def last(folder: Path) -> tuple[Progress, Way | None] | None:
    """The last check that was kept, and its way."""
    steps = [int(path.name.removeprefix(CHECKPOINT)) for path in folder.glob(f"{CHECKPOINT}*") if path.name[len(CHECKPOINT) :].isdecimal()]
    for step in sorted(steps, reverse=True):
        if found := _read(folder / f"{CHECKPOINT}{step}" / STATE):
            tensors, said = found
            optimizer: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith("optimizer."):
                    _, number, key = name.split(".")
                    optimizer.setdefault(int(number), {})[key] = value
            way = said.pop("way")
            return Progress(**said, values=_numbered(tensors, "values"), best_values=_numbered(tensors, "best"), optimizer=optimizer), way
    return None


def _numbered(tensors: Mapping[str, torch.Tensor], what: str) -> list[torch.Tensor]:
    return [tensors[f"{what}.{n}"] for n in range(sum(name.startswith(f"{what}.") for name in tensors))]


def _write(path: Path, tensors: Mapping[str, torch.Tensor], said: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    write_atomically(path, save({name: value.cpu().contiguous() for name, value in tensors.items()}, {"ftkit": json.dumps(said)}))


def _read(path: Path, wanted: Mapping[str, Any] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors, and what was said of them; None where it is not there, not whole, or not what is wanted."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["ftkit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return None
    return (tensors, said) if wanted is None or said == wanted else None

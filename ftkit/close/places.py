"""Where in a model each quantised tensor of its file is: found by its numbers, as a converter renames, reorders, splits and joins weights.

A row that was rounded still points where it did. Of a merged SmolLM2-135M's widest matrices in TQ1_0 the cosine of a row to that which it
was made of is 0.67 to 0.70 by the median, and 0.465 at least; to another row's it is about nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftkit.gguf.types import NO_TEXT
from ftkit.model.source import in_file

if TYPE_CHECKING:
    import torch

    from ftkit.close.packed import Blocks

SAME = 0.5  # cosine of two rows of which one was made of the other, by the median; of each at least half of it
LONGER = 2.0  # times as long as the row that it was made of, or less than the half: a multiple, which some converters write
LOOKED_AT = 64  # rows by which it is seen whether they stand as they did
SKETCH = 256  # random directions by which rows that do not are compared
AT_ONCE = 1024  # rows


@dataclass(frozen=True)
class Place:
    """The parameter, and which of its rows the tensor's are, in the tensor's order; None: all, as they stand. So of `columns`.

    `turned`: the parameter has rows as its columns, as some models keep experts. Of experts, each has them so.
    """

    parameter: str
    rows: torch.Tensor | None = None
    turned: bool = False
    columns: torch.Tensor | None = None

    def at(self, which: slice) -> slice | torch.Tensor:
        """Where in the parameter some of the tensor's rows are."""
        return which if self.rows is None else self.rows[which]

    def in_columns(self, numbers: torch.Tensor) -> torch.Tensor:
        """(rows, columns) of the tensor, its columns in the parameter's order."""
        return numbers if self.columns is None else numbers[:, self.columns.argsort()]


def places(
    parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, Blocks], names: Any, unread: Collection[str] = ()
) -> dict[str, Place]:
    """Of each tensor, by its name; `names`: gguf's map from transformers' names, which are looked at first. `unread`: those that may be
    in no parameter.

    Raises ValueError where one is in no parameter, or one of those is not there whole.
    """
    found: dict[str, Place] = {}
    for name, blocks in tensors.items():
        if not (likely := _likely(name, parameters, names)):
            continue  # of a layer that the model has not, as those that guess tokens ahead
        if not (place := next(_places_of(blocks, parameters, likely), None)):
            if name in unread:
                continue
            raise ValueError(f"no weight of the model is {name}, whatever the order of its rows")
        found[name] = place
    for parameter in {place.parameter for place in found.values()}:
        there = [(tensors[name].rows_count, place) for name, place in found.items() if place.parameter == parameter]
        filled = {row for count, place in there for row in (range(count) if place.rows is None else place.rows.tolist())}
        rows = parameters[parameter].shape[-1 if there[0][1].turned else -2]
        if filled != set(range(rows)) or sum(count for count, _ in there) > rows:
            raise ValueError(f"{parameter} has {rows} rows, of which the file has {len(filled)}")
    return found


def _likely(tensor: str, parameters: Mapping[str, torch.Tensor], names: Any) -> list[str]:
    """Parameters that may hold it: that of its name, and those of its layer, or of none."""
    beside = [name for name in parameters if re.findall(r"\.(\d+)\.", name)[:1] == _layer(tensor) and not NO_TEXT.search(name)]
    return sorted(beside, key=lambda name: in_file(name, names) != tensor)


def _layer(tensor: str) -> list[str]:
    """Its number, or nothing where it is in none."""
    return re.findall(r"^blk\.(\d+)\.", tensor)


def _places_of(blocks: Blocks, parameters: Mapping[str, torch.Tensor], likely: list[str]) -> Iterator[Place]:
    """What is cheaper to find comes first: rows that stand as they did, and of layers such as do not, and columns that do not."""
    fitting = [
        (name, turned, weight)
        for name in likely
        for turned in (False, True)
        if (weight := _as_rows(parameters[name], blocks, turned=turned)) is not None
    ]
    for name, turned, weight in fitting:
        if (start := _standing(blocks, weight)) is not None:
            yield Place(name, None if blocks.rows_count == len(weight) else start + _range(blocks.rows_count), turned)
    if not _layer(blocks.name):
        return  # tables of tokens, of hundreds of thousands of rows, which no converter turns
    for name, turned, weight in fitting:
        if (rows := _rows(blocks, weight)) is not None:
            yield Place(name, rows, turned)
    for name, turned, weight in fitting:
        if blocks.rows_count == len(weight) and (columns := _columns(blocks, weight)) is not None:
            yield Place(name, None, turned, columns)


def _as_rows(parameter: torch.Tensor, blocks: Blocks, *, turned: bool) -> torch.Tensor | None:
    """(rows, columns) of a parameter, of experts the first one's, where it can hold the tensor."""
    weight = parameter.detach()
    if weight.ndim != blocks.data.ndim or (weight.ndim > 2 and len(weight) != len(blocks.data)) or (turned and weight.ndim < 3):
        return None
    weight = weight[0] if weight.ndim > 2 else weight
    weight = weight.T if turned else weight
    return weight if weight.shape[1] == blocks.columns and len(weight) >= blocks.rows_count else None


def _standing(blocks: Blocks, weight: torch.Tensor) -> int | None:
    """From which row on the parameter's are the tensor's. Raises ValueError where they are multiples."""
    from torch.nn.functional import cosine_similarity

    some = _spread(blocks.rows_count, LOOKED_AT)
    rows = _numbers(blocks, some)
    for start in range(0, len(weight) - blocks.rows_count + 1, blocks.rows_count):
        there = weight[start + some].float().cpu()
        told = (rows != 0).any(1) & (there != 0).any(1)
        if not told.any() and not there.any():
            return start
        if told.any() and _alike(cosine_similarity(rows, there)[told]):
            _refuse_multiple(blocks.name, rows[told], there[told])
            return start
    return None


def _refuse_multiple(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    times = float(ours.norm() / theirs.norm())
    if not 1 / LONGER < times < LONGER:
        raise ValueError(f"{name} is {times:.2g} times the model's weight")


def _alike(cosines: torch.Tensor) -> bool:
    return bool(cosines.median() > SAME) and bool(cosines.min() > SAME / 2)


def _rows(blocks: Blocks, weight: torch.Tensor) -> torch.Tensor | None:
    """Which row of the parameter each of the tensor's is."""
    import torch

    directions = torch.randn(blocks.columns, SKETCH, generator=torch.Generator().manual_seed(0))
    sketch = torch.cat([_numbers(blocks, which) @ directions for which in torch.split(_range(blocks.rows_count), AT_ONCE)])
    return _nearest(blocks.name, sketch, torch.cat([some.float().cpu() @ directions for some in torch.split(weight, AT_ONCE)]))


def _columns(blocks: Blocks, weight: torch.Tensor) -> torch.Tensor | None:
    """Which column of the parameter each of the tensor's is, by some of their rows."""
    some = _spread(blocks.rows_count, SKETCH)
    return _nearest(blocks.name, _numbers(blocks, some).T, weight[some].float().cpu().T)


def _nearest(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor | None:
    """Which of `theirs` each of `ours` points like, where each points like another; those of nothing but zeros are what is left.

    Raises ValueError where they are multiples.
    """
    import torch
    from torch.nn.functional import normalize

    told = ours.any(1)
    if not told.any():
        return None
    there = normalize(theirs).T
    compared = [(some @ there).max(1) for some in torch.split(normalize(ours[told]), AT_ONCE)]
    nearest = torch.cat([which for _, which in compared])
    if not _alike(torch.cat([cosines for cosines, _ in compared])) or len(set(nearest.tolist())) < len(nearest):
        return None
    _refuse_multiple(name, ours[told], theirs[nearest])
    left = sorted(set(range(len(theirs))) - set(nearest.tolist()))
    if theirs[left].any() and len(nearest) < len(ours):
        return None
    found = _range(len(ours))
    found[told], found[~told] = nearest, found.new_tensor(left[: len(ours) - len(nearest)])
    return found


def _numbers(blocks: Blocks, which: torch.Tensor) -> torch.Tensor:
    """Some rows of the tensor, of experts of the first."""
    import torch

    return (blocks.expert(0) if blocks.data.ndim > 2 else blocks).rows(which, torch.device("cpu"), torch.float32)


def _spread(count: int, most: int) -> torch.Tensor:
    """Numbers of some rows, evenly."""
    import torch

    return torch.linspace(0, count - 1, min(most, count)).round().long()


def _range(count: int) -> torch.Tensor:
    import torch

    return torch.arange(count)

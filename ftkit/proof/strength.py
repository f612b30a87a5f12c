"""How much of what an adapter changes stands in a file's weights: once, or twice, or not at all; and whether the rest is the base's.

Answers do not tell: a model is as sure of them with its adapter merged twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftkit.check import Check, failed, not_made, passed

if TYPE_CHECKING:
    import numpy as np

NAME, BASE = "strength of the merge", "base of the merge"
APART = 0.3  # from 1: the least that is called a fault of the file that was converted
TOO_MUCH = 1.5  # in a quantised one. Coarse rounding may leave out most of what is small beside its steps, and is no fault of the merge
ANOTHER = 5e-3  # of a tensor's length: the least that is called another base's. bfloat16 rounds half of that, by chance
REORDERED = 0.1  # more may be the base's own rows in another order, as llama.cpp has of some tensors: one row in a hundred is more
ALIKE = 0.5  # correlation of a file's numbers with the base's: less is another order of them, as llama.cpp has of some tensors


@dataclass(frozen=True)
class Share:
    """Of some tensors: how many times what training changed was put on the base, and the error of that by rounding (one sigma)."""

    times: float
    error: float
    tensors: int


def share(file: np.ndarray[Any, Any], base: np.ndarray[Any, Any], change: np.ndarray[Any, Any]) -> Share | None:
    """Of one tensor: file - base = times · change + what was rounded, fitted.

    None where these are not the base's numbers, or none of them changed.
    """
    import numpy as np

    apart, moved = (file - base).ravel(), change.ravel()
    size = float(moved @ moved)
    if not size:
        return None
    times = float(apart @ moved) / size
    rest = apart - times * moved
    if np.corrcoef(base.ravel() + rest, base.ravel())[0, 1] < ALIKE:
        return None
    return Share(times, float(rest @ rest / len(rest) / size) ** 0.5, 1)


def left_over(file: np.ndarray[Any, Any], *parts: np.ndarray[Any, Any]) -> float:
    """How much of a tensor's length is no sum of these parts, by whatever factors: some converters multiply weights."""
    import numpy as np

    columns = np.stack([part.ravel() for part in parts], axis=1)
    rest = file.ravel() - columns @ np.linalg.lstsq(columns, file.ravel())[0]
    return float(np.linalg.norm(rest) / (np.linalg.norm(file) or 1))


def judge_base(adapted: float | None, embedding: float | None) -> Check:
    """Whether the converted file holds the base's numbers, but for what training changed.

    What is left over of its embedding, and of the nearest of the tensors that have adapters; None: not to be compared.
    """
    if embedding is not None and embedding > ANOTHER:
        return failed(BASE, f"{embedding:.1%} of the embedding are not the base's, as if it were merged into another base")
    if adapted is not None and ANOTHER < adapted < REORDERED:
        return failed(
            BASE, f"{adapted:.1%} of the weights are neither the base's nor the adapter's, as if it were merged into another base"
        )
    same = {"embedding": embedding, "weights with adapters": adapted}
    found = [words for words, left in same.items() if left is not None and left <= ANOTHER]
    return passed(BASE, " and ".join(found)) if found else not_made(BASE, "no tensor of the file has its rows as the base has them")


def together(shares: list[Share]) -> Share:
    """Of several tensors, those that were rounded least counting most."""
    weights = [1 / max(each.error, 1e-6) ** 2 for each in shares]
    times = sum(weight * each.times for weight, each in zip(weights, shares, strict=True)) / sum(weights)
    return Share(times, sum(weights) ** -0.5, len(shares))


def judge_strength(converted: Mapping[str, Share], quantised: Mapping[str, Share]) -> Check:
    """Of the file that was converted and of the one that ships, by what was changed: by adapters, and in modules trained whole."""
    told = []
    for what, found in converted.items():
        width = 4 * found.error  # rounding is not quite by chance
        figures = f"{what}: {found.times:.2f} × what training changed ({found.tensors} tensors)"
        if width > APART:
            return not_made(NAME, f"{figures}, ± {width:.2g}: rounding hides it")
        if abs(found.times - 1) > APART + width:
            return failed(NAME, f"{figures}, {_as_if(found.times)}")
        told.append(figures)
    for what, found in quantised.items():
        if found.times - 4 * found.error > TOO_MUCH:
            return failed(NAME, f"{what} in what ships: {found.times:.2f} × what training changed, {_as_if(found.times)}")
    return passed(NAME, "; ".join(told)) if told else not_made(NAME, "no tensor of the file is one that training changed, as it was")


def _as_if(times: float) -> str:
    if times > 1:
        return "as if it were merged more than once, or scaled otherwise"
    return "as if it were left out" if times < 0.1 else "as if it were scaled otherwise"

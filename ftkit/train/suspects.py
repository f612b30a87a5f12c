"""Which rows are likely mislabelled, by what training saw of them: surprising beside the rows seen around the same time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

AROUND = 80  # rows in training that a row is held against: those that came by around the same time
LEAST_SPREAD = 0.3  # nats: where a model is sure of all rows, the least surprise would stand far out
FARTHEST = 8.0  # spreads: one pass alone decides nothing
FIRST_WEIGHT, WEIGHT = 1.0, 2.0  # in a row's first pass the model has seen little of its like


@dataclass(frozen=True)
class Signs:
    """Of one row: how far its answer stood out, on average, and how probable it was to the model at each pass."""

    score: float  # in spreads of the rows around it
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Suspect:
    """A row, from the most to the least suspicious."""

    place: str
    score: float  # how far it stands out, in spreads of the rows around it
    likely: bool
    label: str  # what counts of its answer
    answer: str | None  # what counts of the trained model's own; None: it was not asked, as of plain text
    probabilities: tuple[float, ...]  # of the label, to the model, at each pass
    contradicts: tuple[str, ...]  # places of rows with the same question and another answer


def signs(seen: np.ndarray[Any, Any], counted: Mapping[int, frozenset[int]]) -> dict[int, Signs]:
    """The signs of each row by its key. `counted`: of each row that is wanted, the places of the tokens that count of its answer.

    A row's surprise is the most of -log p - H among these tokens: p is the probability that the model gave the token, H the entropy of its
    distribution, which is the surprise that a model expects. So what cannot be known (a wording, a name) stands out no more than another
    answer; one that the model was sure of otherwise does. The most, not the sum, because a label differs from others in a token or two,
    and the rest of a long one is noise. In training the model sees a row before it learns it: in the first passes a wrong label is not
    yet known by heart.
    """
    import numpy as np

    seen = seen[np.isin(seen["row"], np.fromiter(counted, np.uint64, len(counted)))]
    keys = [int(key) for key in seen["row"]]
    counts = np.array([[place in counted[key] for place in places] for key, places in zip(keys, seen["place"].tolist(), strict=True)])
    counts = counts.reshape(seen["place"].shape)
    surprise = (seen["surprise"] * counts).sum(-1)
    beyond = np.where(counts, seen["surprise"] - seen["entropy"], 0.0).max(-1)
    deviation = np.zeros(len(seen))
    trained = np.flatnonzero(seen["learnt"])
    groups = np.array_split(trained, max(1, len(trained) // AROUND))
    groups += [np.flatnonzero(~seen["learnt"] & (seen["step"] == step)) for step in np.unique(seen["step"][~seen["learnt"]])]
    for group in groups:
        middle = np.median(beyond[group]) if len(group) else 0.0
        away = beyond[group] - middle
        deviation[group] = np.clip(away / (LEAST_SPREAD + np.abs(away).mean()), -FARTHEST, FARTHEST) if len(group) else 0.0
    passes: dict[int, list[tuple[float, float]]] = {}
    for key, far, surprised in zip(keys, deviation.tolist(), surprise.tolist(), strict=True):
        passes.setdefault(key, []).append((far, float(np.exp(-surprised))))
    return {key: Signs(_mean([far for far, _ in found]), tuple(p for _, p in found)) for key, found in passes.items()}


def _mean(deviations: list[float]) -> float:
    """Over a row's passes."""
    weights = [FIRST_WEIGHT, *[WEIGHT] * (len(deviations) - 1)]
    return sum(weight * far for weight, far in zip(weights, deviations, strict=True)) / sum(weights)

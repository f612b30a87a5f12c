"""How close one form of a model is to another on given answers, token by token; and how much of a training's gain it keeps."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftkit.check import Check, failed, not_made, passed

if TYPE_CHECKING:
    import numpy as np

SAMPLES = 2000  # of rows, drawn with replacement, for an interval
GAIN, DISTANCE = "gain kept", "distance from the trained model"  # the checks' names
TOGETHER = 4  # tokens
POSITIONS = 32  # of an answer, of which the KL is kept for each: the first
LEAST = 1e-2  # nats a token between base and trained model, in loss or in KL: less is lost and found by rounding


@dataclass(frozen=True)
class Behaviour:
    """One form of a model on the held-out answers: sums over the tokens of each row, in nats.

    `divergence` and `agreed` are of the first rows, of which the trained model's logits were kept; empty of the trained model.
    """

    tokens: list[int]
    loss: list[float]  # -log of the probability of what the answer says
    divergence: list[float]  # KL(trained ‖ this) over the whole vocabulary
    agreed: list[int]  # tokens at which the likeliest is the trained model's
    divergence_at: list[float] = field(default_factory=list)  # sums over those rows, at each of the first POSITIONS tokens

    @property
    def loss_a_token(self) -> float:
        return sum(self.loss) / sum(self.tokens)

    @property
    def divergence_a_token(self) -> float | None:
        return sum(self.divergence) / sum(self.tokens[: len(self.divergence)]) if self.divergence else None

    @property
    def agreed_percent(self) -> float | None:
        return 100 * sum(self.agreed) / sum(self.tokens[: len(self.agreed)]) if self.agreed else None

    @property
    def divergence_by_position(self) -> list[float]:
        """KL a token at the first, second, … token of an answer, over the rows that are that long; empty of an earlier ftkit's run."""
        looked_at = self.tokens[: len(self.divergence)]
        return [total / sum(count > place for count in looked_at) for place, total in enumerate(self.divergence_at)]


@dataclass(frozen=True)
class Kept:
    """Share of the gain that is left, in percent, and between what it lies in 95 of 100 draws of the rows."""

    percent: float
    low: float
    high: float


def measure(
    logits: Iterable[np.ndarray[Any, Any]], said: Sequence[Sequence[int]], trained: Iterable[np.ndarray[Any, Any]] = ()
) -> Behaviour:
    """A form by its logits, (tokens, vocabulary) for each row, at the tokens that are `said`.

    `trained`: the trained model's, of the first rows or none.
    """
    import numpy as np

    tokens, losses, divergences, agreed, at, kept = [], [], [], [], np.zeros(POSITIONS), iter(trained)
    for given, ids in zip(logits, said, strict=True):
        first, told, apart, same = next(kept, None), list[Any](), list[Any](), 0
        for part in parts(len(ids)):
            here = log_probabilities(given[part])
            told.append(here[np.arange(len(here)), ids[part]])
            if first is not None:
                theirs = log_probabilities(first[part])
                width = min(here.shape[1], theirs.shape[1])  # a file or a checkpoint may hold more rows than there are tokens
                p, q = theirs[:, :width], here[:, :width]
                apart.append((np.exp(p) * (p - q)).sum(-1))
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens.append(len(ids))
        losses.append(-float(np.concatenate([[0.0], *told]).sum()))
        if first is not None:
            distances = np.concatenate([np.empty(0), *apart])
            divergences.append(float(distances.sum()))
            at[: len(distances)] += distances[:POSITIONS]
            agreed.append(same)
    longest = max(tokens[: len(divergences)], default=0)
    return Behaviour(tokens, losses, divergences, agreed, at[:longest].tolist())


def parts(tokens: int) -> Iterator[slice]:
    """A few tokens at a time: what is computed of a whole vocabulary for each of them then stays in the processor's caches.

    All tokens of an answer at once take five times as long (50 of a vocabulary of 151,000).
    """
    return (slice(start, start + TOGETHER) for start in range(0, tokens, TOGETHER))


def log_probabilities(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In float64."""
    import numpy as np

    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def gain_kept(before: Behaviour, trained: Behaviour, after: Behaviour) -> Kept | None:
    """(loss before - loss after) / (loss before - loss as trained). None where training gained next to nothing on these answers.

    The interval is a bootstrap over rows: of few rows it is wide.
    """
    rows = range(len(before.tokens))

    def percent(chosen: Iterable[int]) -> float:
        first, best, last = (sum(form.loss[n] for n in chosen) for form in (before, trained, after))
        return 100 * (first - last) / (first - best) if first > best else float("nan")

    if before.loss_a_token - trained.loss_a_token < LEAST:
        return None
    whole = percent(rows)
    draw = random.Random(0)
    drawn = sorted(value for value in (percent(draw.choices(rows, k=len(rows))) for _ in range(SAMPLES)) if value == value)
    low, high = (drawn[min(len(drawn) - 1, int(share * len(drawn)))] for share in (0.025, 0.975))
    return Kept(whole, low, high)


def judge_gain(forms: Mapping[str, Behaviour], shipped: str, least: float) -> Check:
    """Whether the form `shipped` keeps `least` percent of what training gained on the held-out answers."""
    name = GAIN
    if missing := missing_form(forms, shipped):
        return not_made(name, missing)
    before, trained, after = (forms[form] for form in ("before", "trained", shipped))
    losses = f"loss a token {before.loss_a_token:.3f} before, {trained.loss_a_token:.3f} as trained, {after.loss_a_token:.3f} in this file"
    kept = gain_kept(before, trained, after)
    if kept is None:
        return not_made(name, f"training gained next to nothing on these answers, so that a loss cannot be seen; {losses}")
    figures = f"{kept.percent:.1f} % ({kept.low:.1f} to {kept.high:.1f} on {len(after.tokens)} rows); {losses}"
    return passed(name, figures) if kept.percent >= least else failed(name, f"{least:g} % are wanted, kept are {figures}")


def judge_distance(forms: Mapping[str, Behaviour], shipped: str, least: float) -> Check:
    """Whether the form `shipped` is nearer to the trained model than the base is, by `least` percent of the way.

    Gain can be kept by a model that went too far, as one with its adapter merged twice: this sees it.
    """
    name = DISTANCE
    if missing := missing_form(forms, shipped):
        return not_made(name, missing)
    whole, left = forms["before"].divergence_a_token, forms[shipped].divergence_a_token
    if whole is None or left is None:
        return not_made(name, "the trained model's logits of one answer are more than are kept")
    figures = f"KL a token {left:.2g}, of the base {whole:.2g}, over {len(forms[shipped].divergence)} rows"
    if whole < LEAST:
        return not_made(name, f"training changed next to nothing on these answers; {figures}")
    share = _way(whole, left)
    return (
        passed(name, figures) if share >= least else failed(name, f"{least:g} % of the way are wanted, made are {share:.1f} %; {figures}")
    )


def least_kept(forms: Mapping[str, Behaviour], shipped: str, *, by_loss: bool = True) -> float:
    """The percent that both checks would pass with; or, where the loss does not tell what was learnt, that of the distance."""
    kept = gain_kept(forms["before"], forms["trained"], forms[shipped]) if by_loss else None
    whole, left = forms["before"].divergence_a_token, forms[shipped].divergence_a_token
    way = _way(whole, left) if whole is not None and left is not None and whole >= LEAST else 100.0
    return min(way, kept.percent if kept else 100.0)


def _way(whole: float, left: float) -> float:
    """Percent of the way from the base to the trained model, by what is left of it."""
    return 100 * (1 - left / whole)


def missing_form(forms: Mapping[str, Behaviour], shipped: str) -> str | None:
    """Which of the forms that are compared was not looked at, in words; None: all were."""
    who = {"before": "the base model", "trained": "the trained model", shipped: "the file"}
    return next(
        (f"{words} was not looked at token by token; to look: ftkit ship --from ask" for name, words in who.items() if name not in forms),
        None,
    )

"""What the loss curves say: one verdict in words, since which step, and the next thing to try.

The validation loss is taken on the same rows each time: what moves in it is the model. The training loss is of other rows at each
step: its zigzag is first of all that of the batches. So validation decides, and training says why. Every threshold holds against
the noise of the curve itself; what stands below them is not called anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ftkit.recipe import Training
from ftkit.train.curve import Point, smoothed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[Any]

Kind = Literal["learning", "levelled off", "over-fitting", "not learning", "oscillating", "diverged", "too few to tell"]

FEWEST_EVALUATIONS = 2  # of which a change can be seen at all
FEWEST_TO_ZIGZAG = 5  # evaluations; two turns of a curve can be chance
EARLY = 0.1  # of the steps: before that a loss that does not move may still begin to
FEWEST_STEPS = 6  # training losses whose trend and noise are told apart
LEAST = 0.02  # share of a loss below which it did not move
LEAST_LOSS = 0.1  # a loss below this is as good as nothing: shares are taken of this
SURE = 3.0  # standard errors
STEADY = 0.005  # share of a validation loss by which it may differ by itself, where too few say how much it does
JUMPS = 0.04  # share of the validation loss: model that jumps back and forth by more is not settling
ZIGZAGS, SURELY_ZIGZAGS = 0.15, 0.2  # share of the training loss: steps that differ by more are ruled by their rows
HOLDS_ON = 0.5  # autocorrelation of the training loss about its trend; that of the batches alone is about none
GROWS = 2.0  # times that the gradient norm grows where a rate drives the weights away
SETTLES = 0.6  # share to which the gradient norm falls where the rows agree
APART = 0.7  # training loss, as a share of the validation loss, below which the rows are known by heart
SPIKE = 0.5  # share of a loss, and of all that was learnt, that is lost where a spike stays
STAYS = 0.1  # share of the steps that it has to last
MOST_RATE = 2e-3  # above it a rate is not what keeps a model from learning


@dataclass(frozen=True)
class Verdict:
    """How a training goes or went."""

    kind: Kind
    words: str
    since_step: int | None = None  # from which on it is so, where that can be said
    next_command: str | None = None  # the next thing to try, to paste

    def __str__(self) -> str:
        return f"{self.kind}: {self.words}"


def read_curve(
    curve: Sequence[Point], training: Training, *, ended: bool = True, stopped_early: bool = False, max_steps: int | None = None
) -> Verdict:
    """Read both curves, of a training that ended or of one that goes on, up to `max_steps` where that is known."""
    import numpy as np

    steps = [point for point in curve if not point.evaluated]
    evaluated = [point for point in curve if point.evaluated]
    for which, those in (("training", [(p.step, p.loss) for p in steps]), ("validation", [(p.step, p.validation_loss) for p in evaluated])):
        if those and those[-1][1] is None:
            since = next(step for step, loss in those if loss is None)
            return _diverged(f"the {which} loss is no number any more", since, training)
    steps = [point for point in steps if point.loss is not None]
    evaluated = [point for point in evaluated if point.validation_loss is not None]
    losses = np.array([point.loss for point in steps], dtype=float)
    validation = np.array([point.validation_loss for point in evaluated], dtype=float)
    trend = np.array(smoothed(losses.tolist()))
    if (spike := _spike(losses, trend)) is not None:
        was, now = trend[: spike + 1].min(), float(np.median(losses[spike:]))
        return _diverged(f"the training loss jumped from {was:.3g} to {now:.3g} and stays there", steps[spike].step, training)
    if len(validation) < FEWEST_EVALUATIONS:
        count = "one evaluation" if len(validation) else "no evaluation"
        command = _oftener(training) if len(steps) > 1 else _longer(training)
        return Verdict("too few to tell", f"{count} so far" if not ended else count, next_command=command if ended else None)

    noise = _noise(validation)  # of one evaluation
    level = max(float(np.median(validation[-3:])), LEAST_LOSS)
    least = max(LEAST * level, SURE * noise)
    zigzag = _zigzag(losses, trend)
    norms = [point.gradient_norm for point in steps if point.gradient_norm is not None]
    growth = _growth(norms)
    if jumps := _jumps(validation, losses, trend, growth):
        return _too_fast(jumps, growth, training)
    best = int(np.argmin(validation))
    if _over_fits(validation, best, noise, losses, np.array([point.step for point in steps]) <= evaluated[best].step):
        rise = validation[-1] / validation[best] - 1
        words = f"since step {evaluated[best].step} the validation loss rose by {rise:.0%} while the training loss went on falling"
        command = _oftener(training) if best == 0 else _set("num_train_epochs", round(evaluated[best].epoch, 2))
        if training.max_steps and best:
            command = _set("max_steps", evaluated[best].step)
        return Verdict("over-fitting", f"{words}; the best checkpoint is kept", evaluated[best].step, command)
    late = validation[-max(2, -(-len(validation) // 4) + 1) :]
    falls = _fall(late)
    steadily = len(late) > 2 and bool((np.diff(late) < -LEAST * level).all())  # a bend is no noise
    if steadily or falls > max(LEAST * level / 2, 2 * noise * (12 / len(late)) ** 0.5 if len(validation) >= FEWEST_TO_ZIGZAG else least):
        more = _set("early_stopping_patience", 2 * training.early_stopping_patience) if stopped_early else _longer(training)
        by = falls / max(float(late[0]), LEAST_LOSS)
        return Verdict("learning", f"the validation loss still fell, by {by:.0%} lately", next_command=more if ended else None)
    if not ended and max_steps and curve[-1].step < EARLY * max_steps:
        return Verdict("too few to tell", f"neither loss moves now, after less than {EARLY:.0%} of the steps")
    moved = max(validation[0] - validation.min(), _learnt(losses))
    if moved < least:
        if (learnt := training.peak_learning_rate) < MOST_RATE:
            why, command = "the learning rate is too low, or the rows teach nothing new", _set("learning_rate", min(10 * learnt, MOST_RATE))
        else:
            why, command = "the rows teach nothing that can be learnt from them", "ftkit data"
        words = f"neither loss moved by more than its noise: {why}"
        return Verdict("not learning", words, next_command=command if ended or len(validation) > 2 else None)
    since = _settled(validation, noise)
    rows_disagree = zigzag > SURELY_ZIGZAGS or (zigzag > ZIGZAGS and (growth is None or growth > SETTLES))
    if rows_disagree and len(losses) >= 5 * FEWEST_STEPS:
        if growth and growth >= GROWS:
            return _too_fast(f"the training loss differs by ±{zigzag:.0%} from step to step", growth, training)
        still = "" if growth is None else f", with gradients {growth:.1f} times as large as at first"
        words = (
            f"the training loss differs by ±{zigzag:.0%} from step to step{still}, and the validation loss is steady: not the rate, "
            "but the rows – labels that contradict each other, rows of very different length or kind – or small batches"
        )
        return Verdict("oscillating", words, evaluated[since].step, _set("effective_batch_size", 4 * training.effective_batch_size))
    return Verdict(
        "levelled off", f"the validation loss hardly moved since step {evaluated[since].step}", evaluated[since].step,
        "ftkit ship" if ended else None,
    )  # fmt: skip


def _diverged(what: str, step: int, training: Training) -> Verdict:
    return Verdict("diverged", f"at step {step} {what}", step, _set("learning_rate", _round(training.peak_learning_rate / 10)))


def _too_fast(what: str, growth: float | None, training: Training) -> Verdict:
    grown = f", and the gradients grew {growth:.1f}-fold" if growth and growth >= GROWS else ""
    rows = training.effective_batch_size
    words = f"{what}{grown}: the learning rate is too high for {rows} {'row' if rows == 1 else 'rows'} a step, most likely"
    return Verdict("oscillating", words, next_command=_set("learning_rate", _round(training.peak_learning_rate / 3)))


def _round(rate: float) -> float:
    return float(f"{rate:.1g}")


def _set(key: str, value: float) -> str:
    return f"ftkit train --set training.{key}={value:g}"


def _longer(training: Training) -> str:
    times = "max_steps" if training.max_steps else "num_train_epochs"
    return _set(times, max(2 * getattr(training, times), FEWEST_STEPS if training.max_steps else 0))


def _oftener(training: Training) -> str:
    return _set("evaluations_per_epoch", max(4, 2 * training.evaluations_per_epoch))


def _robust_deviation(values: Floats) -> float:
    """The standard deviation that a normal distribution of this median distance from zero has: what outliers do not move."""
    import numpy as np

    return float(1.4826 * np.median(np.abs(values))) if len(values) else 0.0


def _noise(validation: Floats) -> float:
    """How far one evaluation lies from a smooth curve: by the second differences, in which a straight line leaves nothing.

    Those of the later half alone where they are smaller: a loss bends where it falls fast.
    """
    floor = STEADY * max(float(validation.min()), LEAST_LOSS)
    if len(validation) < FEWEST_TO_ZIGZAG:
        return floor
    bends = validation[2:] - 2 * validation[1:-1] + validation[:-2]
    return max(floor / 2, min(_robust_deviation(some) for some in (bends, bends[-max(3, len(bends) // 2) :])) / 6**0.5)


def _zigzag(losses: Floats, trend: Floats) -> float:
    """How far one step's loss lies from the next one's, as a share of the trend; of the later half.

    Not how far it lies from the trend: rows come in groups of like length, long ones first, and the loss goes up and down with that.
    """
    import numpy as np

    half = len(losses) // 2
    apart = np.sort(abs(np.diff(losses[half:])))
    apart = apart[: max(1, round(0.9 * len(apart)))]  # the jump from the short rows of one group to the long ones of the next is no noise
    if not len(apart):
        return 0.0
    return float(apart.mean()) / 0.657 / 2**0.5 / max(float(np.median(trend[half:])), LEAST_LOSS)  # 0.657: of a normal distribution


def _growth(norms: Sequence[float]) -> float | None:
    """The gradient norm of the last third of the steps, in those of an early third; None: too few to tell.

    The first steps are left out: an adapter begins at zero, and the rate warms up.
    """
    import numpy as np

    count = len(norms)
    if count < 2 * FEWEST_STEPS:
        return None
    early, late = float(np.median(norms[count // 12 : count // 3])), float(np.median(norms[-(count // 3) :]))
    return late / early if early > 0 else None


def _spike(losses: Floats, trend: Floats) -> int | None:
    """From which training point on the loss is high and stays so: much of what was learnt is lost, and never comes back."""
    import numpy as np

    if len(losses) < FEWEST_STEPS:
        return None
    best = int(np.argmin(trend[: max(1, round((1 - STAYS) * len(trend)))]))
    lowest, first = trend[best], max(float(np.median(losses[:3])), float(trend[0]))
    deviation = _robust_deviation((losses - trend)[: best + 1]) if best >= FEWEST_STEPS else 0.0
    high = lowest + max(SPIKE * max(lowest, LEAST_LOSS), SPIKE * (first - lowest), SURE * deviation)
    back = np.flatnonzero(losses <= lowest + (high - lowest) / 2)  # the last time that it came near
    begin = int(back[-1]) + 1 if len(back) else best + 1
    stays = losses[begin:]
    if len(stays) < max(FEWEST_STEPS, STAYS * len(losses)) or float(np.median(stays)) < high:
        return None
    return begin


def _jumps(validation: Floats, losses: Floats, trend: Floats, growth: float | None) -> str | None:
    """How the model jumps back and forth, where it does: seen in the validation loss, or in gradients that grow while the loss swings."""
    import numpy as np

    level = max(float(np.median(validation)), LEAST_LOSS)
    changes = np.diff(validation)
    later = changes[len(changes) // 4 :]
    up, turns = later[later > 0], np.sum(later[1:] * later[:-1] < 0)
    size = float(np.median(up)) / level if len(up) else 0.0
    still = (changes[-max(3, len(changes) // 3) :] > JUMPS * level).any()
    if len(validation) >= FEWEST_TO_ZIGZAG and size > JUMPS and still and turns >= max(2, 0.5 * (len(later) - 1)):
        return f"the validation loss jumps by ±{size:.0%} from one evaluation to the next"
    late = (losses - np.array(smoothed(losses.tolist(), len(losses) / 4)))[len(losses) // 4 :]
    if len(late) < 2 * FEWEST_STEPS or growth is None or growth < GROWS:
        return None
    spread = float(late.std()) / max(float(np.median(trend[len(losses) // 4 :])), LEAST_LOSS)
    holds_on = float(np.corrcoef(late[1:], late[:-1])[0, 1]) if spread else 0.0
    return f"the training loss swings by ±{spread:.0%} over several steps" if spread > ZIGZAGS and holds_on > HOLDS_ON else None


def _over_fits(validation: Floats, best: int, noise: float, losses: Floats, before: Floats) -> bool:
    """Whether the validation loss rose since its best and stays above it, while the training loss went on falling.

    Where that is far below by now, a smaller rise is sure. `before`: which of the training losses lie before the best.
    Without training losses the rise alone has to tell.
    """
    import numpy as np

    last = validation[best + 1 :][-2:]
    if not len(last):
        return False
    rise = min(last[-1], last.mean()) - validation[best]
    least = LEAST * max(float(validation[best]), LEAST_LOSS)
    if len(losses) < FEWEST_STEPS:
        return bool(rise > max(least, SURE * noise))
    earlier, later = losses[before], losses[~before]
    if not len(earlier) or not len(later):
        return False
    near, late, third = earlier[-max(3, len(earlier) // 3) :], later[-max(3, len(later) // 2) :], max(3, len(losses) // 3)
    apart = float(np.median(late)) / float(validation[-1])
    fell = _surely_less(late, near) or (apart < APART and _surely_less(losses[-third:], losses[:third]))
    return bool(fell and rise > max(least, (1 if apart < APART else SURE) * noise))


def _surely_less(some: Floats, others: Floats) -> bool:
    """Whether the first have the lower mean, by more than their noise. Means of the middle: a spike is no trend."""
    import numpy as np

    low, high = float(np.mean(some)), float(np.mean(others))
    error = float((some.var() / len(some) + others.var() / len(others)) ** 0.5)
    return high - low > max(SURE * error, LEAST * max(low, LEAST_LOSS))


def _fall(values: Floats) -> float:
    """By how much a straight line through these falls from the first to the last."""
    import numpy as np

    return float(-np.polyfit(np.arange(len(values)), values, 1)[0] * (len(values) - 1))


def _learnt(losses: Floats) -> float:
    """By how much the training loss surely fell."""
    first, last = losses[: max(3, len(losses) // 12)], losses[-(len(losses) // 3) :]
    return float(first.mean() - last.mean()) if len(losses) >= FEWEST_STEPS and _surely_less(last, first) else 0.0


def _settled(validation: Floats, noise: float) -> int:
    """The first evaluation from which on the validation loss moved no more than it does by itself."""
    import numpy as np

    level = float(np.median(validation[-3:]))
    near = abs(validation - level) <= max(LEAST * max(level, LEAST_LOSS), SURE * noise)
    away = [n for n, is_near in enumerate(near) if not is_near]
    return min(away[-1] + 1, len(validation) - 1) if away else 0

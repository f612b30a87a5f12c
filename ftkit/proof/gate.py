"""Whether the shipped file answers as the trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ftkit.check import Check, failed, not_made, passed
from ftkit.proof.score import Score, is_right, same, score
from ftkit.recipe import Evaluate

ANSWERS = "answers"  # the check's name


def judge_answers(scores: Mapping[str, Score], shipped: str, alike: Score, limit: float) -> Check:
    """Whether the file `shipped` keeps what the trained model answers right, up to `limit` points.

    Not made where a loss could not be seen: where the trained model gets no more right than may be lost.
    """
    name = ANSWERS
    if not scores:
        return not_made(name, "nothing is asked: the held-out rows are plain text")
    if "trained" not in scores or shipped not in scores:
        return not_made(name, f"the {'trained model' if 'trained' not in scores else 'shipped file'} could not be asked")
    trained, after = scores["trained"], scores[shipped]
    lost = trained.percent - after.percent
    figures = f"{_right(after)}, as trained {trained.right}; {alike.right} of {alike.rows} answers are the same"
    if trained.right == 0:
        read = f" ({trained.unreadable} cannot be read)" if trained.unreadable else ""
        return not_made(name, f"as trained no answer of {trained.rows} is right{read}, so that a loss cannot be seen; {figures}")
    if trained.percent <= limit:
        return not_made(
            name, f"as trained {trained.percent:.1f} % are right, and {limit:g} points may be lost, so that no loss is too much; {figures}"
        )
    if lost > limit:
        return failed(name, f"{lost:.1f} points are lost, {limit:g} are allowed; {figures}")
    return passed(name, figures)


def _right(after: Score) -> str:
    return f"{after.right} of {after.rows} right" + (f" ({after.unreadable} cannot be read)" if after.unreadable else "")


SERVED = "answers in Ollama"  # the check's name


def judge_served(expected: Sequence[str], file: Sequence[str], served: Sequence[str], rule: Evaluate, limit: float) -> Check:
    """Whether a server answers as the file does in llama.cpp, up to `limit` points.

    Builds of llama.cpp answer a few questions otherwise, to and fro: two standard errors of the difference of paired
    answers (McNemar's) are allowed beside the limit. Not made where the file gets nothing right, so that no loss shows.
    """
    name = SERVED
    if not expected:
        return not_made(name, "nothing was asked")
    before, after = score(expected, file, rule), score(expected, served, rule)
    figures = f"{_right(after)}, in llama.cpp {before.right}; {same(file, served, rule).right} answers are the same"
    if not before.right:
        return not_made(name, f"in llama.cpp no answer is right, so that a loss cannot be seen; {figures}")
    other = sum(is_right(e, a, rule) != is_right(e, b, rule) for e, a, b in zip(expected, file, served, strict=True))
    lost, allowed = before.right - after.right, limit / 100 * before.rows + 2 * other**0.5
    return failed(name, f"{lost} right answers are lost; {figures}") if lost > allowed else passed(name, figures)

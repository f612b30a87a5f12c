"""Margins between chosen and rejected answers: what is kept of them, and a file that lost them is seen."""

from __future__ import annotations

import pytest

from ftkit.proof.behaviour import Behaviour
from ftkit.proof.preference import judge_preference, margin_kept, preferred


def pairs(*losses: tuple[float, float]) -> Behaviour:
    """Losses of (chosen, rejected) answers of ten tokens."""
    flat = [loss for pair in losses for loss in pair]
    return Behaviour([10] * len(flat), flat, [], [])


BEFORE = pairs((20, 18), (20, 21), (20, 19))  # margins −2, 1, −1
TRAINED = pairs((19, 30), (21, 28), (25, 33))  # 11, 7, 8


def test_margins_are_of_pairs() -> None:
    assert preferred(BEFORE).margins == [-2, 1, -1]
    assert (preferred(BEFORE).right, preferred(TRAINED).right) == (1, 3)
    assert preferred(TRAINED).margin == (11 + 7 + 8) / 3


def test_a_file_that_keeps_the_margin_passes_and_one_that_lost_it_fails() -> None:
    forms = {"before": BEFORE, "trained": TRAINED, "Q8_0": pairs((19, 30), (21, 28), (25, 32))}
    kept = 100 * (25 / 3 - -2 / 3) / (26 / 3 - -2 / 3)
    assert margin_kept(forms, "Q8_0") == pytest.approx(kept)
    check = judge_preference(forms, "Q8_0", 95)
    assert (check.outcome, check.detail[:6]) == ("passed", "96.4 %")
    assert judge_preference(forms, "Q8_0", 97).outcome == "failed"
    base = judge_preference({**forms, "Q8_0": BEFORE}, "Q8_0", 95)  # the base, without what was trained
    assert (base.outcome, "in 1 of 3 pairs, as trained 3, before 1" in base.detail) == ("failed", True)
    other_way = pairs((30, 19), (28, 21), (33, 25))
    assert judge_preference({**forms, "Q8_0": other_way}, "Q8_0", 0).outcome == "failed"


def test_what_was_not_looked_at_or_not_moved_is_not_judged() -> None:
    assert judge_preference({"before": BEFORE, "trained": TRAINED}, "Q8_0", 95).outcome == "not made"
    still = judge_preference({"before": BEFORE, "trained": BEFORE, "Q8_0": TRAINED}, "Q8_0", 95)
    assert (still.outcome, still.detail.startswith("training moved the answers of these pairs next to nothing apart")) == ("not made", True)
    assert margin_kept({"before": BEFORE, "trained": BEFORE, "Q8_0": TRAINED}, "Q8_0") is None

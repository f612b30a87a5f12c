"""What `ftkit ship` shows of the scores, by each kind of `evaluate`."""

from __future__ import annotations

import pytest

from ftkit.cli.ship import MOST_LABELS, show_scores
from ftkit.proof.score import score, words
from ftkit.recipe import Evaluate


def shown(rule: Evaluate, expected: list[str], answers: list[str], capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The lines, each in its words."""
    scores = {"before": score(expected, ["?"] * len(expected), rule), "Q8_0": score(expected, answers, rule)}
    show_scores(words(rule), scores)
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_plain_scores_have_no_more_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(Evaluate(), ["a", "b"], ["a", "c"], capsys) == [
        "Held-out questions, right by the whole answer".split(),
        ["right"],
        "before 0 of 2 0.0 %".split(),
        "Q8_0 1 of 2 50.0 %".split(),
    ]


def test_keys_that_are_right_stand_beside(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(Evaluate(by="json"), ['{"a": 1, "b": 2}'] * 2, ['{"a": 1, "b": 2}', '{"a": 1, "b": 3}'], capsys)
    assert lines[1:] == [
        "right not readable keys right".split(),
        "before 0 of 2 0.0 % 2 0.0 %".split(),
        "Q8_0 1 of 2 50.0 % 75.0 %".split(),
    ]


def test_what_the_file_said_for_what_is_a_table_where_it_is_small(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(Evaluate(by="labels", labels=["YES", "NO"]), ["YES", "YES", "NO"], ["YES", "NO", "maybe"], capsys)
    assert lines[-4:] == [
        "Expected, and what Q8_0 says".split(),
        "YES NO none of them".split(),  # nothing said several
        "YES 1 1 0".split(),
        "NO 0 0 1".split(),
    ]
    many = [f"label {n}" for n in range(MOST_LABELS + 1)]
    assert ["Expected,"] not in [line[:1] for line in shown(Evaluate(by="labels", labels=many), many, many, capsys)]

"""Two forms of one model are the same only where ids, prompts and answers are."""

from __future__ import annotations

import pytest

from ftkit.errors import ProofError
from ftkit.proof.compare import compare_tokens, same_ids
from ftkit.proof.gate import judge_answers, judge_served
from ftkit.proof.probes import HARD_TEXTS
from ftkit.proof.score import Score
from ftkit.recipe import Evaluate


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_equal_ids_are_counted() -> None:
    assert compare_tokens(HARD_TEXTS, characters, lambda text: list(characters(text)), "m.gguf") == len(HARD_TEXTS)


@pytest.mark.parametrize(
    ("shipped", "at"),
    [([1, 2, 9, 4], 2), ([9, 2, 3, 4], 0), ([1, 2, 3], 3), ([1, 2, 3, 4, 5], 4), ([], 0)],
)
def test_the_first_other_id_is_named(shipped: list[int], at: int) -> None:
    with pytest.raises(ProofError, match=f"from token {at} of 'abc'") as caught:
        compare_tokens(["abc"], lambda text: [1, 2, 3, 4], lambda text: shipped, "m.gguf")
    assert caught.value.message.startswith("m.gguf tokenises differently")
    assert f"shipped {shipped[at : at + 6]}" in caught.value.message
    assert caught.value.hint


def test_a_difference_in_a_later_text_is_found() -> None:
    with pytest.raises(ProofError, match=r"of '42 is'"):
        compare_tokens(["none", "42 is"], characters, lambda text: [n for n in characters(text) if n != ord("4")], "m.gguf")


def test_ids_are_compared_to_the_first_difference() -> None:
    equal = ("a", [1, 2], [1, 2])
    assert same_ids("prompts", [equal, equal], "prompts").words == "prompts: passed (2 prompts)"
    check = same_ids("prompts", [equal, ("b", [1, 2], [0, 1, 2])], "prompts")
    assert check.outcome == "failed"
    assert "from token 0 of 'b'" in check.detail
    assert same_ids("prompts", [], "prompts").outcome == "not made"  # nothing was looked at


@pytest.mark.parametrize(
    ("trained", "shipped", "limit", "outcome"),
    [
        (90, 88, 3.0, "passed"), (90, 86, 3.0, "failed"), (90, 95, 3.0, "passed"), (90, 86, 4.0, "passed"), (1, 1, 0.0, "passed"),
        (0, 0, 3.0, "not made"), (0, 0, 0.0, "not made"), (0, 5, 3.0, "not made"),  # no loss could be seen
        (3, 0, 3.0, "not made"), (90, 0, 100.0, "not made"),  # nor one that is too much
    ],
)  # fmt: skip
def test_a_gate_that_cannot_see_says_so(trained: int, shipped: int, limit: float, outcome: str) -> None:
    scores = {"trained": Score(trained, 100), "Q4_K_M": Score(shipped, 100)}
    check = judge_answers(scores, "Q4_K_M", Score(50, 100), limit)
    assert check.outcome == outcome
    assert f"{shipped} of 100 right" in check.detail
    assert "50 of 100 answers are the same" in check.detail


@pytest.mark.parametrize("limit", [0.0, 3.0, 100.0])
def test_zero_against_zero_says_nothing_whatever_the_limit(limit: float) -> None:
    """Long texts: no answer is exactly right, before, as trained and shipped. What cannot be read is told."""
    long = Score(0, 40, unreadable=30)
    check = judge_answers({"before": long, "trained": long, "Q8_0": long}, "Q8_0", Score(2, 40), limit)
    assert check.outcome == "not made"
    assert "as trained no answer of 40 is right (30 cannot be read), so that a loss cannot be seen" in check.detail


def test_what_could_not_be_asked_is_not_proved() -> None:
    assert judge_answers({"Q4_K_M": Score(9, 10)}, "Q4_K_M", Score(0, 10), 3.0).outcome == "not made"


def test_hard_texts_hold_what_tokenizers_split_differently() -> None:
    text = "".join(HARD_TEXTS)
    assert len(set(HARD_TEXTS)) == len(HARD_TEXTS)
    for hard in ("1234", "  ", "\n\n\n", "\t", "'ll", "你", "é", "ß", "Привет", "\u200d", "\u00a0", "<|", "{{"):
        assert hard in text


@pytest.mark.parametrize(
    ("file", "served", "limit", "outcome"),
    [
        ("rrrrrrrrrrrrrrrrrrrr", "rrrrrrrrrrrrrrrrrrrr", 0, "passed"),
        ("rrrrrrrrrrrrrrrrrrrr", "wwwwwwwwwwwwwwwwwwww", 3, "failed"),
        ("rrrrrrrrrrwwwwwwwwww", "wwwwwwwrrrwwwwwwwwww", 3, "failed"),  # 7 lost: more than 0.6 + 2·√7
        ("rrrrrrrrrrwwwwwwwwww", "wwwrrrrrrrrrwwwwwwww", 3, "passed"),  # 3 to, 2 fro: another build
        ("wwwwwwwwwwwwwwwwwwww", "rrrrrrrrrrrrrrrrrrrr", 3, "not made"),
    ],
)
def test_whether_a_server_answers_as_the_file(file: str, served: str, limit: float, outcome: str) -> None:
    check = judge_served("r" * 20, file, served, Evaluate(), limit)
    assert check.outcome == outcome
    assert check.name == "answers in Ollama"

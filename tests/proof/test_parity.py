"""Two forms of one model are the same only where ids, prompts and answers are."""

from __future__ import annotations

import pytest

from ftkit.errors import ProofError
from ftkit.proof.compare import Match, Score, compare_tokens, is_right, same, same_ids, score
from ftkit.proof.gate import judge_answers, judge_served
from ftkit.proof.probes import HARD_TEXTS


@pytest.mark.parametrize(
    ("expected", "answer", "first_line", "whole"),
    [
        ("SAFE\nBounded.", "SAFE\nBounded.", True, True),
        ("SAFE\nBounded.", " SAFE \n\nAnything.\n", True, False),
        ("SAFE\nBounded.", "\n SAFE\nBounded. \n", True, True),
        ("SAFE\nBounded.", "SAFE", True, False),
        ("SAFE", "SAFER", False, False),
        ("SAFE", "safe", False, False),
        ("SAFE", "", False, False),
        ("VULNERABLE — CWE-78", "VULNERABLE — CWE-787", False, False),
    ],
)
def test_what_is_right(expected: str, answer: str, first_line: bool, whole: bool) -> None:
    assert is_right(expected, answer, "first_line") is first_line
    assert is_right(expected, answer, "whole") is whole


@pytest.mark.parametrize(
    ("answer", "right"), [("Bounded.\nSAFE", True), ("Unbounded.\nSAFE \n", True), ("SAFE\nBounded.", False), ("", False)]
)
def test_the_last_line_alone_may_count(answer: str, right: bool) -> None:
    assert is_right("Bounded.\nSAFE", answer, "last_line") is right


@pytest.mark.parametrize(("match", "right"), [("first_line", 3), ("last_line", 2), ("whole", 2)])
def test_score(match: Match, right: int) -> None:
    counted = score(["a\n1", "a\n1", "b", "c"], ["a\n1", "a\n2", "b ", "x"], match)
    assert counted == Score(right, 4)
    assert counted.percent == 100 * right / 4


def test_same_counts_equal_texts() -> None:
    assert same(["a", "b\n", "c"], [" a", "b", "C"]) == Score(2, 3)


def test_a_missing_answer_is_no_small_matter() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score(["a", "b"], ["a"], "whole")
    with pytest.raises(ValueError, match="shorter"):
        same(["a", "b"], ["a"])


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
    assert "50 of 100 are the same text" in check.detail


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
    check = judge_served("r" * 20, file, served, "whole", limit)
    assert check.outcome == outcome
    assert check.name == "answers in Ollama"

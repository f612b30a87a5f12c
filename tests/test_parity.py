"""Two forms of one model are the same only where ids, prompts and answers are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ftkit.data import Message
from ftkit.errors import ProofError
from ftkit.parity import HARD_TEXTS, Match, Score, compare_prompts, compare_tokens, is_right, same, score


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


def render(messages: Sequence[Message]) -> str:
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def test_prompts() -> None:
    asked = [{"role": "user", "content": "a"}]
    told = [{"role": "system", "content": "b"}, *asked]
    assert compare_prompts([asked, told], render, render, "m.gguf") == 2
    with pytest.raises(ProofError, match="renders another prompt") as caught:
        compare_prompts([asked, told], render, lambda messages: render(messages[-1:]), "m.gguf")
    assert repr(render(told)) in caught.value.message
    assert repr(render(asked)) in caught.value.message


def test_hard_texts_hold_what_tokenizers_split_differently() -> None:
    text = "".join(HARD_TEXTS)
    assert len(set(HARD_TEXTS)) == len(HARD_TEXTS)
    for hard in ("1234", "  ", "\n\n\n", "\t", "'ll", "你", "é", "ß", "Привет", "\u200d", "\u00a0", "<|", "{{"):
        assert hard in text

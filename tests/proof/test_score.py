"""How answers are scored: by each kind of `evaluate`, whatever they say, and refused where nobody could be right."""

from __future__ import annotations

import json
import random
import time

import pytest

from ftkit.errors import RecipeError
from ftkit.proof.score import KINDS, NONE, SEVERAL, Score, counted_text, is_right, refuse_unreadable, same, score, words
from ftkit.recipe import Evaluate

WHOLE, FIRST, LAST = (Evaluate(by=by) for by in ("whole", "first_line", "last_line"))
JSON = Evaluate(by="json")
LABELS = Evaluate(by="labels", labels=["SAFE", "UNSAFE", "SAFE ENOUGH"])
ENDLESS = Evaluate(by="regex", pattern=r"(x+x+)+y")
RULES = [
    WHOLE,
    FIRST,
    LAST,
    Evaluate(by="regex", pattern=r"(?m)^(\w+) *(?:=|:) *(.*)"),
    ENDLESS,
    JSON,
    Evaluate(by="json", keys=["a"]),
    LABELS,
]


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
    assert is_right(expected, answer, FIRST) is first_line
    assert is_right(expected, answer, WHOLE) is whole


@pytest.mark.parametrize(
    ("answer", "right"), [("Bounded.\nSAFE", True), ("Unbounded.\nSAFE \n", True), ("SAFE\nBounded.", False), ("", False)]
)
def test_the_last_line_alone_may_count(answer: str, right: bool) -> None:
    assert is_right("Bounded.\nSAFE", answer, LAST) is right


@pytest.mark.parametrize(("rule", "right"), [(FIRST, 3), (LAST, 2), (WHOLE, 2)])
def test_score(rule: Evaluate, right: int) -> None:
    counted = score(["a\n1", "a\n1", "b", "c"], ["a\n1", "a\n2", "b ", "x"], rule)
    assert counted == Score(right, 4)
    assert counted.percent == 100 * right / 4


def test_same_counts_what_the_rule_counts() -> None:
    assert same(["a", "b\n", "c"], [" a", "b", "C"], WHOLE) == Score(2, 3)
    assert same(["a\n1", "b\n2"], ["x\n1", "b\n3"], LAST) == Score(1, 2)
    assert same(["neither", "one", "SAFE"], ["neither ", "other", "it is SAFE"], LABELS) == Score(2, 3)  # two cannot be read


def test_a_missing_answer_is_no_small_matter() -> None:
    for rule in RULES:
        with pytest.raises(ValueError, match="shorter"):
            score(["a", "b"], ["a"], rule)
        with pytest.raises(ValueError, match="shorter"):
            same(["a", "b"], ["a"], rule)


@pytest.mark.parametrize(
    ("pattern", "expected", "answer", "right", "readable"),
    [
        (r"Total: (\d+)", "Total: 12", "So. Total: 12, I think", True, True),
        (r"Total: (\d+)", "Total: 12", "Total: 1", False, True),
        (r"Total: (\d+)", "Total: 12", "total: 12", False, False),
        (r"(?i)total: (\d+)", "Total: 12", "total: 12", True, True),
        (r"Total: (\d+)", "Total: 12", "", False, False),
        (r"(?s).*= (.*)", "= 2", "= 1\n= 2 \n", True, True),  # the last place, white space aside
        (r"(\w+) is (?:in )?(\w+)", "Oslo is in Norway", "Oslo is Norway", True, True),
        (r"(\w+) is (?:in )?(\w+)", "Oslo is in Norway", "Rome is in Norway", False, True),
        (r"(\d+)?", "3", "none", False, False),  # matches, and captures nothing
    ],
)
def test_what_a_pattern_captures_is_compared(pattern: str, expected: str, answer: str, right: bool, readable: bool) -> None:
    rule = Evaluate(by="regex", pattern=pattern)
    assert score([expected], [answer], rule) == Score(int(right), 1, unreadable=int(not readable))
    assert is_right(expected, answer, rule) is right


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ('{"a": 1, "b": "x"}', '{"b":"x",\n"a":1.0}', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": [0, false]}', '{"a": [false, 0]}', False),
        ('{"a": 1}', '{"a": "1"}', False),
        ('{"a": null}', "{}", False),
        ('{"a": 1}', '{"a": 1, "b": 2}', False),
        ('{"a": 1}', 'Here it is:\n```json\n{"a": 1}\n```\nDone.', True),
        ('```\n{"a": 1}\n```', '{"a": 1}', True),
        ("[1, 2]", "[1, 2.0]", True),
        ("[1, 2]", "[2, 1]", False),
        ("{}", "[]", False),
        ("{}", "{}", True),
        ("12345678901234567890", "12345678901234567891", False),
    ],
)
def test_json_is_equal_by_what_it_says(expected: str, answer: str, right: bool) -> None:
    counted = score([expected], [answer], JSON)
    assert (counted.right, counted.unreadable) == (int(right), 0)


@pytest.mark.parametrize(
    "answer",
    [
        "", '{"a": 1', 'It is {"a": 1}', '```json\n{"a": 1}', '```json\n{"a": 1}\n', '{"a": NaN}', "1" * 5000, "[" * 100_000,
        '{"a":' * 5000, "[" * 500 + "]" * 500, "```\n```",
    ],
)  # fmt: skip
def test_what_is_no_json_is_not_readable(answer: str) -> None:
    assert score(['{"a": 1}'], [answer], JSON) == Score(0, 1, unreadable=1, keys_right=0, keys=1)


def test_keys_that_are_right_are_counted() -> None:
    expected = ['{"name": "Ann", "city": "Oslo", "age": 3}'] * 4
    answers = ['{"name": "Ann", "city": "Rome", "age": 3}', '{"name": "Ann"}', "Ann", '{"name":"Ann","city":"Oslo","age":3,"x":1}']
    counted = score(expected, answers, JSON)
    assert counted == Score(0, 4, unreadable=1, keys_right=2 + 1 + 0 + 3, keys=3 + 3 + 3 + 4)
    assert counted.keys_percent == 100 * 6 / 13
    named = score(expected, answers, Evaluate(by="json", keys=["name", "city"]))
    assert named == Score(1, 4, unreadable=1, keys_right=1 + 1 + 0 + 2, keys=4 * 2)
    assert score(["[1]"], ["[1]"], Evaluate(by="json", keys=["name"])).unreadable == 1  # no object


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("SAFE", "SAFE"), ("It is UNSAFE.", "UNSAFE"), ("SAFE ENOUGH, say", "SAFE ENOUGH"), ("(SAFE)", "SAFE"), ("SAFE SAFE", "SAFE"),
        ("SAFELY", None), ("safe", None), ("SAFE2", None), ("SAFE or UNSAFE", None), ("", None), ("SAFE\u0301", None),
    ],
)  # fmt: skip
def test_a_label_is_found_in_the_answer(answer: str, label: str | None) -> None:
    assert {name: is_right(name, answer, LABELS) for name in LABELS.labels or ()} == {
        name: name == label for name in ("SAFE", "UNSAFE", "SAFE ENOUGH")
    }


def test_labels_of_scripts_that_do_not_part_words() -> None:
    rule = Evaluate(by="labels", labels=["正面", "负面"])
    assert is_right("正面", "这是正面的评价", rule)
    rule = Evaluate(by="labels", labels=["C++", "C"])
    assert is_right("C++", "in C++.", rule)
    assert is_right("C", "in C.", rule)
    assert not is_right("C", "in Cobol", rule)


def test_what_is_said_for_what() -> None:
    answers = ["SAFE", "UNSAFE", "either SAFE or UNSAFE", "who knows", "UNSAFE"]
    counted = score(["SAFE"] * 4 + ["UNSAFE"], answers, LABELS)
    assert (counted.right, counted.unreadable) == (2, 2)
    assert counted.confusion == {
        "SAFE": {"SAFE": 1, "UNSAFE": 1, NONE: 1, SEVERAL: 1},
        "UNSAFE": {"UNSAFE": 1},
        "SAFE ENOUGH": {},
    }


@pytest.mark.parametrize(
    ("rule", "expected", "fault"),
    [
        (
            Evaluate(by="regex", pattern=r"is (\d+)"),
            ["is 1", "none", "nor this"],
            "evaluate.pattern: the expected answer in row 2 is not matched, or nothing of it captured ('none'); so 1 more of 3",
        ),
        (JSON, ["{}", '{"a"}'], "evaluate.by: the expected answer in row 2 is no JSON "),
        (Evaluate(by="json", keys=["a"]), ["[]"], "evaluate.keys: the expected answer in row 1 is no object with keys "),
        (
            Evaluate(by="json", keys=["name", "ctiy"]),
            ['{"name": 1, "city": 2}', "{}"],
            "evaluate.keys: 'ctiy' stands in no expected answer; did you mean city?",
        ),
        (LABELS, ["SAFE", "Safe"], "evaluate.labels: the expected answer in row 2 names none of the labels ('Safe')"),
        (LABELS, ["SAFE, not UNSAFE"], "evaluate.labels: the expected answer in row 1 names several labels, SAFE, UNSAFE "),
        (Evaluate(by="regex", pattern=r"^(a|aa)+$"), ["a"], "evaluate.pattern: takes more than 1 second on an answer that repeats"),
    ],
)
def test_a_rule_by_which_nobody_could_be_right_is_refused(rule: Evaluate, expected: list[str], fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        refuse_unreadable(rule, ((f"row {n}", text) for n, text in enumerate(expected, 1)))
    assert caught.value.message.startswith(fault)
    assert "--set evaluate.by" in str(caught.value.hint)


def test_a_rule_that_suits_is_not_refused() -> None:
    every = {"regex": "a: b", "json": '{"a": 1}', "labels": "SAFE"}
    for rule in RULES:
        if rule is not ENDLESS:
            refuse_unreadable(rule, [("row 1", every.get(rule.by, ""))])
        refuse_unreadable(rule, [])


def pieces(draw: random.Random) -> str:
    """An answer of pieces that some rule looks for, in any order, some of them often."""
    known = [
        "SAFE",
        "UNSAFE",
        " ENOUGH",
        "```",
        "```json\n",
        "\n",
        '{"a": ',
        "}",
        "[",
        "]",
        '"',
        "\\",
        "1e999",
        "-",
        "NaN",
        "a: ",
        "xx" * 20,
    ]
    odd = ["\0", "\ud800", "\u2028", "\u0301", "\N{NO-BREAK SPACE}", "👩\u200d👧", "\x1b[31m", "1" * 4400, "[" * 2000, "=" * 300]
    return "".join(draw.choice(known + odd) * draw.choice([1, 1, 1, 2, 5]) for _ in range(draw.randrange(12)))


def test_no_answer_can_crash_or_hang_a_score() -> None:
    draw = random.Random(7)  # noqa: S311
    every = [pieces(draw) for _ in range(150)]
    for rule in RULES:
        texts = every[:20] if rule is ENDLESS else every
        alone = [KINDS[rule.by].read(rule, text) for text in texts]
        counted = score(texts, texts, rule)  # each against itself
        assert counted.right + counted.unreadable == len(texts)
        assert counted.unreadable == sum(each is None for each in alone)
        assert same(texts, texts, rule).right == len(texts)
        assert all(isinstance(counted_text(rule, text), str) for text in texts)
        json.dumps(counted.confusion)


def test_a_pattern_gives_up() -> None:
    """Python's re would take longer than the universe has been there."""
    started = time.perf_counter()
    assert score(["xxy"], ["x" * 5000], ENDLESS) == Score(0, 1, unreadable=1)
    assert time.perf_counter() - started < 5


def test_every_rule_has_words() -> None:
    assert [words(rule) for rule in (WHOLE, FIRST, LAST, JSON)] == [
        "the whole answer", "the first line", "the last line", "the JSON value, every key of it",
    ]  # fmt: skip
    assert words(LABELS) == "the label: SAFE | UNSAFE | SAFE ENOUGH"
    assert len(words(Evaluate(by="regex", pattern="(" + "x" * 500 + ")"))) < 120

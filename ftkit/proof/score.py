"""How answers are scored: what counts of one by each kind of `evaluate`, and how many are right."""

from __future__ import annotations

import difflib
import json
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ftkit.errors import RecipeError
from ftkit.recipe import KEY_OF, Evaluate

SECONDS = 0.1  # for a pattern on one answer: a usual one takes some millionths
BABBLE_SECONDS, BABBLE_CHARACTERS = 1.0, 2000  # for it on an answer that repeats itself without end, as untrained models do
DEEPEST = 100  # of lists and objects in each other
NONE, SEVERAL = "none of them", "several of them"  # what an answer says where it is no label


@dataclass(frozen=True)
class Score:
    """How many answers are right."""

    right: int
    rows: int
    unreadable: int = 0  # answers in which there was nothing to compare; none of them is right
    keys_right: int | None = None  # by json alone: keys that are as expected
    keys: int | None = None  # of so many: those of the expected answers, and those that the answers have beside them
    confusion: dict[str, dict[str, int]] | None = None  # by labels alone: expected → said → answers, without zeros

    @property
    def percent(self) -> float:
        return 100 * self.right / self.rows

    @property
    def keys_percent(self) -> float | None:
        return 100 * self.keys_right / self.keys if self.keys and self.keys_right is not None else None


Read = Callable[[Evaluate, str], Any]


@dataclass(frozen=True)
class Kind:
    """One kind of `evaluate`."""

    words: Callable[[Evaluate], str]  # what is compared, for a person
    read: Read  # what counts of an answer, to be compared with ==; None: it cannot be read
    lacks: Callable[[Evaluate, str], str] | None = None  # why an answer cannot be read, for a person; None: each can
    fault: Callable[[Evaluate, Sequence[str]], str | None] = lambda rule, expected: None  # what else does not suit expected answers
    also: Callable[[Evaluate, Sequence[str], Sequence[str]], dict[str, Any]] = lambda rule, expected, answers: {}  # more of a Score


def score(expected: Sequence[str], answers: Sequence[str], rule: Evaluate) -> Score:
    """Count right answers. Whatever an answer says, it is counted, and in bounded time."""
    kind = KINDS[rule.by]
    pairs = [(kind.read(rule, e), kind.read(rule, a)) for e, a in zip(expected, answers, strict=True)]
    right, unreadable = sum(a is not None and e == a for e, a in pairs), sum(a is None for _, a in pairs)
    return Score(right, len(pairs), unreadable, **kind.also(rule, expected, answers))


def is_right(expected: str, answer: str, rule: Evaluate) -> bool:
    """Whether what counts of an answer equals what counts of the expected one."""
    counted = KINDS[rule.by].read(rule, answer)
    return counted is not None and bool(counted == KINDS[rule.by].read(rule, expected))


def is_readable(answer: str, rule: Evaluate) -> bool:
    """Whether it says anything that could count."""
    return KINDS[rule.by].read(rule, answer) is not None


def same(first: Sequence[str], second: Sequence[str], rule: Evaluate) -> Score:
    """Count answers of which the same counts in both; of two that cannot be read, all counts."""

    def counts(answer: str) -> Any:
        counted = KINDS[rule.by].read(rule, answer)
        return [answer.strip()] if counted is None else counted  # a list is nothing that counts

    return Score(sum(counts(a) == counts(b) for a, b in zip(first, second, strict=True)), len(first))


def words(rule: Evaluate) -> str:
    """What is compared, for a person: `the last line`."""
    return KINDS[rule.by].words(rule)


def counted_text(rule: Evaluate, answer: str) -> str:
    """What counts of an answer, where that is one text; else all of it."""
    counted = KINDS[rule.by].read(rule, answer)
    return str(counted) if isinstance(counted, str) else answer.strip()


def refuse_unreadable(rule: Evaluate, expected: Iterable[tuple[str, str]]) -> None:
    """Raise RecipeError where an expected answer, a pair of its place and its text, could not be got right by anyone."""
    kind = KINDS[rule.by]
    if kind.lacks is None:
        return
    every = list(expected)
    unread = [(where, text) for where, text in every if kind.read(rule, text) is None]
    hint = "another rule: --set evaluate.by=last_line, say; what each takes stands in docs/recipe.md"
    if unread:
        where, text = unread[0]
        others = f"; so {len(unread) - 1:,} more of {len(every):,}" if len(unread) > 1 else ""
        key = next((key for key, by in KEY_OF.items() if by == rule.by and getattr(rule, key) is not None), "by")
        raise RecipeError(f"evaluate.{key}: the expected answer in {where} {kind.lacks(rule, text)} ({_short(text)}){others}.", hint)
    if fault := kind.fault(rule, [text for _, text in every]):
        raise RecipeError(fault, hint)


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


def _short(text: str) -> str:
    return repr(_cut(" ⏎ ".join(text.strip().splitlines())))


def _first_line(rule: Evaluate, text: str) -> str:
    return text.strip().split("\n")[0].strip()


def _last_line(rule: Evaluate, text: str) -> str:
    return text.strip().split("\n")[-1].strip()


# A regular expression.


def _captured(rule: Evaluate, text: str, seconds: float = SECONDS) -> str | tuple[str | None, ...] | None:
    """What the groups capture, white space around it aside. Raises TimeoutError."""
    import regex  # Python's re cannot be told when to give up

    assert rule.pattern is not None
    with warnings.catch_warnings(action="ignore"):
        found = regex.compile(rule.pattern).search(text.strip(), timeout=seconds)
    groups = [part if part is None else part.strip() for part in found.groups()] if found else []
    if all(part is None for part in groups):
        return None
    return str(groups[0]) if len(groups) == 1 else tuple(groups)


def _read_pattern(rule: Evaluate, text: str) -> str | tuple[str | None, ...] | None:
    try:
        return _captured(rule, text)
    except (TimeoutError, MemoryError):
        return None


def _lacks_match(rule: Evaluate, text: str) -> str:
    try:
        _captured(rule, text, 10 * SECONDS)
    except (TimeoutError, MemoryError):
        return f"takes this pattern more than {10 * SECONDS:g} seconds to read"
    return "is not matched, or nothing of it captured"


def _endless(rule: Evaluate, expected: Sequence[str]) -> str | None:
    """The fault of a pattern that goes through very many ways to match before it gives up, found on made answers."""
    for text in sorted(set(expected), key=len)[:20]:
        babble = text.strip() * (BABBLE_CHARACTERS // max(1, len(text.strip())) or 1)
        for answer in (babble[:BABBLE_CHARACTERS], babble[:BABBLE_CHARACTERS] + "\0"):
            try:
                _captured(rule, answer, BABBLE_SECONDS)
            except (TimeoutError, MemoryError):
                return (
                    f"evaluate.pattern: takes more than {BABBLE_SECONDS:g} second on an answer that repeats {_short(text)}, as models "
                    "do before training: take repetitions out of each other, as ((a|b)+)* has them."
                )
    return None


# JSON.


def _plain(value: Any, depth: int = 0) -> Any:
    """A value in which == is equality in JSON: 1 is 1.0, and true is not 1. Raises ValueError."""
    if depth > DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        return {key: _plain(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each, depth + 1) for each in value]
    return (value,) if isinstance(value, bool) else value


def _no_number(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _parsed(text: str) -> Any:
    """Raises ValueError."""
    try:
        return _plain(json.loads(text, parse_constant=_no_number))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _in_fence(text: str) -> str | None:
    """What stands in the first block between lines of ``` or ```json; None: there is none, or it does not end."""
    inside: list[str] | None = None
    for line in text.split("\n"):
        if inside is None:
            inside = [] if line.strip().lower() in ("```", "```json") else None
        elif line.strip() == "```":
            return "\n".join(inside)
        else:
            inside.append(line)
    return None


def _read_json(rule: Evaluate, text: str) -> dict[str | None, Any] | None:
    """The keys of an answer that is an object, those that are compared; of any other value, itself without a key."""
    for candidate in (text, _in_fence(text)):
        try:
            value = _parsed(candidate) if candidate is not None else None
        except ValueError:
            continue
        if candidate is None or (rule.keys and not isinstance(value, dict)):
            return None
        return {key: value[key] for key in rule.keys or value if key in value} if isinstance(value, dict) else {None: value}
    return None


def _lacks_json(rule: Evaluate, text: str) -> str:
    return "is no JSON" if _read_json(Evaluate(by="json"), text) is None else "is no object with keys"


def _unknown_keys(rule: Evaluate, expected: Sequence[str]) -> str | None:
    there = sorted({str(key) for text in expected for key in _read_json(Evaluate(by="json"), text) or ()})
    unknown = [key for key in rule.keys or () if key not in there] if expected else []
    if not unknown:
        return None
    near = difflib.get_close_matches(unknown[0], there, 1)
    known = f"did you mean {near[0]}?" if near else f"they have: {', '.join(there[:20])}"
    return f"evaluate.keys: {unknown[0]!r} stands in no expected answer; {known}"


def _keys_right(rule: Evaluate, expected: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    right = every = 0
    for wanted, given in zip(expected, answers, strict=True):
        theirs, ours = _read_json(rule, wanted) or {}, _read_json(rule, given) or {}
        every += len(theirs.keys() | ours.keys())
        right += sum(key in ours and ours[key] == value for key, value in theirs.items())
    return {"keys_right": right, "keys": every}


# Labels.

CASED = ("Lu", "Ll", "Lt", "Nd")  # letters of scripts that write words apart, and digits


@lru_cache(maxsize=8)
def _finder(labels: tuple[str, ...]) -> Any:
    """Finds labels, the longest first; a label that begins or ends with a letter or a digit not inside a word."""
    import regex

    before, after = r"(?<![\p{Lu}\p{Ll}\p{Lt}\p{Nd}])", r"(?![\p{Lu}\p{Ll}\p{Lt}\p{Nd}\p{M}])"

    def whole(label: str) -> str:
        first, last = (unicodedata.category(label[end]) in CASED for end in (0, -1))
        return (before if first else "") + str(regex.escape(label)) + (after if last else "")

    return regex.compile("|".join(whole(label) for label in sorted(labels, key=len, reverse=True)))


def _named(rule: Evaluate, text: str) -> set[str]:
    """The labels in an answer. One inside a longer one is not there."""
    return {found[0] for found in _finder(tuple(rule.labels or ())).finditer(text)}


def _read_label(rule: Evaluate, text: str) -> str | None:
    named = _named(rule, text)
    return named.pop() if len(named) == 1 else None


def _lacks_label(rule: Evaluate, text: str) -> str:
    named = _named(rule, text)
    return f"names several labels, {', '.join(sorted(named))}" if named else "names none of the labels"


def _confusion(rule: Evaluate, expected: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    table: dict[str, dict[str, int]] = {label: {} for label in rule.labels or ()}
    for wanted, given in zip(expected, answers, strict=True):
        named = _named(rule, given)
        said = named.pop() if len(named) == 1 else SEVERAL if named else NONE
        if label := _read_label(rule, wanted):
            table[label][said] = table[label].get(said, 0) + 1
    return {"confusion": table}


KINDS: dict[str, Kind] = {
    "whole": Kind(lambda rule: "the whole answer", lambda rule, text: text.strip()),
    "first_line": Kind(lambda rule: "the first line", _first_line),
    "last_line": Kind(lambda rule: "the last line", _last_line),
    "regex": Kind(lambda rule: f"what {_cut(rule.pattern or '')} captures", _read_pattern, _lacks_match, _endless),
    "json": Kind(
        lambda rule: f"the JSON keys {_cut(', '.join(rule.keys))}" if rule.keys else "the JSON value, every key of it",
        _read_json, _lacks_json, _unknown_keys, _keys_right,
    ),
    "labels": Kind(lambda rule: f"the label: {_cut(' | '.join(rule.labels or ()))}", _read_label, _lacks_label, also=_confusion),
}  # fmt: skip

"""What a dataset is: what was recognised, how long it is, what comes twice, what contradicts, and what will be learnt of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftkit.data.lengths import Batching, TokenCounts, batching, count_tokens
from ftkit.data.mask import cut, examples_of
from ftkit.data.rows import CALLS, IGNORED, Example, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACES_SHOWN = 5
DECODED_TOGETHER = 64  # tokens: a long row is not decoded from its beginning again and again
Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Part:
    """The rows of one purpose (train, validation, test) as they were read."""

    rows: int
    forms: dict[str, int]  # rows of each form
    answers: int
    unlearnt: int  # answers that the row says not to learn
    systems: int  # rows with a system message
    reasoning: int  # answers with what was thought before them
    calls: int  # answers that call tools


@dataclass(frozen=True)
class Bin:
    """Examples whose length in tokens is above the bin before, up to `to_tokens`."""

    to_tokens: int
    examples: int


@dataclass(frozen=True)
class Finding:
    """Something that a person may not have meant."""

    what: str
    count: int
    places: tuple[str, ...]  # the first of them


@dataclass(frozen=True)
class Token:
    id: int
    text: str
    learnt: bool


@dataclass(frozen=True)
class Shown:
    """A row, token by token: an example for each answer where the conversation does not stay in one."""

    place: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Survey:
    """All of it."""

    parts: dict[str, Part]
    examples: int  # what the trained and validated rows become
    learnt_tokens: int
    tokens: TokenCounts
    histogram: tuple[Bin, ...]
    padding: Batching
    findings: tuple[Finding, ...]
    shown: tuple[Shown, ...]


def survey(
    tokenizer: PreTrainedTokenizerBase,
    parts: Mapping[str, Sequence[Row]],
    *,
    max_length: int,
    effective_batch_size: int,
    seed: int,
    show: int = 0,
) -> Survey:
    """Look at rows by their purpose; `train` and `validation` are tokenised. Raises DataError as `tokenise` does."""
    examples = {
        purpose: [(row, example) for row in rows for example in examples_of(tokenizer, row)]
        for purpose, rows in parts.items()
        if purpose != "test"
    }
    every = [example for pairs in examples.values() for _, example in pairs]
    trained = [len(example.input_ids) for example in cut([example for _, example in examples["train"]], max_length)]
    return Survey(
        parts={purpose: _part(rows) for purpose, rows in parts.items()},
        examples=len(every),
        learnt_tokens=sum(label != IGNORED for example in every for label in example.labels),
        tokens=count_tokens(every, max_length),
        histogram=tuple(_histogram([len(example.input_ids) for example in every])),
        padding=batching(trained, effective_batch_size, effective_batch_size, max_length, seed),
        findings=tuple(_findings(parts, examples, max_length)),
        shown=tuple(Shown(row.where, tuple(_tokens(tokenizer, example))) for row, example in examples["train"][:show]),
    )


def _part(rows: Sequence[Row]) -> Part:
    answers = [(row, n) for row in rows for n, message in enumerate(row.messages) if message["role"] == "assistant"]
    return Part(
        rows=len(rows),
        forms=dict(Counter(row.form for row in rows)),
        answers=len(answers),
        unlearnt=sum(n in row.unlearnt for row, n in answers),
        systems=sum(row.messages[0]["role"] == "system" for row in rows),
        reasoning=sum(
            bool(row.messages[n].get("reasoning_content")) or row.messages[n]["content"].startswith("<think>") for row, n in answers
        ),
        calls=sum(CALLS in row.messages[n] for row, n in answers),
    )


def _histogram(lengths: Sequence[int]) -> list[Bin]:
    """Doubling lengths, from the shortest's to the longest's."""
    counts = Counter(1 << max(0, (length - 1).bit_length()) for length in lengths)
    first, last = min(counts), max(counts)
    sizes = [first << n for n in range((last // first).bit_length())]
    return [Bin(size, counts[size]) for size in sizes]


def _findings(parts: Mapping[str, Sequence[Row]], examples: Mapping[str, Sequence[tuple[Row, Example]]], max_length: int) -> list[Finding]:
    found = [*_within(parts["train"])]
    train = {_key(row.messages) for row in parts["train"]}
    asked = {_key(row.question) for row in parts["train"]}
    for purpose in ("validation", "test"):
        rows = parts.get(purpose, ())
        found += [
            _finding(f"{purpose} rows that are trained on too", [row for row in rows if _key(row.messages) in train]),
            _finding(
                f"{purpose} questions that are trained on with another answer",
                [row for row in rows if _key(row.question) in asked and _key(row.messages) not in train],
            ),
        ]
    long = [(row, example) for pairs in examples.values() for row, example in pairs if len(example.input_ids) > max_length]
    left_out = [row for row, example in long if not cut([example], max_length)]
    cut_short = [row for row, example in long if cut([example], max_length)]
    found += [
        _finding("rows cut at training.max_length, whose end is not learnt", cut_short),
        _finding("rows left out: their answer lies beyond training.max_length", left_out),
    ]
    found.append(_finding("rows whose question is empty", [row for row in parts["train"] if not row.question[-1]["content"].strip()]))
    answers = Counter(row.answer.strip() for row in parts["train"])
    common, times = answers.most_common(1)[0]
    if len(answers) > 1 and 2 * times > len(parts["train"]):
        found.append(Finding(f"rows with one answer, {common[:40]!r}: more than half", times, ()))
    return [finding for finding in found if finding.count]


def _within(rows: Sequence[Row]) -> list[Finding]:
    seen: set[Key] = set()
    answers: dict[Key, set[str]] = defaultdict(set)
    twice, contradicting = [], []
    for row in rows:
        key, question = _key(row.messages), _key(row.question)
        if key in seen:
            twice.append(row)
        elif answers[question]:
            contradicting.append(row)
        seen.add(key)
        answers[question].add(row.answer)
    return [_finding("rows that come twice", twice), _finding("questions that come again with another answer", contradicting)]


def _key(messages: Sequence[Message]) -> Key:
    """Messages without the white space in which they may differ."""
    return tuple((message["role"], " ".join([*message["content"].split(), *map(repr, message.get(CALLS, ()))])) for message in messages)


def _finding(what: str, rows: Sequence[Row]) -> Finding:
    return Finding(what, len(rows), tuple(row.where for row in rows[:PLACES_SHOWN]))


def _tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[Token]:
    """Each token with what it adds to the text of those before it; a character of several tokens stands at the last of them."""
    tokens, text, begin, last = [], "", 0, len(example.input_ids)
    for n, (token, label) in enumerate(zip(example.input_ids, example.labels, strict=True), 1):
        whole = str(tokenizer.decode(example.input_ids[begin:n]))
        is_part = whole.endswith("\ufffd") and n < last
        tokens.append(Token(token, "" if is_part else whole[len(text) :] if whole.startswith(text) else whole, label != IGNORED))
        if not is_part:
            text = whole
            if n - begin >= DECODED_TOGETHER:
                begin, text = n, ""
    return tokens

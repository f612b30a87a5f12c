"""What a dataset is: what was recognised, how long it is, what comes twice, what contradicts, and what will be learnt of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftkit.data.formats import CLASSIFICATION
from ftkit.data.lengths import Batching, Tally, TokenCounts, batching, count_tokens
from ftkit.data.mask import learnt_of
from ftkit.data.read import LeftOut
from ftkit.data.rows import CALLS, IGNORED, Example, Message, Pair, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACES_SHOWN = 5
DECODED_TOGETHER = 64  # tokens: a long row is not decoded from its beginning again and again
DIFFERENT_ANSWERS = 10_000  # that are counted; one that more than half of the rows have is among the first


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
    passed_over: dict[str, int]  # columns that are not read, and in how many rows they hold something


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
    faulty: LeftOut | None = None,
) -> Survey:
    """Look at rows by their purpose; `train` and `validation` are tokenised. Raises DataError as `tokenise` does."""
    tallies: list[Tally] = []
    shown: list[Shown] = []
    cut_short, left_out, alike = (
        _Found("rows cut at training.max_length, whose end is not learnt"),
        _Found("rows left out: their answer lies beyond training.max_length"),
        _Found("preferences left out: their answers do not differ within training.max_length"),
    )
    for purpose in ("train", "validation"):
        tallies.append(Tally(max_length))
        for row in parts[purpose]:
            for example in learnt_of(tokenizer, row):
                tallies[-1].add(example)
                if example.length > max_length:
                    (cut_short if example.cut(max_length) else alike if row.rejected else left_out).add(row)
                for answer, seen in _shown_of(example) if purpose == "train" and len(shown) < show * example.sequences else ():
                    shown.append(Shown(row.where + answer, tuple(pieces(tokenizer, seen))))
    found = [*_findings(parts), cut_short, left_out, alike, *_of_answers(parts["train"])]
    lengths = [length for counted in tallies for length in counted.lengths]
    return Survey(
        parts={purpose: _part(rows) for purpose, rows in parts.items()},
        examples=len(lengths),
        learnt_tokens=sum(counted.learnt_tokens for counted in tallies),
        tokens=count_tokens(tallies),
        histogram=tuple(_histogram(lengths)),
        padding=batching(tallies[0].kept, effective_batch_size, effective_batch_size, max_length, seed),
        findings=(*faulty_rows(faulty or LeftOut()), *(Finding(each.what, each.count, tuple(each.places)) for each in found if each.count)),
        shown=tuple(shown),
    )


def faulty_rows(left_out: LeftOut) -> list[Finding]:
    """What could not be read, and was left out."""
    return [Finding("rows that cannot be read, left out", left_out.count, tuple(left_out.first))] if left_out.count else []


def _shown_of(example: Example | Pair) -> list[tuple[str, Example]]:
    """What a row is shown as: of a preference each answer."""
    if isinstance(example, Example):
        return [("", example)]
    asked = example.prompt_ids
    answers = {"chosen": example.chosen_ids, "rejected": example.rejected_ids}
    return [(f", {name}", Example(asked + said, [IGNORED] * len(asked) + said)) for name, said in answers.items()]


@dataclass
class _Found:
    """A finding while it is looked for."""

    what: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.count += 1
        if len(self.places) < PLACES_SHOWN:
            self.places.append(row.where)


def _part(rows: Iterable[Row]) -> Part:
    counts: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    passed_over: Counter[str] = Counter()
    for row in rows:
        forms[row.form] += 1
        passed_over.update(row.passed_over)
        counts["systems"] += row.messages[0]["role"] == "system"
        for n, message in enumerate(row.messages):
            if message["role"] == "assistant":
                counts["answers"] += not row.is_text
                counts["unlearnt"] += n in row.unlearnt
                counts["reasoning"] += bool(message.get("reasoning_content")) or message["content"].startswith("<think>")
                counts["calls"] += CALLS in message
    names = ("answers", "unlearnt", "systems", "reasoning", "calls")
    return Part(rows=forms.total(), forms=dict(forms), passed_over=dict(passed_over), **{name: counts[name] for name in names})


def _histogram(lengths: Sequence[int]) -> list[Bin]:
    """Doubling lengths, from the shortest's to the longest's."""
    counts = Counter(1 << max(0, (length - 1).bit_length()) for length in lengths)
    first, last = min(counts), max(counts)
    sizes = [first << n for n in range((last // first).bit_length())]
    return [Bin(size, counts[size]) for size in sizes]


def _findings(parts: Mapping[str, Iterable[Row]]) -> Iterator[_Found]:
    """What comes twice and what contradicts. Rows are known by numbers, since the texts of two million would not fit."""
    twice, contradicting = _Found("rows that come twice"), _Found("questions that come again with another answer")
    turned = _Found("preferences that come again the other way round")
    train: set[int] = set()
    answered: dict[int, int] = {}  # question → its first answer
    for row in parts["train"]:
        key = _row_key(row)
        if key in train:
            twice.add(row)
        elif row.rejected:  # of a question several answers may be held against each other
            if _row_key(row, turned=True) in train:
                turned.add(row)
        elif not row.is_text and answered.setdefault(_key(row.question), key) != key:
            contradicting.add(row)
        train.add(key)
    yield twice
    yield contradicting
    yield turned
    for purpose in ("validation", "test"):
        again = _Found(f"{purpose} rows that are trained on too")
        otherwise = _Found(f"{purpose} questions that are trained on with another answer")
        for row in parts.get(purpose, ()):
            if _row_key(row) in train:
                again.add(row)
            elif not row.is_text and _key(row.question) in answered:
                otherwise.add(row)
        yield again
        yield otherwise


def _of_answers(rows: Iterable[Row]) -> Iterator[_Found]:
    """What is odd in questions and answers by themselves."""
    empty, answers, asked = _Found("rows whose question is empty"), Counter[str](), 0
    longer = _Found("preferences whose chosen answer is the longer one: more than 3 in 4, so that length may be what is learnt")
    numbers = _Found("answers that are numbers alone: data.labels gives classes names, as in '[bad, good]'")
    pairs = classified = 0
    for row in rows:
        if row.form == CLASSIFICATION:
            classified += 1
            numbers.count += row.answer.isdecimal()
        if row.rejected:
            pairs += 1
            longer.count += len(row.answer) > len(row.rejected["content"])
        if not row.is_text:
            asked += 1
            if not row.question[-1]["content"].strip() and row.question[-1]["role"] == "user":
                empty.add(row)
            if len(answers) < DIFFERENT_ANSWERS or row.answer.strip() in answers:
                answers[row.answer.strip()] += 1
    yield empty
    if classified and numbers.count == classified:
        yield numbers
    if 4 * longer.count > 3 * pairs:
        yield longer
    common, times = next(iter(answers.most_common(1)), ("", 0))
    if len(answers) > 1 and 2 * times > asked:
        yield _Found(f"rows with one answer, {common[:40]!r}: more than half", times)


def question_key(row: Row) -> int:
    """A number for a row's question, without its capitals either."""
    return _key([{**message, "content": message["content"].casefold()} for message in row.question])


def _row_key(row: Row, *, turned: bool = False) -> int:
    """A number for a row; of a preference, `turned` for the one with its answers in each other's place."""
    answers = [_key(answer.messages) for answer in row.answers]
    return hash(tuple(reversed(answers) if turned else answers))


def _key(messages: Sequence[Message]) -> int:
    """A number for messages without the white space in which they may differ; of two million, two agree by chance once in ten million."""
    words = ((message["role"], *message["content"].split(), *map(repr, message.get(CALLS, ()))) for message in messages)
    return hash(tuple(words))


def pieces(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[Token]:
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

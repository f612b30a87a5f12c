"""How long rows are, and what putting them into batches costs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ftkit.data.rows import Example, Pair

# Below so many tokens a step waits for the weights to be read, whatever the batch: a card's operations a second divided by
# its bytes a second, at 2 operations and 2 bytes a weight; 164 for an RTX 4090, 200 for an A100, 295 for an H100.
RIDGE_TOKENS = 256
PASS_TOKENS = 64  # what a pass costs beside its tokens, in tokens (docs/speed.md)


@dataclass(frozen=True)
class TokenCounts:
    """Lengths of a dataset's rows, in tokens; of a preference that of its prompt and the longer answer."""

    rows: int
    total: int
    median: int
    p95: int
    p99: int
    longest: int
    cut: int  # rows longer than max_length
    dropped: int  # of those, rows whose answer lies wholly beyond it: they are not trained on


@dataclass
class Tally:
    """What is counted of rows as they go by; none is kept."""

    max_length: int
    lengths: array[int] = field(default_factory=lambda: array("l"))  # of all rows, uncut
    kept: array[int] = field(default_factory=lambda: array("l"))  # of those that are trained on, cut
    tokens: int = 0  # uncut
    learnt_tokens: int = 0  # uncut
    most_learnt: int = 0  # of a row, cut; of a preference on average of its two answers
    highest_id: int = 0

    def add(self, example: Example | Pair) -> None:
        self.lengths.append(example.length)
        self.tokens += example.tokens
        self.learnt_tokens += example.learnt
        if trained := example.cut(self.max_length):
            self.kept.append(trained.length)
            self.most_learnt = max(self.most_learnt, -(-trained.learnt // trained.sequences))
            self.highest_id = max(self.highest_id, trained.highest_id)


def tally(examples: Iterable[Example | Pair], max_length: int) -> Tally:
    """Count rows. An empty one is none."""
    counted = Tally(max_length)
    for example in examples:
        counted.add(example)
    return counted


def count_tokens(tallies: Sequence[Tally]) -> TokenCounts:
    """Statistics of the rows' lengths."""
    lengths = sorted(length for counted in tallies for length in counted.lengths)
    return TokenCounts(
        rows=len(lengths),
        total=sum(counted.tokens for counted in tallies),
        median=lengths[len(lengths) // 2],
        p95=lengths[min(len(lengths) - 1, int(len(lengths) * 0.95))],
        p99=lengths[min(len(lengths) - 1, int(len(lengths) * 0.99))],
        longest=lengths[-1],
        cut=sum(length > counted.max_length for counted in tallies for length in counted.lengths),
        dropped=sum(len(counted.lengths) - len(counted.kept) for counted in tallies),
    )


@dataclass(frozen=True)
class Batching:
    """Tokens that an epoch computes, padding included, by how rows are put together. Rows are counted as they are trained, cut."""

    batch: int
    tokens: int  # of the rows themselves
    random_tokens: int  # batches in random order, each padded to its longest row
    grouped_tokens: int  # rows of like length together, in micro-batches of as many rows as there is room for, as ftkit trains
    packed_tokens: int  # rows joined into rows of max_length, as a packing trainer would
    grouped_batch_tokens: tuple[int, ...]  # of each grouped batch


def batching(
    lengths: Sequence[int], batch: int, effective_batch: int, max_length: int, seed: int, max_tokens: int | None = None
) -> Batching:
    """What padding costs at this batch size, of micro-batches that make up `effective_batch` rows a step.

    `max_tokens` as in `grouped_batch_tokens`. Packing is best fit, longest first.
    """
    import random
    from bisect import bisect_left, insort

    order = list(lengths)
    random.Random(seed).shuffle(order)
    free: list[int] = []  # room left in each packed row, sorted
    rows = 0
    for length in sorted(lengths, reverse=True):
        index = bisect_left(free, length)
        if index < len(free):
            insort(free, free.pop(index) - length)
        else:
            rows += 1
            insort(free, max_length - length)
    grouped = grouped_batch_tokens(lengths, batch, effective_batch, seed, max_tokens)
    return Batching(batch, sum(lengths), sum(padded_tokens(order, batch)), sum(grouped), rows * max_length, tuple(grouped))


def grouped_batch_tokens(
    lengths: Sequence[int], batch: int, effective_batch: int, seed: int, max_tokens: int | None = None, processes: int = 1
) -> list[int]:
    """Tokens of each micro-batch of an epoch, padding included, as the trainer puts rows of like length together.

    `batch` rows at once or, with `max_tokens`, as `micro_batches` has them. The order is that of the first epoch; training shuffles
    anew each epoch. Of several `processes`, that take a step's rows in turns, those of the first, which has the longest.
    """
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    if not lengths:  # every row is longer than max_length
        return []
    order = get_length_grouped_indices(lengths, effective_batch, generator=torch.Generator().manual_seed(seed))
    steps = [[lengths[row] for row in order[begin : begin + effective_batch]] for begin in range(0, len(order), effective_batch)]
    steps = [step[::processes] for step in steps]
    if max_tokens is None:
        return [tokens for step in steps for tokens in padded_tokens(step, batch)]
    return [max(step[row] for row in rows) * len(rows) for step in steps for rows in micro_batches(step, max_tokens)]


def micro_batches(
    lengths: Sequence[int], max_tokens: int, learnt: Sequence[int] | None = None, max_learnt: int = 0, *, packed: bool = False
) -> list[list[int]]:
    """The rows of one optimizer step, by number, split into the micro-batches that cost least, longest rows first.

    A micro-batch holds at most `max_tokens`, padding included (`packed`: there is none), and, of `learnt` tokens of each row, at
    most `max_learnt`; a row alone may always go. It costs its tokens, at least RIDGE_TOKENS, and PASS_TOKENS.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    least, begin_of = [0], [0]  # of the first so many rows: their cost, and where their last micro-batch begins
    for end in range(1, len(order) + 1):
        cost, tokens, scored, best, begins = 0, 0, 0, -1, 0
        for begin in range(end - 1, -1, -1):
            row = order[begin]
            tokens = tokens + lengths[row] if packed else lengths[row] * (end - begin)
            scored += learnt[row] if learnt else 0
            if end - begin > 1 and (tokens > max_tokens or scored > max_learnt):
                break
            cost = least[begin] + max(tokens, RIDGE_TOKENS) + PASS_TOKENS
            if best < 0 or cost <= best:
                best, begins = cost, begin
        least.append(best)
        begin_of.append(begins)
    found, end = [], len(order)
    while end:
        found.append(order[begin_of[end] : end])
        end = begin_of[end]
    return found[::-1]


def padded_tokens(lengths: Sequence[int], batch: int) -> list[int]:
    """Tokens of each `batch` rows in this order, padded to their longest."""
    return [max(part) * len(part) for part in (lengths[start : start + batch] for start in range(0, len(lengths), batch))]


def asked_together(longest_tokens: int) -> int:
    """How many questions are asked at once: at most 32, and about 8192 tokens, prompt and answer together."""
    return max(1, min(32, 8192 // longest_tokens))

"""How an optimizer step's rows are split into micro-batches."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ftkit.data.lengths import PASS_TOKENS, RIDGE_TOKENS, micro_batches

LENGTHS = [70, 900, 300, 310, 20, 450, 80, 75]


def cost(tokens: int) -> int:
    return max(tokens, RIDGE_TOKENS) + PASS_TOKENS


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("max_tokens", [900, 1000, 1800, 10_000])
def test_each_row_goes_once_within_the_room_and_no_split_costs_less(max_tokens: int, packed: bool) -> None:
    """Held against every split of the rows by length."""
    ordered = sorted(LENGTHS, reverse=True)

    def tokens(part: list[int]) -> int:
        return sum(part) if packed else max(part) * len(part)

    def splits(left: list[int]) -> list[list[list[int]]]:
        return [[left[:n], *rest] for n in range(1, len(left) + 1) if tokens(left[:n]) <= max_tokens for rest in splits(left[n:])] or [[]]

    found = [[LENGTHS[row] for row in rows] for rows in micro_batches(LENGTHS, max_tokens, packed=packed)]
    assert sorted(length for part in found for length in part) == sorted(LENGTHS)
    assert all(tokens(part) <= max_tokens for part in found)
    whole = [split for split in splits(ordered) if sum(map(len, split)) == len(ordered)]
    assert sum(cost(tokens(part)) for part in found) == min(sum(cost(tokens(part)) for part in split) for split in whole)
    assert all(min(before) >= max(after) for before, after in pairwise(found))


def test_learnt_tokens_have_a_limit_of_their_own_and_a_row_alone_always_goes() -> None:
    learnt = [60, 10, 10, 300, 10, 10, 60, 60]
    found = micro_batches(LENGTHS, 10_000, learnt, 130)
    assert all(len(rows) == 1 or sum(learnt[row] for row in rows) <= 130 for rows in found)
    assert [3] in found
    assert micro_batches([5000, 10], 1000) == [[0], [1]]
    assert micro_batches([5], 1000) == [[0]]

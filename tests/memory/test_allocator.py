"""The allocator's replay follows the rules of PyTorch's caching allocator; sizes are arithmetic on its constants."""

from __future__ import annotations

import random

import pytest

from ftkit.memory.allocator import MIB, Allocator


def test_sizes_are_rounded_to_512_bytes() -> None:
    allocator = Allocator()
    allocator.allocate("a", 1)
    allocator.allocate("b", 513)
    assert allocator.allocated_bytes == 512 + 1024


@pytest.mark.parametrize(
    ("size", "segment"),
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB)],
)
def test_a_segment_by_the_size_asked_for(size: int, segment: int) -> None:
    allocator = Allocator()
    allocator.allocate("a", size)
    assert allocator.reserved_bytes == segment


def test_the_smallest_free_block_that_is_large_enough_is_taken() -> None:
    allocator = Allocator()
    for key, size in (("large", 30 * MIB), ("small", 20 * MIB)):
        allocator.allocate(key, size)
    allocator.free("large")
    allocator.free("small")
    allocator.allocate("a", 20 * MIB)
    allocator.allocate("b", 30 * MIB)
    assert allocator.reserved_bytes == 50 * MIB


def test_a_large_block_is_split_only_where_more_than_a_mebibyte_is_left() -> None:
    allocator = Allocator()
    allocator.allocate("a", 20 * MIB)
    allocator.free("a")
    allocator.allocate("b", 19 * MIB)
    assert allocator.allocated_bytes == 20 * MIB  # the whole block
    allocator.free("b")
    allocator.allocate("c", 19 * MIB - 512)
    assert allocator.allocated_bytes == 19 * MIB - 512


def test_neighbours_are_joined_again() -> None:
    allocator = Allocator()
    for key in "abc":
        allocator.allocate(key, 6 * MIB)  # one segment of 20 MiB
    for key in "acb":
        allocator.free(key)
    allocator.allocate("whole", 20 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_fragments_are_not_one_block() -> None:
    allocator = Allocator()
    for key in "abc":
        allocator.allocate(key, 6 * MIB)
    allocator.free("a")
    allocator.free("c")  # 6 and 8 MiB, apart
    allocator.allocate("d", 9 * MIB)
    assert allocator.reserved_bytes == 2 * 20 * MIB


def test_cached_segments_are_given_back_before_the_limit_is_passed() -> None:
    allocator = Allocator(limit_bytes=50 * MIB)
    allocator.allocate("a", 30 * MIB)
    allocator.free("a")
    allocator.allocate("b", 40 * MIB)
    assert allocator.peak_reserved_bytes == 40 * MIB
    allocator.allocate("c", 12 * MIB)
    assert allocator.reserved_bytes == 52 * MIB


def test_only_wholly_free_segments_can_be_given_back() -> None:
    allocator = Allocator()
    allocator.allocate("a", 6 * MIB)
    allocator.allocate("b", 6 * MIB)
    allocator.free("a")
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free("b")
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_any_order_leaves_nothing_behind() -> None:
    draw = random.Random(7)  # noqa: S311
    allocator, live = Allocator(), {}
    for number in range(3000):
        if live and draw.random() < 0.48:
            allocator.free(key := draw.choice(sorted(live)))
            del live[key]
        else:
            live[number] = draw.choice([100, 4_000, 700_000, 3 * MIB, 25 * MIB])
            allocator.allocate(number, live[number])
        assert sum(live.values()) <= allocator.allocated_bytes <= allocator.reserved_bytes
    for key in live:
        allocator.free(key)
    assert allocator.allocated_bytes == 0
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0

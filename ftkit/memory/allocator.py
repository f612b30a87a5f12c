"""A replay of PyTorch's CUDA caching allocator: allocations and frees in, bytes allocated and reserved out."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

from ftkit.units import MIB

# torch/csrc/cuda (c10/cuda/CUDACachingAllocator.cpp): kMinBlockSize, kSmallSize, kSmallBuffer, kLargeBuffer, kMinLargeAlloc, kRoundLarge
MIN_BLOCK_BYTES = 512
SMALL_BYTES = 1 * MIB
SMALL_SEGMENT_BYTES = 2 * MIB  # no segment for large requests is so small
LARGE_SEGMENT_BYTES = 20 * MIB
MIN_LARGE_BYTES = 10 * MIB
ROUND_LARGE_BYTES = 2 * MIB
ADDRESS_BITS = 56
ADDRESS = (1 << ADDRESS_BITS) - 1


class Allocator:
    """The native backend on one stream, with its default settings (no expandable segments).

    Sizes are rounded to 512 bytes. Up to 1 MiB they come from 2 MiB segments, up to 10 MiB from 20 MiB segments, above
    from segments of their own, rounded to 2 MiB. The smallest free block that is large enough is taken (lowest address
    first among equals) and split where 512 bytes (small) or more than 1 MiB (large) would be left; neighbours that are
    free again are joined. Where a new segment would pass `limit_bytes`, segments that are wholly free are given back
    first; more than the limit is reserved only where that is not enough.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self._taken: dict[Hashable, tuple[int, int]] = {}  # key → address, size
        # Free blocks of segments for small and for large requests, each one number, size << ADDRESS_BITS | address: they
        # sort by size, then address. Tens of thousands of requests are replayed for every batch that is looked at.
        self._free_small: list[int] = []
        self._free_large: list[int] = []
        self._free_from: dict[int, int] = {}  # first address of a free block → address after it
        self._free_until: dict[int, int] = {}  # and back
        self._segments: dict[int, int] = {}  # first address → address after it; no segment begins where another ends
        self._next_address = 0

    def allocate(self, key: Hashable, size: int) -> None:
        """Give `key` a block of at least `size` bytes."""
        size = (size + MIN_BLOCK_BYTES - 1) & -MIN_BLOCK_BYTES or MIN_BLOCK_BYTES
        small = size <= SMALL_BYTES
        free = self._free_small if small else self._free_large
        index = bisect_left(free, size << ADDRESS_BITS)
        if index < len(free):
            start = free.pop(index) & ADDRESS
            end = self._free_from.pop(start)
        else:
            start, end = self._new_segment(size, small)
        rest = end - start - size
        if rest >= MIN_BLOCK_BYTES if small else rest > SMALL_BYTES:
            middle = start + size
            self._free_from[middle] = end
            self._free_until[end] = middle
            insort(free, rest << ADDRESS_BITS | middle)
        else:
            size = end - start
            del self._free_until[end]
        self._taken[key] = start, size
        self.allocated_bytes += size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes

    def _new_segment(self, size: int, small: bool) -> tuple[int, int]:
        if small:
            segment_bytes = SMALL_SEGMENT_BYTES
        elif size < MIN_LARGE_BYTES:
            segment_bytes = LARGE_SEGMENT_BYTES
        else:
            segment_bytes = (size + ROUND_LARGE_BYTES - 1) // ROUND_LARGE_BYTES * ROUND_LARGE_BYTES
        if self.limit_bytes is not None and self.reserved_bytes + segment_bytes > self.limit_bytes:
            self.empty_cache()
        self.reserved_bytes += segment_bytes
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes
        start, end = self._next_address, self._next_address + segment_bytes
        self._next_address = end + MIN_BLOCK_BYTES
        self._segments[start] = end
        self._free_until[end] = start
        return start, end

    def free(self, key: Hashable) -> None:
        """Take the block of `key` back and join it with free neighbours."""
        start, size = self._taken.pop(key)
        self.allocated_bytes -= size
        free = self._free_small if size <= SMALL_BYTES else self._free_large
        end = start + size
        before = self._free_until.pop(start, None)
        if before is not None:
            del free[bisect_left(free, start - before << ADDRESS_BITS | before)]
            start = before
        after = self._free_from.pop(end, None)
        if after is not None:
            del free[bisect_left(free, after - end << ADDRESS_BITS | end)]
            end = after
        self._free_from[start] = end
        self._free_until[end] = start
        insort(free, end - start << ADDRESS_BITS | start)

    def empty_cache(self) -> None:
        """Give back every segment that is wholly free, as `torch.cuda.empty_cache` does."""
        for start, end in list(self._segments.items()):
            if self._free_from.get(start) == end:
                size = end - start
                free = self._free_small if size == SMALL_SEGMENT_BYTES else self._free_large
                del free[bisect_left(free, size << ADDRESS_BITS | start)]
                del self._free_from[start], self._free_until[end], self._segments[start]
                self.reserved_bytes -= size

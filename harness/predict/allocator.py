"""A model of torch's CUDA caching allocator: bytes taken from the driver for a trace of one stream. No torch.

The rules are those of c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h, equal by default from torch 2.6
to 2.13. Later versions name two of the constants: `large_segment_size_mb` (default 20, the segment of requests below
10 MiB and the page of an expandable segment) and `per_process_memory_fraction` (default 1: no limit of its own).
Options that are off by default are not modelled: max_split_size_mb, roundup_power2_divisions,
garbage_collection_threshold, the pools of CUDA graphs. What differs from a card: where the driver puts a segment
decides between free blocks of equal size, and here each segment lies above the ones before.

Sizes and addresses inside are counted in units of 512 bytes, to which every size is rounded.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

Event = tuple[int, int]
"""A key and a size in bytes: size > 0 allocates under the key, size 0 releases the key; EMPTY_CACHE is the third."""
EMPTY_CACHE: Event = (-1, -1)
"""A call of `torch.cuda.empty_cache()`; every negative size is one."""

UNIT = 512
"""Bytes to which each request is rounded up."""
_MIB = 2**20 // UNIT
_SMALL = 1 * _MIB  # largest request of the small pool, and largest remainder that is not split off in the large pool
_SMALL_SEGMENT = 2 * _MIB
_LARGE_SEGMENT = 20 * _MIB  # for requests of the large pool below _OWN_SEGMENT
_OWN_SEGMENT = 10 * _MIB  # from here on a segment has the size of its request, rounded up to _ROUND
_ROUND = 2 * _MIB
_SHIFT = 60  # a free block is one number, size << _SHIFT | address: best fit is the first that is large enough
_ADDRESS = (1 << _SHIFT) - 1
_ENDLESS = 1 << (_SHIFT - 1)


class OutOfMemory(Exception):
    """A request that the limit leaves no memory for, with the cache given back."""

    def __init__(self, reached: int, requested: int) -> None:
        super().__init__(f"{requested} bytes do not fit beside {reached}")
        self.reached = reached
        """Bytes reserved when it failed: segments with live blocks."""
        self.requested = requested
        """Bytes that were to be taken from the driver besides."""


class _Pool:
    """Free blocks of the small or the large pool."""

    __slots__ = ("ends", "free", "holes", "page", "segments", "split_above", "starts")

    def __init__(self, page: int, split_above: int) -> None:
        self.page = page
        """Units in which an expandable segment grows."""
        self.split_above = split_above
        """A remainder is split off where it is larger."""
        self.free: list[int] = []
        """Free blocks by size, then address."""
        self.starts: dict[int, int] = {}
        """Size of the free block that starts at an address."""
        self.ends: dict[int, int] = {}
        """Start of the free block that ends at an address."""
        self.segments: dict[int, int] = {}
        """Size of the segment that starts at an address."""
        self.holes: list[tuple[int, int]] = [(0, _ENDLESS)]
        """Start and end of what an expandable segment has not mapped, by address."""

    def put(self, start: int, end: int) -> None:
        """Add a free block, merged with free blocks that touch it."""
        starts, ends, free = self.starts, self.ends, self.free
        after = starts.pop(end, 0)
        if after:
            del free[bisect_left(free, after << _SHIFT | end)]
            end += after
        before = ends.pop(start, -1)
        if before >= 0:
            del free[bisect_left(free, (start - before) << _SHIFT | before)]
            start = before
        starts[start] = end - start
        ends[end] = start
        insort(free, (end - start) << _SHIFT | start)

    def take(self, start: int) -> int:
        """Remove the free block that starts at an address, and return its size."""
        size = self.starts.pop(start)
        del self.ends[start + size]
        del self.free[bisect_left(self.free, size << _SHIFT | start)]
        return size


class CachingAllocator:
    """State of the allocator on one device and stream.

    Attributes (bytes): `allocated` and `reserved`, as `torch.cuda.memory_allocated` and `memory_reserved` count them,
    and their highest values, `peak_allocated` and `peak_reserved`. A block of the large pool counts whole as allocated
    where up to 1 MiB of it is more than was requested.
    """

    __slots__ = ("_allocated", "_expandable", "_large", "_limit", "_live", "_next", "_peak", "_peak_reserved",
                 "_reserved", "_small")  # fmt: skip

    def __init__(self, limit: int | None = None, *, expandable_segments: bool = False) -> None:
        """Start empty.

        Args:
            limit: bytes that the driver gives at most; null: as many as are asked for.
            expandable_segments: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
        """
        self._limit = _ENDLESS if limit is None else limit // UNIT
        self._expandable = expandable_segments
        self._small = _Pool(_SMALL_SEGMENT, 0)
        self._large = _Pool(_LARGE_SEGMENT, 0 if expandable_segments else _SMALL)
        self._live: dict[int, tuple[int, int]] = {}
        self._next = 0
        self._allocated = self._peak = self._reserved = self._peak_reserved = 0

    @property
    def allocated(self) -> int:
        """Bytes of live blocks."""
        return self._allocated * UNIT

    @property
    def reserved(self) -> int:
        """Bytes taken from the driver."""
        return self._reserved * UNIT

    @property
    def peak_allocated(self) -> int:
        """Highest `allocated`."""
        return self._peak * UNIT

    @property
    def peak_reserved(self) -> int:
        """Highest `reserved`."""
        return self._peak_reserved * UNIT

    def allocate(self, key: int, size: int) -> None:
        """Allocate `size` bytes, which is above 0, under a key that has none.

        Raises:
            OutOfMemory: the limit is reached, and the cache does not help.
            ValueError: the key has a live allocation.
        """
        live = self._live
        if key in live:
            raise ValueError(f"{key} is allocated already")
        units = (size + UNIT - 1) // UNIT
        pool = self._small if units <= _SMALL else self._large
        free = pool.free
        place = bisect_left(free, units << _SHIFT)
        if place == len(free):
            start, have = self._grow(pool, units)
        else:
            if self._expandable:
                place = _least_expandable(pool, place)
            block = free.pop(place)
            start, have = block & _ADDRESS, block >> _SHIFT
            del pool.starts[start]
        rest = have - units
        if rest > pool.split_above:
            inner = start + units
            pool.starts[inner] = rest
            pool.ends[start + have] = inner
            insort(free, rest << _SHIFT | inner)
            have = units
        else:
            del pool.ends[start + have]
        live[key] = start, have
        allocated = self._allocated = self._allocated + have
        if allocated > self._peak:
            self._peak = allocated

    def release(self, key: int) -> None:
        """Release what a key has.

        Raises:
            KeyError: it has nothing.
        """
        start, size = self._live.pop(key)
        self._allocated -= size
        # A block of the large pool is larger than any of the small one, whichever way it was cut.
        (self._small if size <= _SMALL else self._large).put(start, start + size)

    def empty_cache(self) -> None:
        """Give back segments that are free as a whole; of expandable ones, pages that are."""
        for pool in (self._large, self._small):
            if self._expandable:
                self._unmap(pool)
            else:
                for start, size in [each for each in pool.starts.items() if pool.segments.get(each[0]) == each[1]]:
                    pool.take(start)
                    del pool.segments[start]
                    self._reserved -= size

    def _grow(self, pool: _Pool, units: int) -> tuple[int, int]:
        """A free block from the driver, out of the free list: start and size. The cache is given back where the first
        attempt fails.
        """
        attempt = self._extend if self._expandable else self._segment
        wanted = attempt(pool, units)
        if wanted:
            self.empty_cache()
            wanted = attempt(pool, units)
            if wanted:
                raise OutOfMemory(self._reserved * UNIT, wanted * UNIT)
        block = pool.free[bisect_left(pool.free, units << _SHIFT)]
        return block & _ADDRESS, block >> _SHIFT

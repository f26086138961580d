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
from collections.abc import Iterable, Sequence

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

    __slots__ = ("ends", "free", "hole_ends", "holes", "page", "segments", "split_above", "starts")

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
        self.holes: list[int] = [0]
        """Starts of what an expandable segment has not mapped, by address; the last lies behind every block."""
        self.hole_ends: dict[int, int] = {0: _ENDLESS}
        """End of the hole that starts at an address."""

    def open(self, start: int, end: int) -> None:
        """Add a hole, merged with holes that touch it."""
        place = bisect_left(self.holes, start)
        if self.holes[place] == end:
            end = self.hole_ends.pop(self.holes.pop(place))
        if place and self.hole_ends[self.holes[place - 1]] == start:
            start = self.holes.pop(place - 1)
        insort(self.holes, start)
        self.hole_ends[start] = end

    def fill(self, start: int, size: int) -> None:
        """Map the first units of a hole: they become a free block."""
        end = self.hole_ends.pop(start)
        place = bisect_left(self.holes, start)
        if start + size < end:
            self.holes[place] = start + size
            self.hole_ends[start + size] = end
        else:
            del self.holes[place]
        self.put(start, start + size)

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

    __slots__ = ("_allocated", "_expandable", "_large", "_limit", "_live", "_new", "_next", "_peak", "_peak_reserved",
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
        """Address of the next segment."""
        self._new = 0
        """Address of the free block that the driver gave last."""
        self._allocated = self._peak = self._reserved = self._peak_reserved = 0

    @property
    def limit(self) -> int:
        """Bytes that the driver gives at most."""
        return self._limit * UNIT

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

    def restart_peak(self) -> None:
        """Start a new peak of what is allocated, from what is allocated now."""
        self._peak = self._allocated

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

    def run(self, events: Iterable[Event]) -> None:
        """Allocate and release one after another.

        Raises:
            OutOfMemory: the limit is reached, and the cache does not help.
        """
        allocate, release = self.allocate, self.release
        for key, size in events:
            if size > 0:
                allocate(key, size)
            elif size == 0:
                release(key)
            else:
                self.empty_cache()

    def _grow(self, pool: _Pool, units: int) -> tuple[int, int]:
        """A free block with memory from the driver, taken out of the free list: start and size. The cache is given
        back where the first attempt fails.
        """
        attempt = self._extend if self._expandable else self._segment
        wanted = attempt(pool, units)
        if wanted:
            self.empty_cache()
            wanted = attempt(pool, units)
            if wanted:
                raise OutOfMemory(self._reserved * UNIT, wanted * UNIT)
        start = self._new
        size = pool.starts.pop(start)
        del pool.free[bisect_left(pool.free, size << _SHIFT | start)]
        return start, size

    def _segment(self, pool: _Pool, units: int) -> int:
        """Take a segment for a request from the driver. Returns what the limit lacks room for, 0 where it was taken."""
        if units <= _SMALL:
            size = _SMALL_SEGMENT
        elif units < _OWN_SEGMENT:
            size = _LARGE_SEGMENT
        else:
            size = -(-units // _ROUND) * _ROUND
        if self._reserved + size > self._limit:
            return size
        self._new = start = self._next
        self._next += size + 1  # blocks of two segments never touch, and so never merge
        pool.segments[start] = size
        pool.put(start, start + size)
        self._took(size)
        return 0

    def _extend(self, pool: _Pool, units: int) -> int:
        """Map pages of an expandable segment for a request, at the lowest address where it fits among free blocks and
        holes. Returns what the limit did not allow, 0 where all is mapped; what was mapped before stays.

        A card reserves addresses for 9/8 of its memory, and begins another segment after that; here there is no end.
        """
        start = _lowest(pool, units)
        while (have := pool.starts.get(start, 0)) < units:
            page, hole = pool.page, start + have
            size = min(-(-(units - have) // page) * page, pool.hole_ends[hole] - hole)
            if self._reserved + size > self._limit:
                return size
            pool.fill(hole, size)
            self._took(size)
        self._new = start
        return 0

    def _unmap(self, pool: _Pool) -> None:
        """Give back the pages of an expandable segment that lie within free blocks."""
        for start, size in list(pool.starts.items()):
            first = -(-start // pool.page) * pool.page
            last = (start + size) // pool.page * pool.page
            if first >= last:
                continue
            pool.take(start)
            if start < first:
                pool.put(start, first)
            if last < start + size:
                pool.put(last, start + size)
            pool.open(first, last)
            self._reserved -= last - first

    def _took(self, size: int) -> None:
        self._reserved += size
        self._peak_reserved = max(self._peak_reserved, self._reserved)


def _least_expandable(pool: _Pool, place: int) -> int:
    """The free block to use in expandable segments, from the best fit on: with the hole behind it, as large as it could
    become, a block counts.
    """
    free = pool.free
    largest = len(free) - 1
    while place < largest and _with_hole(pool, free[place + 1]) < _with_hole(pool, free[place]):
        place += 1
    return place


def _with_hole(pool: _Pool, block: int) -> int:
    """Size of a free block and of the hole behind it."""
    end = (block & _ADDRESS) + (block >> _SHIFT)
    return pool.hole_ends.get(end, end) - (block & _ADDRESS)


def _lowest(pool: _Pool, units: int) -> int:
    """Lowest address where a hole, or a free block right before one, begins a row of holes and free blocks that a
    request fits into.
    """
    for begin in pool.holes:
        start = end = pool.ends.get(begin, begin)
        while end - start < units:
            size = pool.starts.get(end, 0)
            following = end + size if size else pool.hole_ends.get(end, end)
            if following == end:
                break
            end = following
        else:
            return start
    raise AssertionError("the last hole is endless")


def replay(events: Iterable[Event], limit: int | None = None, *, expandable_segments: bool = False) -> CachingAllocator:
    """Run all events under a limit in bytes, and return the allocator as it is then.

    Raises:
        OutOfMemory: the trace needs more than the limit.
    """
    allocator = CachingAllocator(limit, expandable_segments=expandable_segments)
    allocator.run(events)
    return allocator


class _Rising(CachingAllocator):
    """Its limit rises to what each failing request needs."""

    __slots__ = ()

    def _grow(self, pool: _Pool, units: int) -> tuple[int, int]:
        while True:
            try:
                return super()._grow(pool, units)
            except OutOfMemory as error:
                self._limit = (error.reached + error.requested) // UNIT


def least_limit(
    events: Sequence[Event],
    *,
    precision: float = 0.01,
    expandable_segments: bool = False,
    unlimited: tuple[int, int] | None = None,
) -> int:
    """Smallest limit, in bytes of reserved memory, under which a trace completes because cached segments are given
    back.

    It completes under what is returned. That is more by a fraction `precision` at most than a limit under which it
    fails, or than the peak of what is allocated.

    Args:
        events: the trace.
        precision: of the result.
        expandable_segments: of the allocator.
        unlimited: peaks of what is allocated and reserved without a limit, where they are known.
    """

    def needed(limit: int) -> int:
        """The limit itself where the trace completes under it, else what its requests make of it as it goes on."""
        rising = _Rising(limit, expandable_segments=expandable_segments)
        rising.run(events)
        return rising.limit

    def completes(limit: int) -> bool:
        try:
            replay(events, limit, expandable_segments=expandable_segments)
        except OutOfMemory:
            return False
        return True

    if unlimited is None:
        free = replay(events, expandable_segments=expandable_segments)
        unlimited = free.peak_allocated, free.peak_reserved
    low, high = unlimited
    if high - low <= precision * high:
        return high
    # A run whose limit rises to what each failing request needs mostly ends at a limit under which all complete, and
    # mostly it is the least one: so the search begins there, and just below it.
    limit = low
    while (more := min(needed(limit), high)) > limit:
        low, limit = limit, more
    high = limit
    guess = int(high / (1 + precision))
    while high - low > precision * high:
        if completes(guess):
            high = guess
        else:
            low = guess
        guess = (low + high) // 2
    return high

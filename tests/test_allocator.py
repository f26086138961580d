"""The model of torch's caching allocator: its documented rules, a slow model of the same, and torch's own on a card."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.predict.allocator import EMPTY_CACHE, CachingAllocator, Event, OutOfMemory, least_limit, replay

MIB = 2**20
EXPANDABLE = pytest.mark.parametrize("expandable", [False, True], ids=["segments", "expandable"])


def reserved(*sizes: int, **options: Any) -> int:
    """Bytes reserved for allocations that all live."""
    return replay([(key, size) for key, size in enumerate(sizes)], **options).reserved


# Rules of torch's allocator, one by one


@pytest.mark.parametrize(("size", "allocated"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (3 * MIB + 1, 3146240)])
def test_sizes_are_rounded_up_to_512_bytes(size: int, allocated: int) -> None:
    assert replay([(0, size)]).allocated == allocated


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (501 * MIB, 502 * MIB),
    ],
)
def test_a_segment_has_the_size_of_its_class(size: int, segment: int) -> None:
    assert reserved(size) == segment


def test_small_requests_fill_a_segment_of_2_mib() -> None:
    assert reserved(MIB, MIB) == 2 * MIB
    assert reserved(MIB, MIB - 512, 512) == 2 * MIB, "a remainder of 512 bytes is a block"
    assert reserved(MIB, MIB, 1) == 4 * MIB


def test_requests_below_10_mib_fill_a_segment_of_20_mib() -> None:
    assert reserved(9 * MIB, 9 * MIB, 2 * MIB) == 20 * MIB
    assert reserved(9 * MIB, 9 * MIB, 3 * MIB) == 40 * MIB
    assert reserved(9 * MIB, 9 * MIB, MIB) == 22 * MIB, "a small request never lies in a segment of large ones"


def test_a_remainder_of_1_mib_stays_with_its_block() -> None:
    whole = replay([(0, 11 * MIB)])
    assert (whole.allocated, whole.reserved) == (12 * MIB, 12 * MIB)
    split = replay([(0, 11 * MIB - 512)])
    assert (split.allocated, split.reserved) == (11 * MIB - 512, 12 * MIB)
    assert replay([(0, 9 * MIB + 512), (1, 10 * MIB - 512)]).allocated == 20 * MIB
    assert replay([(0, 11 * MIB), (0, 0)]).allocated == 0


def test_the_smallest_block_that_is_large_enough_is_used() -> None:
    blocks = [(0, 40 * MIB), (1, 30 * MIB), (2, 50 * MIB), (0, 0), (1, 0), (2, 0)]
    used = replay([*blocks, (3, 30 * MIB), (4, 35 * MIB), (5, 45 * MIB)])
    assert used.reserved == 120 * MIB, "each in the block that is meant for it"
    assert replay([*blocks, (3, 30 * MIB), (4, 51 * MIB)]).reserved == 172 * MIB


def test_blocks_of_equal_size_go_by_address() -> None:
    # The first of two segments has a live block besides; the free block of the second becomes a whole free segment.
    events = [(0, 4 * MIB), (1, 9 * MIB), (2, 7 * MIB), (3, 4 * MIB), (4, 9 * MIB), (5, 7 * MIB), (1, 0), (4, 0)]
    used = replay([*events, (6, 9 * MIB), (3, 0), (5, 0), EMPTY_CACHE])
    assert used.reserved == 20 * MIB


def test_released_blocks_merge_within_their_segment() -> None:
    thirds = [(0, 6 * MIB), (1, 6 * MIB), (2, 8 * MIB)]
    assert replay([*thirds, (0, 0), (2, 0), (3, 9 * MIB)]).reserved == 40 * MIB, "a live block between them"
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]):
        events = [*thirds, *[(key, 0) for key in order], (3, 20 * MIB)]
        assert replay(events).reserved == 20 * MIB, order
    two = [(0, 10 * MIB), (1, 10 * MIB), (0, 0), (1, 0), (2, 20 * MIB)]
    assert replay(two).reserved == 40 * MIB, "segments never merge"


def test_cached_segments_are_kept_until_the_cache_is_emptied() -> None:
    cached = [(0, 10 * MIB), (1, 1), (0, 0), (1, 0)]
    assert replay(cached).reserved == 12 * MIB
    emptied = replay([*cached, EMPTY_CACHE])
    assert (emptied.reserved, emptied.peak_reserved) == (0, 12 * MIB)
    assert replay([(0, 9 * MIB), (1, 9 * MIB), (0, 0), EMPTY_CACHE]).reserved == 20 * MIB, "half of it lives"


def test_a_failing_request_gives_free_segments_back() -> None:
    events = [(0, 100 * MIB), (1, 9 * MIB), (2, 9 * MIB), (0, 0), (1, 0), (3, 110 * MIB)]
    assert replay(events).reserved == 230 * MIB
    assert replay(events, 130 * MIB).reserved == 130 * MIB
    with pytest.raises(OutOfMemory) as raised:
        replay(events, 130 * MIB - 1)
    assert (raised.value.reached, raised.value.requested) == (20 * MIB, 110 * MIB)


def test_what_fits_in_the_cache_needs_no_memory_under_a_limit() -> None:
    assert replay([(0, 10 * MIB), (0, 0), (1, 10 * MIB)], 10 * MIB).peak_reserved == 10 * MIB
    with pytest.raises(OutOfMemory):
        replay([(0, 10 * MIB), (1, 1)], 10 * MIB)


def test_an_expandable_segment_grows_in_pages() -> None:
    grow: Callable[..., int] = lambda *sizes: reserved(*sizes, expandable_segments=True)  # noqa: E731
    assert grow(1) == 2 * MIB
    assert grow(MIB, MIB) == 2 * MIB
    assert grow(MIB, MIB, 1) == 4 * MIB
    assert grow(9 * MIB) == 20 * MIB
    assert grow(11 * MIB) == 20 * MIB
    assert grow(11 * MIB, 11 * MIB) == 40 * MIB, "the second reaches into the next page"
    assert grow(501 * MIB) == 520 * MIB
    assert grow(501 * MIB, 19 * MIB) == 520 * MIB
    assert replay([(0, 11 * MIB + 1)], expandable_segments=True).allocated == 11 * MIB + 512, "always split"


def test_free_blocks_of_an_expandable_segment_merge_and_grow() -> None:
    two = [(0, 10 * MIB), (1, 10 * MIB), (0, 0), (1, 0)]
    assert replay([*two, (2, 20 * MIB)], expandable_segments=True).reserved == 20 * MIB
    assert replay([*two, (2, 30 * MIB)], expandable_segments=True).reserved == 40 * MIB, "one page more"


def test_the_end_of_an_expandable_segment_is_used_last() -> None:
    # Free: 30 MiB between live blocks, and 20 MiB at the end, which can become larger and so is the worse fit.
    events = [(0, 30 * MIB), (1, 10 * MIB), (2, 20 * MIB), (0, 0), (2, 0), (3, 20 * MIB), (4, 40 * MIB)]
    assert replay(events, expandable_segments=True).reserved == 80 * MIB
    # Were the end used for the 20 MiB, 40 more would not fit behind them: 60 + 40 = 100 MiB.


def test_free_pages_of_an_expandable_segment_are_given_back_and_filled_again() -> None:
    events = [(0, 30 * MIB), (1, 5 * MIB), (2, 45 * MIB), (0, 0), EMPTY_CACHE]
    assert replay(events, expandable_segments=True).reserved == 60 * MIB, "the first page; half of the second lives"
    filled = replay([*events, (3, 31 * MIB)], expandable_segments=True)
    assert filled.reserved == 100 * MIB, "behind everything: 30 MiB are too few"
    filled = replay([*events, (3, 30 * MIB)], expandable_segments=True)
    assert filled.reserved == 80 * MIB, "the hole, and the free block behind it"


def test_a_failing_request_gives_free_pages_back() -> None:
    events = [(0, 50 * MIB), (1, 5 * MIB), (0, 0), (2, 60 * MIB)]
    assert replay(events, expandable_segments=True).reserved == 120 * MIB
    assert replay(events, 80 * MIB, expandable_segments=True).reserved == 80 * MIB
    with pytest.raises(OutOfMemory) as raised:
        replay(events, 80 * MIB - 1, expandable_segments=True)
    assert (raised.value.reached, raised.value.requested) == (20 * MIB, 60 * MIB)


def test_a_key_holds_one_allocation() -> None:
    state = CachingAllocator()
    state.allocate(7, 1)
    with pytest.raises(ValueError, match="7"):
        state.allocate(7, 1)
    state.release(7)
    with pytest.raises(KeyError):
        state.release(7)


# Traces


def trace(random_: random.Random, length: int, *, most: int = 40) -> list[Event]:
    """Allocations of all classes of sizes, released in any order; now and then the cache is emptied."""
    live: list[int] = []
    events: list[Event] = []
    for key in range(length):
        if len(live) >= most or (live and random_.random() < 0.45):
            events.append((live.pop(random_.randrange(len(live))), 0))
        elif random_.random() < 0.02:
            events.append(EMPTY_CACHE)
        else:
            sizes = (512, 4096, MIB // 3, MIB, MIB + 512, 3 * MIB, 10 * MIB - 512, 10 * MIB, 24 * MIB, 70 * MIB)
            size = random_.choice(sizes)
            events.append((key, size if random_.random() < 0.5 else random_.randint(1, size)))
            live.append(key)
    return events


TRACES = st.builds(
    lambda seed, length, most: trace(random.Random(seed), length, most=most),
    st.integers(0, 2**32),
    st.integers(1, 400),
    st.sampled_from([3, 10, 60]),
)


class Slow:
    """The rules again, the slow way: every segment is a list of blocks, and every search looks at all of them.

    A block is [size, state]; the state is a key, None for free, "hole" for what an expandable segment has not mapped.
    """

    def __init__(self, limit: int | None, expandable: bool) -> None:
        self.limit = limit if limit is not None else 2**60
        self.expandable = expandable
        self.segments: dict[str, list[list[list[Any]]]] = {"small": [], "large": []}
        self.peak_reserved = 0

    @property
    def reserved(self) -> int:
        blocks = [block for pool in self.segments.values() for segment in pool for block in segment]
        return int(sum(size for size, state in blocks if state != "hole"))

    @property
    def allocated(self) -> int:
        blocks = [block for pool in self.segments.values() for segment in pool for block in segment]
        return int(sum(size for size, state in blocks if state not in (None, "hole")))

    def run(self, events: Sequence[Event]) -> None:
        for key, size in events:
            if size > 0:
                self.allocate(key, -(-size // 512) * 512)
            elif size == 0:
                for block in (b for pool in self.segments.values() for segment in pool for b in segment):
                    if block[1] == key and block[1] is not None:
                        block[1] = None
                self.tidy()
            else:
                self.empty()
            self.peak_reserved = max(self.peak_reserved, self.reserved)

    def tidy(self) -> None:
        """Merge what touches and is alike."""
        for pool in self.segments.values():
            for segment in pool:
                for at in reversed(range(len(segment) - 1)):
                    if segment[at][1] == segment[at + 1][1] and segment[at][1] in (None, "hole"):
                        segment[at][0] += segment.pop(at + 1)[0]

    def allocate(self, key: int, size: int) -> None:
        pool = "small" if size <= MIB else "large"
        segment, at = self.best(pool, size) or self.driver(pool, size)
        rest = segment[at][0] - size
        if rest >= 512 if pool == "small" or self.expandable else rest > MIB:
            segment[at : at + 1] = [[size, key], [rest, None]]
        else:
            segment[at][1] = key

    def best(self, pool: str, size: int) -> tuple[list[list[Any]], int] | None:
        fits = sorted(
            (block[0], number, at)
            for number, segment in enumerate(self.segments[pool])
            for at, block in enumerate(segment)
            if block[1] is None and block[0] >= size
        )
        if not fits:
            return None

        def grown(each: tuple[int, int, int]) -> int:
            segment = self.segments[pool][each[1]]
            behind = segment[each[2] + 1] if each[2] + 1 < len(segment) else [0, "hole"]
            return int(each[0] + (behind[0] if behind[1] == "hole" else 0))

        chosen = fits[0]
        for this, following in pairwise(fits):
            if not self.expandable or grown(following) >= grown(this):
                break
            chosen = following
        return self.segments[pool][chosen[1]], chosen[2]

    def driver(self, pool: str, size: int) -> tuple[list[list[Any]], int]:
        get = self.mapped if self.expandable else self.malloc
        place = get(pool, size)
        if place is None:
            self.empty()
            place = get(pool, size)
        if place is None:
            raise OutOfMemory(self.reserved, size)
        return place

    def malloc(self, pool: str, size: int) -> tuple[list[list[Any]], int] | None:
        whole = 2 * MIB if pool == "small" else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved + whole > self.limit:
            return None
        self.segments[pool].append([[whole, None]])
        return self.segments[pool][-1], 0

    def mapped(self, pool: str, size: int) -> tuple[list[list[Any]], int] | None:
        page = 2 * MIB if pool == "small" else 20 * MIB
        if not self.segments[pool]:
            self.segments[pool].append([[2**50 // page * page, "hole"]])
        (segment,) = self.segments[pool]
        holes = [at for at, block in enumerate(segment) if block[1] == "hole"]
        starts = [at - 1 if at and segment[at - 1][1] is None else at for at in holes]
        at = next(at for at in starts if self.row(segment, at) >= size)
        while segment[at][1] == "hole" or segment[at][0] < size:
            have = 0 if segment[at][1] == "hole" else segment[at][0]
            hole = at if segment[at][1] == "hole" else at + 1
            more = min(-(-(size - have) // page) * page, segment[hole][0])
            if self.reserved + more > self.limit:
                return None
            segment[hole : hole + 1] = [[more, None], [segment[hole][0] - more, "hole"]]
            if segment[hole + 1][0] == 0:
                del segment[hole + 1]
            self.tidy()
        return segment, at

    def row(self, segment: list[list[Any]], at: int) -> int:
        total = 0
        while at < len(segment) and segment[at][1] in (None, "hole"):
            total += segment[at][0]
            at += 1
        return total

    def empty(self) -> None:
        for pool, segments in self.segments.items():
            if not self.expandable:
                segments[:] = [each for each in segments if [block[1] for block in each] != [None]]
                continue
            page = 2 * MIB if pool == "small" else 20 * MIB
            for segment in segments:
                segment[:] = [piece for block in self.placed(segment) for piece in self.pages(*block, page)]
        self.tidy()

    def placed(self, segment: list[list[Any]]) -> list[tuple[int, int, Any]]:
        starts = [sum(block[0] for block in segment[:at]) for at in range(len(segment))]
        return [(start, size, state) for start, (size, state) in zip(starts, segment, strict=True)]

    def pages(self, start: int, size: int, state: Any, page: int) -> list[list[Any]]:
        """A block; of a free one the whole pages are a hole."""
        first, last = -(-start // page) * page, (start + size) // page * page
        if state is not None or first >= last:
            return [[size, state]]
        pieces = [[first - start, None], [last - first, "hole"], [start + size - last, None]]
        return [piece for piece in pieces if piece[0]]


def outcome(run: Callable[[], CachingAllocator | Slow]) -> tuple[int, ...] | str:
    try:
        state = run()
    except OutOfMemory as error:
        return f"out of memory at {error.reached}"
    return state.allocated, state.reserved, state.peak_reserved


@EXPANDABLE
@settings(max_examples=80, deadline=None)
@given(events=TRACES, part=st.sampled_from([None, 1.0, 0.9, 0.8, 0.7]))
def test_a_slow_model_agrees(events: list[Event], part: float | None, expandable: bool) -> None:
    most = replay(events, expandable_segments=expandable).peak_reserved
    limit = None if part is None else int(most * part)

    def slow() -> Slow:
        state = Slow(limit, expandable)
        state.run(events)
        return state

    assert outcome(lambda: replay(events, limit, expandable_segments=expandable)) == outcome(slow)


@EXPANDABLE
@settings(max_examples=50, deadline=None)
@given(events=TRACES)
def test_what_always_holds(events: list[Event], expandable: bool) -> None:
    state = CachingAllocator(expandable_segments=expandable)
    live: dict[int, int] = {}
    for key, size in events:
        state.run([(key, size)])
        if size > 0:
            live[key] = -(-size // 512) * 512
        elif size == 0:
            del live[key]
        requested = sum(live.values())
        kept = 0 if expandable else sum(MIB for size in live.values() if size > MIB)
        assert requested <= state.allocated <= requested + kept
        assert state.allocated <= state.reserved <= state.peak_reserved
        assert state.reserved % (2 * MIB) == 0
    for small in (True, False):
        placed = sorted(block for block in state._live.values() if (block[1] * 512 <= MIB) == small)
        assert all(start + size <= following for (start, size), (following, _) in pairwise(placed)), "no overlap"
    assert replay(events, state.peak_reserved, expandable_segments=expandable).peak_reserved == state.peak_reserved
    state.run([*[(key, 0) for key in live], EMPTY_CACHE])
    assert (state.allocated, state.reserved) == (0, 0)


@EXPANDABLE
@settings(max_examples=60, deadline=None)
@given(events=TRACES, precision=st.sampled_from([0.01, 0.05]))
def test_the_least_limit_suffices_and_little_less_does_not(
    events: list[Event], precision: float, expandable: bool
) -> None:
    unlimited = replay(events, expandable_segments=expandable)
    limit = least_limit(events, precision=precision, expandable_segments=expandable)
    assert unlimited.peak_allocated <= limit <= unlimited.peak_reserved
    assert replay(events, limit, expandable_segments=expandable).peak_reserved <= limit, "it completes"
    lowest = int(limit * (1 - precision))
    if lowest > unlimited.peak_allocated:
        # Memory comes in multiples of 2 MiB, so these are all limits of that range that can differ.
        steps = {lowest, *range(lowest // (2 * MIB) * 2 * MIB, limit, 2 * MIB)}
        below = [outcome(lambda at=at: replay(events, at, expandable_segments=expandable)) for at in steps]
        assert any(isinstance(each, str) for each in below)


def test_the_least_limit_is_what_giving_back_saves() -> None:
    # Three phases with live blocks of different sizes: the cache of one does not serve the next.
    events = [(0, 100 * MIB), (0, 0), (1, 110 * MIB), (1, 0), (2, 120 * MIB), (2, 0)]
    assert replay(events).peak_reserved == 330 * MIB
    assert 120 * MIB <= least_limit(events) <= 1.01 * 120 * MIB
    assert least_limit(events, precision=1.0) <= 330 * MIB
    assert least_limit([]) == 0


def test_few_replays_find_the_least_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    run = CachingAllocator.run
    for seed in range(15):
        runs: list[int] = []
        monkeypatch.setattr(CachingAllocator, "run", lambda self, events, r=runs: (r.append(1), run(self, events))[1])
        least_limit(trace(random.Random(seed), 1000))
        counts.append(len(runs))
    assert sorted(counts)[7] <= 4
    assert max(counts) <= 12


def test_a_search_beyond_the_first_guess() -> None:
    # Traces whose first guess fails, or where much less than it does as well.
    for seed in range(40):
        events = trace(random.Random(seed), 600, most=20)
        limit = least_limit(events, precision=0.002)
        assert replay(events, limit).peak_reserved <= limit
        if limit * 0.99 > replay(events).peak_allocated:
            tried = [functools.partial(replay, events, at) for at in range(int(limit * 0.98), limit, 2 * MIB)]
            assert any(isinstance(outcome(run), str) for run in tried), seed


def test_peaks_stay_when_memory_is_released() -> None:
    state = replay([(0, 30 * MIB), (0, 0), EMPTY_CACHE, (1, 10 * MIB)])
    assert (state.allocated, state.peak_allocated) == (10 * MIB, 30 * MIB)
    assert (state.reserved, state.peak_reserved) == (10 * MIB, 30 * MIB)


def test_the_model_needs_no_torch() -> None:
    code = "import sys; from harness.predict import allocator, cards; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# torch's own allocator

OF_TORCH = """
import json, sys, torch
events = json.load(sys.stdin)
limit = int(sys.argv[1])
torch.cuda.init()
total = torch.cuda.mem_get_info()[1]
if limit:
    torch.cuda.set_per_process_memory_fraction((limit + 0.5) / total)
live = {}
try:
    for key, size in events:
        if size > 0:
            live[key] = torch.empty(size, dtype=torch.uint8, device="cuda")
        elif size == 0:
            del live[key]
        else:
            torch.cuda.empty_cache()
except torch.OutOfMemoryError:
    print(json.dumps("out of memory"))
else:
    figures = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
    print(json.dumps(figures))
"""


def of_torch(events: list[Event], limit: int, expandable: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", f"expandable_segments:{expandable}")
    run = subprocess.run(
        [sys.executable, "-c", OF_TORCH, str(limit)], input=json.dumps(events), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@EXPANDABLE
@pytest.mark.parametrize("seed", range(3))
def test_torch_agrees(seed: int, expandable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA card")
    events = trace(random.Random(seed), 4000, most=60)
    mine = replay(events, expandable_segments=expandable)
    theirs = of_torch(events, 0, expandable, monkeypatch)
    assert theirs[0] == pytest.approx(mine.allocated, rel=0.005)
    # Where the driver puts a segment decides between blocks of equal size, and so which segments stay whole.
    assert theirs[1] == pytest.approx(mine.reserved, rel=0.01)
    assert theirs[2] == pytest.approx(mine.peak_reserved, rel=0.01)
    if not expandable:  # the fraction counts a request's segment there, not its pages
        enough, little = int(1.03 * least_limit(events)), int(0.97 * mine.peak_allocated)
        assert of_torch(events, enough, expandable, monkeypatch) != "out of memory"
        assert of_torch(events, little, expandable, monkeypatch) == "out of memory"

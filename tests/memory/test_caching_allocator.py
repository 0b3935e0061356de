from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.memory import caching_allocator
from lowmem.memory.caching_allocator import CachingAllocator

KIB, MIB = 2**10, 2**20


# A slow allocator that is right by inspection: lists of blocks, searched from end to end.


@dataclass
class Segment:
    is_small: bool
    address: int
    blocks: list[tuple[int, object]] = field(default_factory=list)  # (bytes, who holds it or None)

    def free_blocks(self) -> list[tuple[int, int, int]]:
        """(bytes, address, index) of every free block."""
        address, found = self.address, []
        for index, (size, holder) in enumerate(self.blocks):
            if holder is None:
                found.append((size, address, index))
            address += size
        return found

    def merge(self) -> None:
        merged: list[tuple[int, object]] = []
        for size, holder in self.blocks:
            if holder is None and merged and merged[-1][1] is None:
                size += merged.pop()[0]
            merged.append((size, holder))
        self.blocks = merged


class SlowAllocator:
    def __init__(self, expandable: bool):
        self.expandable = expandable
        self.segments = [Segment(True, 0), Segment(False, 2**60)] if expandable else []

    def malloc(self, key: object, nbytes: int) -> None:
        if nbytes == 0:
            return
        size = -(-nbytes // 512) * 512
        is_small = size <= MIB
        segment, index = self._best_fit(size, is_small) or self._more(size, is_small)
        whole, _ = segment.blocks[index]
        rest = whole - size
        if rest >= 512 if is_small or self.expandable else rest > MIB:
            segment.blocks[index : index + 1] = [(size, key), (rest, None)]
        else:
            segment.blocks[index] = (whole, key)

    def _best_fit(self, size: int, is_small: bool) -> tuple[Segment, int] | None:
        fits = sorted(
            (found, address, number, index)
            for number, segment in enumerate(self.segments)
            if segment.is_small == is_small
            for found, address, index in segment.free_blocks()
            if found >= size
        )
        if not fits:
            return None

        def can_become(fit: tuple[int, int, int, int]) -> float:
            at_the_end = fit[3] == len(self.segments[fit[2]].blocks) - 1
            return float("inf") if self.expandable and at_the_end else fit[0]

        chosen = 0
        while chosen + 1 < len(fits) and can_become(fits[chosen + 1]) < can_become(fits[chosen]):
            chosen += 1
        return self.segments[fits[chosen][2]], fits[chosen][3]

    def _more(self, size: int, is_small: bool) -> tuple[Segment, int]:
        if self.expandable:
            segment = next(each for each in self.segments if each.is_small == is_small)
            page = 2 * MIB if is_small else 20 * MIB
            spare = segment.blocks[-1][0] if segment.blocks and segment.blocks[-1][1] is None else 0
            pages = -(-(size - spare) // page)
            segment.blocks.append((pages * page, None))
            segment.merge()
            return segment, len(segment.blocks) - 1
        if is_small:
            nbytes = 2 * MIB
        elif size < 10 * MIB:
            nbytes = 20 * MIB
        else:
            nbytes = -(-size // (2 * MIB)) * 2 * MIB
        self.segments.append(Segment(is_small, self.reserved_bytes, [(nbytes, None)]))
        return self.segments[-1], 0

    def free(self, key: object) -> None:
        for segment in self.segments:
            segment.blocks = [(size, None if holder == key else holder) for size, holder in segment.blocks]
            segment.merge()

    @property
    def reserved_bytes(self) -> int:
        return sum(size for segment in self.segments for size, _ in segment.blocks)

    def extents(self) -> dict[object, tuple[int, int]]:
        held = {}
        for segment in self.segments:
            address = segment.address
            for size, holder in segment.blocks:
                if holder is not None:
                    held[holder] = (address, size)
                address += size
        return held


AT_A_LIMIT = [0, 1, 511, 512, 513, MIB - 511, MIB, MIB + 1, 2 * MIB, 9 * MIB, 10 * MIB - 512, 10 * MIB - 511]
AT_A_LIMIT += [10 * MIB, 11 * MIB, 19 * MIB - 512, 19 * MIB, 19 * MIB + 512, 20 * MIB, 20 * MIB + 1, 41 * MIB]
SIZES = st.one_of(st.sampled_from(AT_A_LIMIT), st.integers(0, MIB), st.integers(0, 64 * MIB))
EVENTS = st.lists(st.one_of(SIZES, st.integers(-100, -1)), max_size=60)
"""A request for so many bytes, or, where negative, a free of one of the keys that are live."""


def replay(events: list[int], *allocators):
    """The live keys and their requests after each event, played to all `allocators`."""
    live: dict[object, int] = {}
    for number, event in enumerate(events):
        if event >= 0:
            live[number] = event
            for allocator in allocators:
                allocator.malloc(number, event)
        elif live:
            key = list(live)[event % len(live)]
            del live[key]
            for allocator in allocators:
                allocator.free(key)
        yield live


def left_by(events: list[int], allocator) -> list[object]:
    """The keys that are live after all events."""
    states = [list(live) for live in replay(events, allocator)]
    return states[-1] if states else []


@settings(max_examples=400, deadline=None)
@given(events=EVENTS, expandable=st.booleans())
def test_it_places_every_block_where_a_plain_search_of_all_blocks_does(events, expandable):
    allocator, slow = CachingAllocator(expandable=expandable), SlowAllocator(expandable)
    for live in replay(events, allocator, slow):
        assert {key: allocator.extent(key) for key, asked in live.items() if asked} == slow.extents()
        assert allocator.reserved_bytes == slow.reserved_bytes
        assert allocator.allocated_bytes == sum(size for _, size in slow.extents().values())


@settings(max_examples=200, deadline=None)
@given(events=EVENTS, expandable=st.booleans())
def test_blocks_hold_their_requests_and_never_overlap(events, expandable):
    allocator = CachingAllocator(expandable=expandable)
    for live in replay(events, allocator):
        extents = sorted(allocator.extent(key) for key, asked in live.items() if asked)
        for (address, size), (following, _) in pairwise(extents):
            assert address + size <= following
        for key, asked in live.items():
            assert allocator.extent(key)[1] >= asked


@settings(max_examples=200, deadline=None)
@given(events=EVENTS, expandable=st.booleans())
def test_allocated_is_the_rounded_requests_and_what_was_not_worth_splitting_off(events, expandable):
    allocator = CachingAllocator(expandable=expandable)
    peak = 0
    for live in replay(events, allocator):
        asked = sum(-(-nbytes // 512) * 512 for nbytes in live.values())
        large = sum(nbytes > MIB for nbytes in live.values())
        slack = 0 if expandable else large * MIB
        assert asked <= allocator.allocated_bytes <= min(asked + slack, allocator.reserved_bytes)
        peak = max(peak, allocator.allocated_bytes)
    assert allocator.peak_allocated_bytes == peak


@settings(max_examples=200, deadline=None)
@given(events=EVENTS, expandable=st.booleans())
def test_reserved_never_falls_and_outlives_every_block(events, expandable):
    allocator = CachingAllocator(expandable=expandable)
    highest, held = 0, []
    for live in replay(events, allocator):
        assert allocator.reserved_bytes >= highest
        highest, held = allocator.reserved_bytes, list(live)
    for key in held:
        allocator.free(key)
    assert allocator.allocated_bytes == 0
    assert allocator.reserved_bytes == allocator.peak_reserved_bytes == highest


@settings(max_examples=100, deadline=None)
@given(events=EVENTS, expandable=st.booleans())
def test_the_same_events_give_the_same_blocks(events, expandable):
    one, other = CachingAllocator(expandable=expandable), CachingAllocator(expandable=expandable)
    for live, _ in zip(replay(events, one), replay(events, other), strict=True):
        assert [one.extent(key) for key in live] == [other.extent(key) for key in live]
    assert one.reserved_bytes == other.reserved_bytes


@settings(max_examples=100, deadline=None)
@given(events=EVENTS)
def test_an_expandable_segment_that_is_free_again_serves_the_same_events_without_growing(events):
    allocator = CachingAllocator(expandable=True)
    for key in left_by(events, allocator):
        allocator.free(key)
    reserved = allocator.reserved_bytes
    for _ in replay(events, allocator):
        pass
    assert allocator.reserved_bytes == reserved


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB - (2 * MIB - 512), 12 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (500 * MIB, 500 * MIB, 500 * MIB),
    ],
)
def test_one_request_takes_one_segment_of_its_class(nbytes, allocated, reserved):
    allocator = CachingAllocator()
    allocator.malloc("a", nbytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_small_requests_share_a_segment_until_it_is_full():
    allocator = CachingAllocator()
    for number in range(4096):
        allocator.malloc(number, 512)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.malloc("one more", 1)
    assert allocator.reserved_bytes == 4 * MIB


def test_small_and_large_requests_never_share_a_segment():
    allocator = CachingAllocator()
    allocator.malloc("large", 5 * MIB)
    allocator.malloc("small", MIB)
    assert allocator.reserved_bytes == 22 * MIB


def test_a_rest_of_one_mib_stays_with_a_large_block_and_a_larger_one_is_split_off():
    allocator = CachingAllocator()
    allocator.malloc("five", 5 * MIB)
    allocator.malloc("fourteen", 14 * MIB)  # of the 15 that are left
    assert allocator.allocated_bytes == 20 * MIB
    allocator.free("fourteen")
    allocator.malloc("less", 14 * MIB - 512)
    assert allocator.allocated_bytes == 19 * MIB - 512
    allocator.malloc("the rest", MIB + 512)
    assert allocator.allocated_bytes == allocator.reserved_bytes == 20 * MIB


def test_the_smallest_free_block_that_fits_is_taken():
    allocator = CachingAllocator()
    for number, size in enumerate([40, 12, 24]):
        allocator.malloc(number, size * MIB)
    for number in range(3):
        allocator.free(number)
    allocator.malloc("a", 12 * MIB)
    assert allocator.extent("a") == (40 * MIB, 12 * MIB)
    allocator.malloc("b", 12 * MIB)
    assert allocator.extent("b") == (52 * MIB, 12 * MIB)


def test_of_equal_blocks_the_lowest_is_taken():
    allocator = CachingAllocator()
    for key in "abc":
        allocator.malloc(key, 12 * MIB)
    for key in "cab":
        allocator.free(key)
    allocator.malloc("d", 12 * MIB)
    assert allocator.extent("d") == (0, 12 * MIB)


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_freed_neighbours_merge_in_whatever_order_they_are_freed(order):
    allocator = CachingAllocator()
    for key in "abc":
        allocator.malloc(key, 6 * MIB)
    for key in order:
        allocator.free(key)
    allocator.malloc("whole", 20 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_blocks_of_two_segments_never_merge():
    allocator = CachingAllocator()
    for key in "ab":
        allocator.malloc(key, 12 * MIB)
    for key in "ab":
        allocator.free(key)
    allocator.malloc("both", 24 * MIB)
    assert allocator.reserved_bytes == 48 * MIB


def test_a_hole_that_is_too_small_costs_a_new_segment():
    """Fragmentation: 36 MiB are free, 30 are asked for, and 30 more are reserved."""
    allocator = CachingAllocator()
    for key in "abc":
        allocator.malloc(key, 18 * MIB)
    allocator.free("a")
    allocator.free("c")
    allocator.malloc("d", 30 * MIB)
    assert allocator.reserved_bytes == 84 * MIB
    assert allocator.allocated_bytes == 48 * MIB


def test_an_expandable_segment_grows_by_pages_just_as_far_as_its_free_end_does_not_reach():
    allocator = CachingAllocator(expandable=True)
    allocator.malloc("a", 30 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.malloc("b", 31 * MIB)  # 10 MiB are free at the end, 21 more are two pages
    assert allocator.reserved_bytes == 80 * MIB
    assert allocator.allocated_bytes == 61 * MIB
    allocator.malloc("small", 1)
    allocator.malloc("small too", MIB)
    allocator.malloc("no room", MIB)
    assert allocator.reserved_bytes == 84 * MIB


def test_expandable_segments_have_no_holes_where_single_ones_do():
    """The same events as with a hole that is too small: the end of the segment is free and grows."""
    allocator = CachingAllocator(expandable=True)
    for key in "abc":
        allocator.malloc(key, 18 * MIB)
    allocator.free("a")
    allocator.free("c")
    allocator.malloc("d", 30 * MIB)  # 24 MiB are free at the end of 60
    assert allocator.reserved_bytes == 80 * MIB


def test_an_expandable_large_pool_splits_at_512_bytes():
    allocator = CachingAllocator(expandable=True)
    allocator.malloc("a", 20 * MIB - 512)
    assert allocator.allocated_bytes == 20 * MIB - 512


def test_a_block_that_can_grow_is_spared_where_a_bigger_one_cannot():
    allocator = CachingAllocator(expandable=True)
    allocator.malloc("hole", 10 * MIB)
    allocator.malloc("wall", 5 * MIB)
    allocator.malloc("end", 2 * MIB)
    start = allocator.extent("hole")[0]
    allocator.free("hole")
    allocator.free("end")  # 5 MiB are free at the end and fit better than the 10 MiB of the hole
    allocator.malloc("a", 4 * MIB)
    assert allocator.extent("a") == (start, 4 * MIB)
    allocator.malloc("b", 6 * MIB)
    assert allocator.extent("b") == (start + 4 * MIB, 6 * MIB)
    allocator.malloc("c", 4 * MIB)  # only the end is left
    assert allocator.extent("c") == (start + 15 * MIB, 4 * MIB)


def test_zero_bytes_are_freed_like_any_request():
    allocator = CachingAllocator()
    allocator.malloc("nothing", 0)
    assert allocator.extent("nothing") == (0, 0)
    allocator.free("nothing")
    with pytest.raises(KeyError):
        allocator.free("nothing")
    assert allocator.reserved_bytes == allocator.peak_allocated_bytes == 0


def test_a_key_that_is_live_and_a_negative_size_are_refused_without_a_trace():
    allocator = CachingAllocator()
    allocator.malloc("a", 4)
    for key, nbytes in (("a", 8), ("b", -1)):
        with pytest.raises(ValueError, match=f"'{key}' (is allocated already|asks for -1 bytes)"):
            allocator.malloc(key, nbytes)
    assert allocator.allocated_bytes == 512
    allocator.malloc("b", 1)


def test_the_peak_of_allocated_stays_when_blocks_go():
    allocator = CachingAllocator()
    allocator.malloc("a", 30 * MIB)
    allocator.free("a")
    allocator.malloc("b", 12 * MIB)
    assert (allocator.allocated_bytes, allocator.peak_allocated_bytes) == (12 * MIB, 30 * MIB)


def test_the_sizes_are_those_of_the_installed_torch():
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    header = Path(spec.origin).parent / "include/c10/core/AllocatorConfig.h"
    text = header.read_text(encoding="utf-8") if header.exists() else ""
    sizes = {name: int(size) for name, size in re.findall(r"(\w+)\s*(?:=|\{)\s*(\d{3,})\}?;", text)}
    ours = {
        "kMinBlockSize": caching_allocator.ALLOCATION_BYTES,
        "kSmallSize": caching_allocator.SMALL_REQUEST_BYTES,
        "kSmallBuffer": caching_allocator.SMALL_SEGMENT_BYTES,
        "large_segment_size_": caching_allocator.LARGE_SEGMENT_BYTES,
        "kMinLargeAlloc": caching_allocator.OWN_SEGMENT_BYTES,
        "kRoundLarge": caching_allocator.SEGMENT_ROUND_BYTES,
    }
    if not ours.keys() <= sizes.keys():
        pytest.skip("this torch does not ship the allocator's sizes in its headers")
    assert ours == {name: sizes[name] for name in ours}

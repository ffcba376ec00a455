from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gossip.ranges import (
    ITEMS_AT_ONCE,
    JOINED_MAX,
    LEAF,
    SPLIT,
    Reply,
    ascending,
    differing,
    is_opening,
    split,
    within,
    work_on,
)
from p2pmesh.state.fingerprint import fingerprint_of
from p2pmesh.wire.messages import RANGES_MAX, Items, Range

IDS = st.sets(st.binary(min_size=16, max_size=16), max_size=200).map(sorted)
BOUNDS = st.binary(max_size=16)
EVERYTHING = Range(lower=b"", upper=b"", count=10**6, fingerprint=bytes(16))


def numbered(count: int) -> list[bytes]:
    return [(number << 64).to_bytes(16, "big") for number in range(count)]


@given(IDS, BOUNDS, BOUNDS)
def test_within_is_from_lower_up_to_upper(ids: list[bytes], lower: bytes, upper: bytes) -> None:
    start, stop = within(ids, lower, upper)
    expected = [one for one in ids if one >= lower and (not upper or one < upper)]
    assert ids[start:stop] == expected


@given(st.sets(st.binary(min_size=16, max_size=16), min_size=SPLIT, max_size=300).map(sorted))
def test_parts_are_even_and_leave_nothing_out(ids: list[bytes]) -> None:
    parts = split(ids, b"", b"")
    assert len(parts) == SPLIT
    assert is_opening(parts)
    assert ascending(parts) == parts
    counts = [part.count for part in parts]
    assert sum(counts) == len(ids)
    assert max(counts) - min(counts) <= 1
    for one, after in pairwise(parts):
        assert one.upper == after.lower
    for part in parts:
        start, stop = within(ids, part.lower, part.upper)
        assert part.fingerprint == fingerprint_of(ids[start:stop])
    assert differing(ids, parts) == []


def test_bounds_are_short() -> None:
    ids = sorted(fingerprint_of([bytes([n] * 16)]) for n in range(200))
    assert max(len(part.upper) for part in split(ids, b"", b"")) <= 2


@given(IDS, IDS)
def test_what_differs_is_found(mine: list[bytes], theirs: list[bytes]) -> None:
    parts = split(theirs, b"", b"") if len(theirs) >= SPLIT else []
    found = differing(mine, parts)
    for part in parts:
        (a, b), (c, d) = (within(ids, part.lower, part.upper) for ids in (mine, theirs))
        assert (part in found) == (mine[a:b] != theirs[c:d])


@given(st.lists(st.tuples(BOUNDS, BOUNDS), max_size=20))
def test_ascending_ranges_never_overlap(bounds: list[tuple[bytes, bytes]]) -> None:
    ranges = [
        Range(lower=low, upper=up, count=0, fingerprint=bytes(16))
        for low, up in bounds
        if not up or low < up
    ]
    taken = ascending(ranges)
    assert taken == ranges[: len(taken)]
    ids = numbered(300)
    looked_at = 0
    for one in taken:
        start, stop = within(ids, one.lower, one.upper)
        looked_at += stop - start
    assert looked_at <= work_on(ids, taken) <= len(ids)


def test_a_small_range_is_answered_with_its_ids() -> None:
    ids = numbered(LEAF)
    reply = Reply(ids, [EVERYTHING], splits_max=16)
    assert reply.items == [Items(lower=b"", upper=b"", ids=tuple(ids), answer=True)]
    assert reply.ranges == reply.rest == []


def test_a_large_range_is_split_unless_the_other_side_has_next_to_nothing() -> None:
    ids = numbered(ITEMS_AT_ONCE)
    assert Reply(ids, [EVERYTHING], splits_max=16).ranges == split(ids, b"", b"")
    nothing = Range(lower=b"", upper=b"", count=0, fingerprint=bytes(16))
    (items,) = Reply(ids, [nothing], splits_max=16).items
    assert items.ids == tuple(ids)
    assert Reply(numbered(ITEMS_AT_ONCE + 1), [nothing], splits_max=16).items == []


def test_small_ranges_that_touch_are_said_as_one() -> None:
    ids = numbered(160)
    parts = split(ids, b"", b"")
    reply = Reply(ids, [*parts[2:6], *parts[8:9]], splits_max=16)
    assert [(items.lower, items.upper) for items in reply.items] == [
        (parts[2].lower, parts[5].upper),
        (parts[8].lower, parts[8].upper),
    ]
    assert len(reply.items[0].ids) == 40
    larger = split(numbered(16 * SPLIT), b"", b"")
    reply = Reply(numbered(16 * SPLIT * 2)[::2], larger, splits_max=16)
    assert all(len(items.ids) <= JOINED_MAX for items in reply.items)


def test_what_does_not_fit_is_said_again_unsplit() -> None:
    ids = numbered(4096)
    parts = split(ids, b"", b"")
    reply = Reply(ids, parts, splits_max=10)
    assert len(reply.ranges) == 10 * SPLIT
    assert reply.rest == parts[10:]
    message = reply.with_rest()
    assert message.ranges == (*reply.ranges, *parts[10:])
    assert ascending(message.ranges) == list(message.ranges)


def test_a_reply_fits_its_message_and_says_something() -> None:
    ids = numbered(20 * RANGES_MAX)
    bounds = [b"", *(ids[20 * step] for step in range(1, RANGES_MAX)), b""]
    theirs = [
        Range(lower=low, upper=up, count=10**9, fingerprint=bytes(16))
        for low, up in pairwise(bounds)
    ]
    for some in (theirs, theirs[:256], theirs[:1]):
        reply = Reply(ids, some, splits_max=(RANGES_MAX - len(some)) // (SPLIT - 1))
        assert len(reply.with_rest().ranges) <= RANGES_MAX
        assert len(some) == RANGES_MAX or reply.ranges
    tiny = [Range(lower=o.lower, upper=o.upper, count=10**9, fingerprint=bytes(16)) for o in theirs]
    reply = Reply([], tiny, splits_max=1)
    assert len(reply.items) == 1
    assert len(reply.rest) == RANGES_MAX - 1

"""Ranges of sorted ids: how two sets of items find out where they differ. Pure.

Range-based set reconciliation (A. Meyer, "Range-Based Set Reconciliation and Authenticated Set
Representations", 2022): each side says the count and the fingerprint of what it holds in a range.
Where they differ, a small range is answered with its ids, a large one is split and said again in
parts. Work is bounded by one pass over the document for each message, since the ranges in one
have to ascend, and what goes into an answer is bounded in bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise

from p2pmesh.state.fingerprint import fingerprint_of
from p2pmesh.wire.messages import CHUNK_BYTES_MAX, Items, Range, Ranges

SPLIT = 16  # parts of a range that differs
LEAF = 16  # ids that are said as they are: no more bytes than one more round of ranges
ITEMS_AT_ONCE = 1024  # ids in one message: half a chunk
JOINED_MAX = 256  # ids, of either side, in small ranges that are said as one
_MESSAGE_BYTES = 160  # around the ids of a message, about, with what the link adds
_ID_BYTES = 18
_RANGE_BYTES = 32


def within(ids: Sequence[bytes], lower: bytes, upper: bytes) -> tuple[int, int]:
    """Return a range's bounds as indexes into all ids; the end may be before the beginning.

    Args:
        ids: Sorted.
        lower: The first that counts.
        upper: The first that does not; nothing means no end.
    """
    return bisect_left(ids, lower), bisect_left(ids, upper) if upper else len(ids)


def split(ids: Sequence[bytes], lower: bytes, upper: bytes) -> list[Range]:
    """Split a range of at least `SPLIT` ids into parts of one size."""
    start, stop = within(ids, lower, upper)
    cuts = [start + (stop - start) * step // SPLIT for step in range(1, SPLIT)]
    bounds = [lower, *(_bound(ids[cut - 1], ids[cut]) for cut in cuts), upper]
    return [_said(ids, low, up) for low, up in pairwise(bounds)]


def ascending(ranges: Iterable[Range]) -> list[Range]:
    """The ranges up to the first that overlaps with one before it: a peer that means ill."""
    taken: list[Range] = []
    for one in ranges:
        if taken and not (taken[-1].upper and taken[-1].upper <= one.lower):
            break
        taken.append(one)
    return taken


def work_on(ids: Sequence[bytes], ranges: Sequence[Range]) -> int:
    """How many ids have to be looked at, at most, to compare ascending ranges with one's own."""
    if not ranges:
        return 0
    start, stop = within(ids, ranges[0].lower, ranges[-1].upper)
    return max(0, stop - start)


def differing(ids: Sequence[bytes], ranges: Iterable[Range]) -> list[Range]:
    """Those ranges in which something else is held here."""
    return [one for one in ranges if _differs(ids, one)]


class Reply:
    """The answer about ranges that differ, within the bytes of one chunk.

    Args:
        ids: What is held here, sorted.
        theirs: Ranges that differ, as the other side said them.
        splits_max: How many of them may be split, so that all parts fit one message.

    Attributes:
        items: Small ranges: what is held here, and the other side is to answer.
        ranges: The parts of large ones, in ascending order.
        rest: What did not fit any more.
    """

    def __init__(self, ids: Sequence[bytes], theirs: Sequence[Range], *, splits_max: int) -> None:
        self.items: list[Items] = []
        self.ranges: list[Range] = []
        self.rest: list[Range] = []
        self._ids = ids
        small: list[Range] = []
        left = CHUNK_BYTES_MAX
        for one in theirs:
            start, stop = within(ids, one.lower, one.upper)
            count = stop - start
            is_small = count <= LEAF or (one.count <= LEAF and count <= ITEMS_AT_ONCE)
            # A small range costs what is said in return as well.
            cost = _MESSAGE_BYTES + _ID_BYTES * (count + min(one.count, ITEMS_AT_ONCE))
            if is_small and (cost <= left or not small):
                small.append(one)
            elif not is_small and len(self.ranges) < SPLIT * splits_max and left > 0:
                cost = SPLIT * _RANGE_BYTES
                self.ranges += split(ids, one.lower, one.upper)
            else:
                self.rest.append(one)
                continue
            left -= cost
        self.ranges.sort(key=lambda one: one.lower)
        for lower, upper in _joined(ids, small):
            start, stop = within(ids, lower, upper)
            mine = tuple(ids[start:stop])
            self.items.append(Items(lower=lower, upper=upper, ids=mine, answer=True))

    def with_rest(self) -> Ranges:
        """The ranges, and unsplit those left over: the other side asks for them again."""
        echoes = [_said(self._ids, one.lower, one.upper) for one in self.rest]
        return Ranges(ranges=tuple(sorted([*self.ranges, *echoes], key=lambda one: one.lower)))


def is_opening(ranges: Sequence[Range]) -> bool:
    """Whether this begins a comparison; an answer that spans everything has more ranges."""
    return len(ranges) == SPLIT and not ranges[0].lower and not ranges[-1].upper


def _joined(ids: Sequence[bytes], small: Iterable[Range]) -> list[tuple[bytes, bytes]]:
    """Small ranges, those that touch made one while it is small on both sides: fewer messages."""
    joined: list[tuple[bytes, bytes]] = []
    theirs = 0
    for one in sorted(small, key=lambda one: one.lower):
        theirs += one.count
        if joined and joined[-1][1] == one.lower:
            start, stop = within(ids, joined[-1][0], one.upper)
            if max(stop - start, theirs) <= JOINED_MAX:
                joined[-1] = joined[-1][0], one.upper
                continue
        joined.append((one.lower, one.upper))
        theirs = one.count
    return joined


def _said(ids: Sequence[bytes], lower: bytes, upper: bytes) -> Range:
    start, stop = within(ids, lower, upper)
    mine = ids[start:stop]
    return Range(lower=lower, upper=upper, count=len(mine), fingerprint=fingerprint_of(mine))


def _differs(ids: Sequence[bytes], one: Range) -> bool:
    start, stop = within(ids, one.lower, one.upper)
    return stop - start != one.count or fingerprint_of(ids[start:stop]) != one.fingerprint


def _bound(left: bytes, right: bytes) -> bytes:
    """The shortest prefix of `right` that is larger than `left`, to save bytes."""
    same = next(at for at, (one, other) in enumerate(zip(left, right, strict=True)) if one != other)
    return right[: same + 1]

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

from p2pmesh.state.fingerprint import fingerprint_of
from p2pmesh.wire.messages import CHUNK_BYTES_MAX, RANGES_MAX, Items, Range, Ranges

SPLIT = 16  # parts of a range that differs
LEAF = 16  # ids that are said as they are: no more bytes than one more round of ranges
ITEMS_AT_ONCE = 1024  # ids in one message: half a chunk
_MESSAGE_BYTES = 160  # around the ids of a message, about, with what the link adds
_ID_BYTES = 18
_RANGE_BYTES = 32


def within(ids: Sequence[bytes], lower: bytes, upper: bytes) -> slice:
    """Where the ids of a range are among all.

    Args:
        ids: Sorted.
        lower: The first that counts.
        upper: The first that does not; nothing means no end.
    """
    return slice(bisect_left(ids, lower), bisect_left(ids, upper) if upper else len(ids))


def split(ids: Sequence[bytes], lower: bytes, upper: bytes) -> list[Range]:
    """What is held in each part of a range with at least `SPLIT` ids, in parts of one size."""
    part = within(ids, lower, upper)
    count = part.stop - part.start
    cuts = [part.start + count * step // SPLIT for step in range(SPLIT + 1)]
    bounds = [lower, *(_bound(ids[cut - 1], ids[cut]) for cut in cuts[1:-1]), upper]
    return [
        Range(lower=low, upper=up, count=stop - start, fingerprint=fingerprint_of(ids[start:stop]))
        for low, up, start, stop in zip(bounds, bounds[1:], cuts, cuts[1:], strict=False)
    ]


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
    hull = within(ids, ranges[0].lower, ranges[-1].upper)
    return max(0, hull.stop - hull.start)


def differing(ids: Sequence[bytes], ranges: Iterable[Range]) -> list[Range]:
    """Those ranges in which something else is held here."""
    return [one for one in ranges if _differs(ids, one)]


class Reply:
    """What to say about ranges that differ, within the bytes of one chunk.

    Args:
        ids: What is held here, sorted.
        theirs: Ranges that differ, as the other side said them.
        ranges_max: How many ranges it may hold, those counted that are left over.

    Attributes:
        items: Small ranges: what is held here, and the other side is to answer.
        ranges: The parts of large ones, in ascending order.
        rest: What did not fit any more.
    """

    def __init__(
        self, ids: Sequence[bytes], theirs: Sequence[Range], *, ranges_max: int = RANGES_MAX
    ) -> None:
        self.items: list[Items] = []
        self.ranges: list[Range] = []
        self.rest: list[Range] = []
        left = CHUNK_BYTES_MAX
        for place, one in enumerate(theirs):
            following = len(theirs) - place - 1 + len(self.rest)
            part = within(ids, one.lower, one.upper)
            count = part.stop - part.start
            if count <= LEAF or (one.count <= LEAF and count <= ITEMS_AT_ONCE):
                expected = min(one.count, ITEMS_AT_ONCE)  # ids that will be said in return
                cost = _MESSAGE_BYTES + _ID_BYTES * (count + expected)
                if is_affordable := cost <= left or not self.items:
                    mine = tuple(ids[part])
                    said = Items(lower=one.lower, upper=one.upper, ids=mine, answer=True)
                    self.items.append(said)
            else:
                cost = SPLIT * _RANGE_BYTES
                is_affordable = cost <= left and len(self.ranges) + SPLIT + following <= ranges_max
                if is_affordable:
                    self.ranges += split(ids, one.lower, one.upper)
            if is_affordable:
                left -= cost
            else:
                self.rest.append(one)
        self.ranges.sort(key=lambda one: one.lower)

    def with_rest(self, ids: Sequence[bytes]) -> Ranges:
        """The ranges, and unsplit those left over: the other side asks for them again."""
        echoes = [
            Range(
                lower=one.lower,
                upper=one.upper,
                count=(part := within(ids, one.lower, one.upper)).stop - part.start,
                fingerprint=fingerprint_of(ids[part]),
            )
            for one in self.rest
        ]
        return Ranges(
            ranges=tuple(sorted([*self.ranges, *echoes], key=lambda one: one.lower)),
        )


def is_opening(ranges: Sequence[Range]) -> bool:
    """Whether this begins a comparison; an answer that spans everything has more ranges."""
    return len(ranges) == SPLIT and not ranges[0].lower and not ranges[-1].upper


def _differs(ids: Sequence[bytes], one: Range) -> bool:
    part = within(ids, one.lower, one.upper)
    if part.stop - part.start != one.count:
        return True
    return fingerprint_of(ids[part]) != one.fingerprint


def _bound(left: bytes, right: bytes) -> bytes:
    """The shortest prefix of `right` that is larger than `left`, to save bytes."""
    same = next(at for at, (one, other) in enumerate(zip(left, right, strict=True)) if one != other)
    return right[: same + 1]

"""What a peer that means ill can get out of one side of a repair."""

from __future__ import annotations

from itertools import pairwise

from p2pmesh.gossip.antientropy import (
    BARREN_S,
    STALLED_TURNS_MAX,
    TODO_MAX,
    WORK_BURST,
    WORK_PER_WANTED,
    AntiEntropy,
)
from p2pmesh.gossip.ranges import SPLIT
from p2pmesh.state.document import Document
from p2pmesh.wire.messages import (
    CHUNK_BYTES_MAX,
    RANGES_MAX,
    WANT_MAX,
    FetchRequest,
    Items,
    Range,
    Ranges,
    encode_message,
)
from tests.gossip.pair import ELSE, OTHER, PEER, junk, members, triples, with_facts
from tests.state.builders import MESH, NOW


def answer_of(lower: bytes, upper: bytes) -> Ranges:
    """Ranges that differ from anything."""
    bounds = [lower, *(bytes([16 * step]) for step in range(1, SPLIT)), upper]
    return Ranges(
        ranges=tuple(
            Range(lower=low, upper=up, count=10**6, fingerprint=ELSE)
            for low, up in pairwise(bounds)
        )
    )


def test_answers_are_bounded_whatever_is_asked() -> None:
    sync = AntiEntropy(with_facts(*triples(1000)))
    bounds = [number.to_bytes(2, "big") for number in range(0, 64 * RANGES_MAX, 64)]
    many = Ranges(
        ranges=tuple(
            Range(lower=low, upper=up, count=0, fingerprint=ELSE)
            for low, up in zip(bounds, [*bounds[1:], b""], strict=True)
        )
    )
    sends = sync.ranges(PEER, many, NOW)
    assert sum(len(encode_message(send.message)) for send in sends) < 4 * CHUNK_BYTES_MAX
    assert isinstance(sends[-1].message, Ranges)
    assert len(sends[-1].message.ranges) <= RANGES_MAX
    (items,) = sync.items(PEER, Items(lower=b"", upper=b"", ids=(), answer=True), NOW)
    assert len(encode_message(items.message)) < CHUNK_BYTES_MAX


def test_overlapping_ranges_are_not_compared() -> None:
    sync = AntiEntropy(with_facts(*triples(100)))
    one = Range(lower=b"", upper=b"", count=1, fingerprint=ELSE)
    sends = sync.ranges(PEER, Ranges(ranges=(one,)), NOW)
    assert len(sends) == 2
    assert sync.ranges(PEER, Ranges(ranges=(one,) * RANGES_MAX), NOW) == sends


def test_a_session_that_leads_nowhere_is_dropped() -> None:
    sync = AntiEntropy(with_facts(*triples(100)))
    assert sync.begin(PEER, NOW)
    said, turns = answer_of(junk(0), b""), 0
    while sends := sync.ranges(PEER, said, NOW):
        for send in sends:
            if isinstance(send.message, Items):
                empty = Items(
                    lower=send.message.lower, upper=send.message.upper, ids=(), answer=False
                )
                sync.items(PEER, empty, NOW)
        turns += 1
        assert turns <= STALLED_TURNS_MAX
    assert sync.begin(OTHER, NOW)


def test_a_peer_that_names_what_it_does_not_have_is_dropped() -> None:
    sync = AntiEntropy(Document(MESH))
    assert sync.begin(PEER, NOW)
    items = Items(lower=b"", upper=b"", ids=tuple(map(junk, range(2000))), answer=False)
    sends, asked = sync.items(PEER, items, NOW), 0
    while sends:
        asked += 1
        sends = sync.pulled(PEER, set(), NOW)
    assert asked == 2000 // 128 + 1
    assert sync.begin(OTHER, NOW)


def test_a_peer_that_always_names_something_else_is_dropped_in_the_end() -> None:
    sync, now = AntiEntropy(Document(MESH)), float(NOW)
    assert sync.begin(PEER, now)
    number = 0
    while now < NOW + BARREN_S:
        now += 1
        ids = tuple(map(junk, range(number, number + 10)))
        number += 10
        sync.items(PEER, Items(lower=b"", upper=b"", ids=ids, answer=False), now)
        sync.ranges(PEER, answer_of(junk(number), b""), now)
        sync.pulled(PEER, set(), now)
        sync.tick(now)
    assert sync.begin(OTHER, now)
    assert PEER not in sync.exhausted_peers


def test_what_is_kept_in_mind_is_bounded() -> None:
    sync = AntiEntropy(Document(MESH))
    sync.begin(PEER, NOW)
    for batch in range(40):
        ids = tuple(junk(2000 * batch + number) for number in range(2000))
        sync.items(PEER, Items(lower=b"a", upper=b"b", ids=ids, answer=True), NOW)
        sync.ranges(PEER, answer_of(junk(batch), b"\xff"), NOW)
    assert sync._fetches.backlog(PEER) <= 4096
    assert sync._session is None or len(sync._session.todo) <= TODO_MAX + RANGES_MAX


def test_work_for_one_peer_is_bounded() -> None:
    sync = AntiEntropy(with_facts(*members(range(3))))
    want = FetchRequest(ids=tuple(map(junk, range(WANT_MAX))))
    answered = 0
    while sync.want(PEER, want, NOW):
        answered += 1
        assert answered <= WORK_BURST / WORK_PER_WANTED / WANT_MAX
    assert sync.ranges(PEER, answer_of(junk(0), b""), NOW) != []  # there are no more ids than three
    assert sync.want(OTHER, want, NOW)
    assert sync.want(PEER, want, NOW + 1)

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.gossip.antientropy import FRUITLESS_FIRST_S, FRUITLESS_MAX_S, AntiEntropy
from p2pmesh.gossip.events import Send
from p2pmesh.gossip.fetch import TIMEOUT_S
from p2pmesh.gossip.ranges import LEAF, SPLIT
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from p2pmesh.wire.facts import Fact
from p2pmesh.wire.messages import (
    CHUNK_BYTES_MAX,
    WANT_MAX,
    FetchRequest,
    Items,
    Push,
    Ranges,
    decode_message,
    encode_message,
)
from p2pmesh.wire.registers import MEMBER
from tests.gossip.pair import (
    ELSE,
    OTHER,
    PEER,
    Pair,
    add,
    certificate,
    fork,
    junk,
    members,
    record,
    triples,
    with_facts,
)
from tests.state.builders import MESH, NOW

CUTOFF = NOW - 5


# When


def compare(
    sync: AntiEntropy, cutoff: int, fingerprint: bytes = ELSE, **changes: object
) -> list[Send]:
    arguments = {"now": NOW, "first": False, "asker": True, "node": PEER, **changes}
    node, now = arguments["node"], arguments["now"]
    assert isinstance(node, bytes)
    assert isinstance(now, int | float)
    return sync.compare(
        NodeId(node),
        cutoff,
        fingerprint,
        now,
        first=bool(arguments["first"]),
        asker=bool(arguments["asker"]),
    )


def test_two_differing_cutoffs_in_a_row_begin_a_session() -> None:
    document = with_facts(*members(range(3)))
    same = document.fingerprint_at(CUTOFF + 100)
    assert same is not None
    sync = AntiEntropy(document)
    assert compare(sync, CUTOFF) == []
    assert compare(sync, CUTOFF) == []
    assert compare(sync, CUTOFF + 100, same) == []
    assert compare(sync, CUTOFF + 2) == []
    (send,) = compare(sync, CUTOFF + 3)
    assert send.message == Items(lower=b"", upper=b"", ids=tuple(document.ids()), answer=True)
    assert compare(sync, CUTOFF + 4) == []
    assert sync.begin(OTHER, NOW) == []


def test_one_difference_is_enough_at_the_first_contact() -> None:
    assert compare(AntiEntropy(Document(MESH)), CUTOFF, first=True)
    assert compare(AntiEntropy(Document(MESH)), CUTOFF, first=True, asker=False) == []


def test_only_the_asker_begins() -> None:
    sync = AntiEntropy(Document(MESH))
    assert [compare(sync, CUTOFF + n, asker=False) for n in range(5)] == [[]] * 5
    assert compare(sync, CUTOFF + 5) == []


def test_what_is_too_long_ago_says_nothing() -> None:
    document = with_facts(*members(range(3)))
    document.expire(NOW + 30)
    assert document.fingerprint_at(CUTOFF) is None
    assert compare(AntiEntropy(document), CUTOFF, first=True) == []


def test_a_large_document_begins_with_its_parts() -> None:
    (send,) = AntiEntropy(with_facts(*members(range(LEAF + 1)))).begin(PEER, NOW)
    assert isinstance(send.message, Ranges)
    assert len(send.message.ranges) == SPLIT
    assert sum(one.count for one in send.message.ranges) == LEAF + 1


# Repair

FACTS = st.one_of(
    st.builds(
        record,
        st.integers(0, 30),
        st.sampled_from([MEMBER, "caps", "serving", "models/0"]),
        st.integers(1, 3),
    ),
    st.builds(fork, st.integers(0, 4), st.integers(1, 9)),
    st.builds(
        certificate,
        st.integers(0, 4),
        st.lists(st.integers(10, 13), min_size=1, max_size=3, unique=True),
        st.just(1),
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    common=st.lists(FACTS, max_size=80),
    one=st.lists(FACTS, max_size=40),
    other=st.lists(FACTS, max_size=40),
)
def test_any_two_documents_become_equal(
    common: list[Fact], one: list[Fact], other: list[Fact]
) -> None:
    base = members(range(31))
    pair = Pair(with_facts(*base, *common, *one), with_facts(*base, *common, *other))
    # A certificate may have to wait for the member record of its session to be told apart.
    for attempt in range(3):
        pair.repair(now=NOW + 100 * attempt)
        if pair.one.document.fingerprint == pair.other.document.fingerprint:
            break
    assert pair.is_equal
    assert len(pair.log) <= 60
    for _, message in pair.log:
        assert decode_message(encode_message(message)) == message


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 500),
    st.sets(st.integers(0, 499), max_size=300),
    st.sets(st.integers(0, 499), max_size=300),
)
def test_large_differences_are_repaired_in_one_session(
    owners: int, newer: set[int], missing: set[int]
) -> None:
    one = with_facts(*members(owner for owner in range(owners) if owner not in missing))
    other = with_facts(*members(range(owners)))
    add(one, [record(owner, seq=2) for owner in newer])
    pair = Pair(one, other)
    pair.repair()
    assert pair.is_equal
    assert all(record(owner).digest not in other.ids() for owner in newer)
    # Each difference is one id more or less, or both, in a range that is said and answered.
    assert len(pair.log) <= 30 + 4 * min(128, len(newer) + len(missing))


@pytest.mark.parametrize("begins", ["one", "other"])
def test_a_snapshot_is_pulled_by_an_empty_side(begins: str) -> None:
    pair = Pair(Document(MESH), with_facts(*triples(700)))
    pair.repair(pair.one if begins == "one" else pair.other)
    assert pair.is_equal
    assert len(pair.one.document.ids()) == 2100
    facts = pair.bytes_of(Push)
    assert pair.bytes_of() < 1.3 * facts
    assert all(
        sum(map(len, message.records)) <= CHUNK_BYTES_MAX
        for _, message in pair.log
        if isinstance(message, Push)
    )


@pytest.mark.parametrize(
    ("differences", "bytes_max"), [(0, 800), (1, 3_000), (10, 18_000), (100, 70_000)]
)
def test_finding_differences_costs_little(differences: int, bytes_max: int) -> None:
    base = triples(1000)
    pair = Pair(with_facts(*base), with_facts(*base))
    add(pair.other.document, [record(owner, "caps", 2) for owner in range(differences)])
    pair.repair()
    assert pair.is_equal
    assert pair.bytes_of(Ranges, Items) <= bytes_max
    # Old versions that the other side has replaced are asked for as well, in vain.
    facts = sum(len(m.records) for _, m in pair.log if isinstance(m, Push))
    assert facts <= 2 * differences


@pytest.mark.parametrize(("one", "other"), [(40, 60), (5, 6), (5, 60), (60, 5), (40, 40)])
def test_openings_that_cross_become_one_session(one: int, other: int) -> None:
    pair = Pair(with_facts(*members(range(one))), with_facts(*members(range(30, 30 + other))))
    pair.begin(pair.one)
    pair.begin(pair.other)
    pair.run()
    assert pair.is_equal
    openings = [m for _, m in pair.log if isinstance(m, Ranges) and len(m.ranges) == SPLIT]
    assert len(openings) <= 3
    # Neither waits for anything any more.
    for side in (pair.one, pair.other):
        assert side.sync.begin(OTHER, NOW + TIMEOUT_S + 1) or side.sync.tick(NOW) == []


def test_what_changes_meanwhile_does_not_disturb() -> None:
    pair = Pair(with_facts(*triples(100)), with_facts(*triples(50)))
    pair.begin()
    add(pair.one.document, [record(owner, seq=2) for owner in range(20)])
    add(pair.other.document, [record(owner, "caps", 2) for owner in range(20, 40)])
    pair.run()
    pair.repair(now=NOW + 10)
    assert pair.is_equal


# Fruitless


def test_what_is_refused_is_not_asked_for_again_and_sessions_grow_rare() -> None:
    pair = Pair(with_facts(*members(range(3))), with_facts(*members(range(40))))
    pair.one.accept = False
    sync, begun = pair.one.sync, []
    for second in range(3000):
        sends = sync.compare(
            pair.other.node, NOW + second, ELSE, NOW + second, first=False, asker=True
        )
        if not sends:
            sync.tick(NOW + second)
            continue
        begun.append(second)
        pair.send(pair.one, sends)
        pair.run(NOW + second)
    wanted = [m for s, m in pair.log if s is pair.one and isinstance(m, FetchRequest)]
    assert len(begun) < 100
    assert len(wanted) < len(begun) + 5
    assert begun[1] - begun[0] >= FRUITLESS_FIRST_S


def test_sessions_without_a_gain_wait_ever_longer() -> None:
    pair = Pair(with_facts(*members(range(3))), with_facts(*members(range(3))))
    node, begun = pair.other.node, []
    for second in range(2000):
        sends = pair.one.sync.compare(
            node, NOW + second, ELSE, NOW + second, first=True, asker=True
        )
        if sends:
            begun.append(second)
            pair.send(pair.one, sends)
            pair.run(NOW + second)
    pauses = [after - before for before, after in pairwise(begun)]
    assert pauses == sorted(pauses)
    assert pauses[:4] == [2, 4, 8, 16]
    assert pauses[-1] == FRUITLESS_MAX_S
    same = pair.one.document.fingerprint_at(NOW + 2000)
    assert same is not None
    assert compare(pair.one.sync, NOW + 2000, same, node=node, now=NOW + 2000) == []
    assert compare(pair.one.sync, NOW + 2000, node=node, now=NOW + 2000, first=True)


def test_a_session_that_is_useful_to_the_other_side_costs_no_patience() -> None:
    pair = Pair(with_facts(*members(range(40))), with_facts(*members(range(30))))
    pair.repair()
    assert pair.is_equal
    assert compare(pair.one.sync, NOW, node=pair.other.node, now=NOW, first=True)


def test_who_had_nothing_to_tell_is_known_until_it_has_or_is_gone() -> None:
    pair = Pair(with_facts(*members(range(9))), with_facts(*members(range(3))))
    node, sync = pair.other.node, pair.one.sync
    pair.repair()
    assert sync.exhausted_peers == {node}
    add(pair.other.document, members(range(9, 12)))
    pair.repair()
    assert sync.exhausted_peers == set()
    pair.repair()
    assert sync.exhausted_peers == {node}
    sync.link_down(node)
    assert sync.exhausted_peers == set()


def test_a_session_that_was_given_up_says_nothing_of_what_there_is_to_learn() -> None:
    sync = AntiEntropy(with_facts(*members(range(9))))
    assert sync.begin(PEER, NOW)
    sync.tick(NOW + TIMEOUT_S)
    assert not sync.busy
    assert sync.exhausted_peers == set()


def test_after_a_session_differences_are_counted_anew() -> None:
    pair = Pair(with_facts(*members(range(3))), with_facts(*members(range(9))))
    sync = pair.one.sync
    assert compare(sync, CUTOFF, node=OTHER) == []
    pair.repair()
    assert compare(sync, CUTOFF + 1, node=OTHER) == []
    assert compare(sync, CUTOFF + 2, node=OTHER)


# Time, links


def test_a_silent_peer_ends_the_session() -> None:
    sync = AntiEntropy(Document(MESH))
    assert sync.begin(PEER, NOW)
    assert sync.tick(NOW + TIMEOUT_S - 1) == []
    assert sync.begin(OTHER, NOW + TIMEOUT_S - 1) == []
    sync.tick(NOW + TIMEOUT_S)
    assert compare(sync, CUTOFF, first=True, now=NOW + TIMEOUT_S) == []
    assert sync.begin(OTHER, NOW + TIMEOUT_S)


def test_a_lost_link_ends_the_session_and_frees_what_was_asked() -> None:
    sync = AntiEntropy(Document(MESH))
    assert sync.begin(PEER, NOW)
    (want,) = sync.lacking(PEER, (junk(1),), NOW)
    assert want.message == FetchRequest(ids=(junk(1),))
    assert sync.lacking(OTHER, (junk(1),), NOW) == []
    sync.link_down(OTHER)
    assert sync.begin(OTHER, NOW) == []
    sync.link_down(PEER)
    assert sync.lacking(OTHER, (junk(1),), NOW)
    assert sync.begin(OTHER, NOW)


def test_losing_any_one_message_delays_repair_only() -> None:
    for lost in range(40):
        pair = Pair(with_facts(*triples(30)), with_facts(*members(range(20, 60))))
        pair.begin()
        pair.run(lose=lost)
        for second in range(1, 60, 6):
            for side in (pair.one, pair.other):
                side.sync.tick(NOW + second)
            pair.repair(now=NOW + second)
        assert pair.is_equal


# Answers


def test_wanted_items_come_a_chunk_at_a_time_in_order() -> None:
    document = with_facts(*triples(200), fork(3), certificate(7, [8, 9]))
    sync, ids = AntiEntropy(document), tuple(document.ids()[:WANT_MAX])
    (send,) = sync.want(PEER, FetchRequest(ids=(junk(1), *ids[:-1], *ids[:3])), NOW)
    facts = send.message
    assert isinstance(facts, Push)
    assert facts.asked
    assert 0.9 * CHUNK_BYTES_MAX < sum(map(len, facts.records)) <= CHUNK_BYTES_MAX
    assert facts.records == tuple(dict.fromkeys(facts.records))
    (send,) = sync.want(PEER, FetchRequest(ids=(fork(3).id, certificate(7, [8, 9]).id)), NOW)
    assert send.message == Push(
        certificates=(certificate(7, [8, 9]).raw,), forks=(fork(3).raw,), asked=True
    )


def test_even_nothing_is_an_answer() -> None:
    sync = AntiEntropy(Document(MESH))
    nothing = [Send(node=PEER, message=Push(asked=True))]
    assert sync.want(PEER, FetchRequest(ids=(junk(1),)), NOW) == nothing
    assert sync.want(PEER, FetchRequest(ids=()), NOW) == nothing


def test_an_end_of_ranges_is_not_answered() -> None:
    assert AntiEntropy(Document(MESH)).ranges(PEER, Ranges(ranges=()), NOW) == []

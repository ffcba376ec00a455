from __future__ import annotations

from p2pmesh.gossip.fetch import (
    PAUSE_S,
    QUEUE_MAX,
    REFUSED_MAX,
    REFUSED_S,
    TIMEOUT_S,
    WANT_AT_ONCE,
    Fetches,
)
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from p2pmesh.wire.messages import FetchRequest
from p2pmesh.wire.records import DIGEST_BYTES, Record
from tests.gossip.pair import add, certificate, fork, members, record, with_facts
from tests.state.builders import MESH, NOW

PEER, OTHER = NodeId(b"p" * 16), NodeId(b"o" * 16)


def junk(count: int, start: int = 1) -> list[bytes]:
    return [number.to_bytes(DIGEST_BYTES, "big") for number in range(start, start + count)]


def wanted(some: Fetches, node: NodeId = PEER, now: float = NOW) -> tuple[bytes, ...]:
    sends = some.ask(node, now)
    if not sends:
        return ()
    (send,) = sends
    assert send.node == node
    assert isinstance(send.message, FetchRequest)
    return send.message.ids


def ids(*records: Record) -> set[bytes]:
    return {one.digest for one in records}


def test_only_what_is_lacking_is_asked_for() -> None:
    some = Fetches(with_facts(*members(range(3))))
    assert not some.add(PEER, [record(0).digest], NOW)
    assert wanted(some) == ()
    assert some.add(PEER, [record(0).digest, record(7).digest], NOW)
    assert wanted(some) == (record(7).digest,)
    assert some.backlog(PEER) == 1


def test_one_request_at_a_time_and_the_rest_after_it() -> None:
    document = Document(MESH)
    some, sent = Fetches(document), members(range(WANT_AT_ONCE + 5))
    some.add(PEER, [one.digest for one in sent], NOW)
    assert len(wanted(some)) == WANT_AT_ONCE
    assert wanted(some) == ()
    add(document, sent[:50])
    assert some.arrived(PEER, ids(*sent[:50]), NOW)
    assert some.gained == 50
    assert wanted(some) == tuple(one.digest for one in sent[50:])


def test_what_came_another_way_is_not_asked_for() -> None:
    document = Document(MESH)
    some = Fetches(document)
    some.add(PEER, [record(1).digest], NOW)
    add(document, [record(1)])
    assert wanted(some) == ()
    assert some.backlog(PEER) == 0


def test_an_item_is_asked_of_one_neighbour_at_a_time() -> None:
    some = Fetches(Document(MESH))
    assert some.add(PEER, junk(1), NOW)
    assert some.add(OTHER, junk(1), NOW)
    assert wanted(some, OTHER) == ()
    some.link_down(PEER)
    assert some.add(OTHER, junk(1), NOW)
    assert wanted(some, OTHER) == tuple(junk(1))


def test_an_empty_reply_ends_the_request() -> None:
    some = Fetches(Document(MESH))
    some.add(PEER, junk(WANT_AT_ONCE + 1), NOW)
    wanted(some)
    assert some.arrived(PEER, set(), NOW)
    assert wanted(some) == tuple(junk(1, WANT_AT_ONCE + 1))
    assert some.add(OTHER, junk(1), NOW)
    assert wanted(some, OTHER) == tuple(junk(1))


def test_facts_that_nobody_asked_for_are_no_reply() -> None:
    some = Fetches(Document(MESH))
    assert not some.arrived(PEER, ids(record(1)), NOW)
    some.add(PEER, [record(1).digest], NOW)
    wanted(some)
    assert not some.arrived(PEER, ids(record(2)), NOW)
    assert not some.arrived(OTHER, ids(record(1)), NOW)
    assert some.backlog(PEER) == 1


def test_what_came_and_did_not_stand_is_not_asked_for_again_for_a_while() -> None:
    document = with_facts(record(1, seq=2))
    some, old = Fetches(document), record(1)
    some.add(PEER, [old.digest], NOW)
    wanted(some)
    assert some.arrived(PEER, ids(old), NOW)
    assert some.gained == 0
    assert not some.add(OTHER, [old.digest], NOW + REFUSED_S - 1)
    assert wanted(some, OTHER) == ()
    assert some.add(OTHER, [old.digest], NOW + REFUSED_S)


def test_what_may_stand_now_is_asked_for_at_once() -> None:
    some, void = Fetches(Document(MESH)), record(1)
    some.add(PEER, [void.digest], NOW)
    wanted(some)
    assert some.arrived(PEER, ids(void), NOW)
    assert not some.add(PEER, [void.digest], NOW)
    some.retry()
    assert some.add(PEER, [void.digest], NOW)


def test_evidence_that_did_not_stand_is_known_by_its_id() -> None:
    some = Fetches(Document(MESH))
    gone, both = certificate(1, [2, 3]), fork(4)
    some.add(PEER, [gone.id, both.id], NOW)
    wanted(some)
    assert some.arrived(PEER, {gone.id, both.id}, NOW)
    assert wanted(some) == ()
    assert not some.add(OTHER, [gone.id, both.id], NOW)


def test_what_was_not_looked_at_is_left_to_the_next_session() -> None:
    some, sent = Fetches(Document(MESH)), members(range(3))
    some.add(PEER, [one.digest for one in sent], NOW)
    wanted(some)
    assert some.arrived(PEER, ids(sent[0]), NOW, whole=False)
    assert wanted(some) == ()
    assert some.refused == 0
    assert some.add(OTHER, [one.digest for one in sent], NOW) == len(sent)
    assert wanted(some, OTHER) == tuple(one.digest for one in sent)


def test_who_does_not_deliver_is_not_asked_for_a_while() -> None:
    some = Fetches(Document(MESH))
    some.add(PEER, junk(1), NOW)
    wanted(some)
    assert some.tick(NOW + TIMEOUT_S - 0.1) == []
    late_at = NOW + TIMEOUT_S
    assert some.tick(late_at) == [PEER]
    assert some.add(PEER, junk(1), late_at)
    assert wanted(some, now=late_at) == ()
    assert some.add(OTHER, junk(1), late_at)
    assert wanted(some, OTHER, late_at) == tuple(junk(1))
    assert some.tick(late_at + PAUSE_S) == [OTHER]
    some.add(PEER, junk(1), late_at + PAUSE_S)
    assert wanted(some, now=late_at + PAUSE_S) == tuple(junk(1))


def test_what_is_remembered_is_bounded() -> None:
    document = Document(MESH)
    some = Fetches(document)
    some.add(PEER, junk(2 * QUEUE_MAX), NOW)
    assert some.backlog(PEER) == QUEUE_MAX
    some.link_down(PEER)
    assert not some._asked
    for number, one in enumerate(junk(REFUSED_MAX + 10)):
        some._judge(one, NOW + number * 0.001, whole=True)
    assert len(some._refused) == REFUSED_MAX
    assert not some._is_refused(junk(1)[0], NOW + 10)
    assert some._is_refused(junk(1, REFUSED_MAX)[0], NOW + 10)

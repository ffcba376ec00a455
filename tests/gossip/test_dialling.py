from __future__ import annotations

from p2pmesh.config import Address
from p2pmesh.gossip.dialling import (
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    POLITENESS_S,
    STABLE_S,
    Dialling,
)
from p2pmesh.gossip.events import Dial
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from tests.state.make import MESH, NODES, NOW, member, record

SMALL, LARGE = NodeId(b"\0" * 16), NodeId(b"\xff" * 16)
SEED = Address("10.0.0.1", 9338)
HERE = Address("127.0.0.1", 9338)


def knowing(*, left: bool = False) -> Document:
    document = Document(MESH)
    document.merge(record(register="member", body=member(left=left).to_wire()), NOW)
    return document


def test_the_smaller_id_dials_at_once_and_the_larger_waits() -> None:
    dial = Dial(node=NODES[0], addresses=(HERE,))
    assert list(Dialling(SMALL, (), {}).due(knowing(), set(), 0.0)) == [dial]
    polite = Dialling(LARGE, (), {})
    assert list(polite.due(knowing(), set(), 0.0)) == []
    assert list(polite.due(knowing(), set(), POLITENESS_S)) == [dial]


def test_a_lost_link_is_dialled_at_once_by_both() -> None:
    polite = Dialling(LARGE, (), {})
    polite.lost(NODES[0], 5.0)
    assert len(list(polite.due(knowing(), set(), 5.0))) == 1


def test_pauses_grow_up_to_a_bound_and_start_afresh_after_a_link() -> None:
    dialling = Dialling(SMALL, (), {})
    now, pauses = 0.0, []
    for _ in range(10):
        assert list(dialling.due(knowing(), set(), now))
        dialling.failed(NODES[0], now)
        started = now
        while not list(dialling.due(knowing(), set(), now)):
            now += 0.25
        dialling.failed(NODES[0], now)
        pauses.append(now - started)
        now += BACKOFF_MAX_S
    assert pauses[0] == BACKOFF_FIRST_S
    assert pauses == sorted(pauses)
    assert pauses[-1] == BACKOFF_MAX_S
    dialling.linked(NODES[0], now)
    dialling.lost(NODES[0], now + STABLE_S)
    assert list(dialling.due(knowing(), set(), now + STABLE_S))


def test_links_that_do_not_last_are_tried_with_growing_pauses() -> None:
    dialling = Dialling(SMALL, (), {})
    now, dials = 0.0, 0
    while now < 60:
        if list(dialling.due(knowing(), set(), now)):
            dials += 1
            dialling.linked(NODES[0], now)
            dialling.lost(NODES[0], now + 0.01)
        now += 0.05
    assert 5 <= dials <= 8


def test_linked_departed_and_own_addresses_are_left_alone() -> None:
    assert list(Dialling(SMALL, (), {}).due(knowing(), {NODES[0]}, 0.0)) == []
    assert list(Dialling(SMALL, (), {}).due(knowing(left=True), set(), 0.0)) == []
    assert list(Dialling(NODES[0], (), {}).due(knowing(), set(), 0.0)) == []


def test_seeds_are_dialled_while_nobody_is_linked() -> None:
    dialling = Dialling(SMALL, (SEED,), {})
    empty = Document(MESH)
    assert list(dialling.due(empty, set(), 0.0)) == [Dial(node=None, addresses=(SEED,))]
    assert list(dialling.due(empty, {NODES[0]}, 100.0)) == []
    dialling.failed(None, 100.0)
    assert list(dialling.due(empty, set(), 100.0)) == []
    assert list(dialling.due(empty, set(), 101.0)) == [Dial(node=None, addresses=(SEED,))]


def test_the_address_book_is_used_until_records_say_otherwise() -> None:
    dialling = Dialling(SMALL, (), {NODES[0]: (SEED,), NODES[1]: (SEED,)})
    found = {dial.node: dial.addresses for dial in dialling.due(knowing(), set(), 0.0)}
    assert found == {NODES[0]: (HERE,), NODES[1]: (SEED,)}

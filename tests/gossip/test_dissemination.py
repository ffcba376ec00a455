from __future__ import annotations

from p2pmesh.gossip.dissemination import (
    EAGER_LINKS_MIN,
    LEARNED_MAX,
    NAMED_AFTER_S,
    NAMED_UNTIL_S,
    Dissemination,
)
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import RECENT_MAX, RECORDS_BYTES_MAX, Push

LINKS = frozenset(NodeId(bytes([number]) * 16) for number in range(10))
SOME = sorted(LINKS)


def ids(count: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in range(count)]


def test_everybody_gets_the_same_in_messages_of_a_bounded_size() -> None:
    record, fork = b"r" * (RECORDS_BYTES_MAX // 2), b"f"
    sent = Dissemination().flood(Push(records=(record,) * 3, forks=(fork,)), SOME[:2])
    for node in SOME[:2]:
        messages = [one.message for one in sent if one.node == node]
        assert messages == [
            Push(records=(record, record)),
            Push(records=(record,), forks=(fork,)),
        ]
    assert [one.node for one in sent] == sorted(one.node for one in sent)


def test_nothing_is_not_sent() -> None:
    assert Dissemination().flood(Push(), SOME) == []


def test_what_is_new_goes_on_to_the_eager_but_not_back() -> None:
    eager = frozenset(SOME[:6])
    assert Dissemination().eager_peers(eager, LINKS, SOME[0]) == eager - {SOME[0]}
    assert Dissemination().eager_peers(eager, LINKS, SOME[9]) == eager


def test_with_few_eager_links_up_it_goes_to_all() -> None:
    eager, links = frozenset(SOME[:6]), LINKS - frozenset(SOME[EAGER_LINKS_MIN - 1 : 6])
    assert Dissemination().eager_peers(eager, links, SOME[9]) == links - {SOME[9]}
    enough = links | {SOME[EAGER_LINKS_MIN - 1]}
    assert Dissemination().eager_peers(eager, enough, SOME[9]) == eager & enough


def test_what_was_learned_is_named_for_a_while_and_not_at_once() -> None:
    dissemination = Dissemination()
    dissemination.learned(ids(2), 10.0)
    assert dissemination.recent(10.0 + NAMED_AFTER_S - 0.01) == ()
    assert dissemination.recent(10.0 + NAMED_AFTER_S) == tuple(ids(2))
    assert dissemination.recent(10.0 + NAMED_UNTIL_S) == tuple(ids(2))
    assert dissemination.recent(10.0 + NAMED_UNTIL_S + 0.01) == ()


def test_each_neighbour_hears_of_it_in_a_probe_or_answer_a_second() -> None:
    assert NAMED_UNTIL_S - NAMED_AFTER_S >= 1.0


def test_of_too_many_the_newest_are_named() -> None:
    dissemination = Dissemination()
    dissemination.learned(ids(RECENT_MAX + 5), 10.0)
    assert dissemination.recent(11.0) == tuple(ids(RECENT_MAX + 5)[5:])


def test_a_storm_does_not_fill_the_memory() -> None:
    dissemination = Dissemination()
    dissemination.learned(ids(2 * LEARNED_MAX), 10.0)
    assert len(dissemination._learned) == LEARNED_MAX
    assert dissemination.recent(11.0) == tuple(ids(2 * LEARNED_MAX)[-RECENT_MAX:])

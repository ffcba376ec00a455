"""Learning what earlier lives of a node wrote."""

from __future__ import annotations

from p2pmesh.gossip.events import Send, SetTimer
from p2pmesh.gossip.recovery import LEARN_FROM, LEARN_MORE_S, LEARN_S, LEARNED, Recovery
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import Own

NODES = [NodeId(bytes([number]) * 16) for number in range(LEARN_FROM + 1)]


def test_a_node_with_nobody_to_ask_may_write_at_once() -> None:
    recovery = Recovery(done=True)
    assert recovery.begin() == []
    assert recovery.ask(NODES[0]) == []


def test_a_start_waits_a_bounded_time() -> None:
    assert Recovery(done=False).begin() == [SetTimer(after_s=LEARN_S, token=LEARNED)]


def test_each_new_neighbour_is_asked_and_its_answer_counts_once() -> None:
    recovery = Recovery(done=False)
    assert recovery.ask(NODES[0]) == [Send(node=NODES[0], message=Own())]
    assert not recovery.is_reply(NODES[1])
    assert recovery.is_reply(NODES[0])
    assert not recovery.is_reply(NODES[0])


def test_after_the_first_answer_it_waits_a_little_for_others() -> None:
    recovery = Recovery(done=False)
    recovery.ask(NODES[0])
    recovery.is_reply(NODES[0])
    assert recovery.replied() == [SetTimer(after_s=LEARN_MORE_S, token=LEARNED)]
    assert not recovery.done


def test_enough_answers_end_it() -> None:
    recovery = Recovery(done=False)
    for node in NODES[:LEARN_FROM]:
        recovery.ask(node)
        assert recovery.is_reply(node)
        last = recovery.replied()
    assert recovery.done
    assert last == []
    assert recovery.ask(NODES[LEARN_FROM]) == []


def test_a_link_that_broke_answers_no_more() -> None:
    recovery = Recovery(done=False)
    recovery.ask(NODES[0])
    recovery.lost(NODES[0])
    assert not recovery.is_reply(NODES[0])

from __future__ import annotations

from p2pmesh.gossip.events import Send, SetTimer
from p2pmesh.gossip.recovery import LEARN_FROM, LEARN_MORE_S, LEARN_S, LEARNED, Recovery
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import Own

NODES = [NodeId(bytes([number]) * 16) for number in range(LEARN_FROM + 2)]
SOON = [SetTimer(after_s=LEARN_MORE_S, token=LEARNED)]


def test_alone_it_waits_for_nobody_but_asks_whom_it_meets() -> None:
    alone = Recovery(done=True)
    assert alone.begin() == []
    assert alone.ask(NODES[0]) == [Send(node=NODES[0], message=Own())]
    assert alone.is_reply(NODES[0])
    assert alone.replied() == []
    assert alone.done


def test_whoever_is_linked_is_asked_and_nobody_waits_for_ever() -> None:
    one = Recovery(done=False)
    assert one.begin() == [SetTimer(after_s=LEARN_S, token=LEARNED)]
    assert one.ask(NODES[0]) == [Send(node=NODES[0], message=Own())]
    assert not one.done


def test_after_the_first_answer_it_waits_only_a_little() -> None:
    one = Recovery(done=False)
    one.ask(NODES[0])
    assert one.is_reply(NODES[0])
    assert one.replied() == SOON
    assert not one.done
    assert LEARN_MORE_S < LEARN_S


def test_enough_answers_are_enough() -> None:
    one = Recovery(done=False)
    for node in NODES:
        one.ask(node)
    for node in NODES[: LEARN_FROM - 1]:
        assert one.is_reply(node)
        assert one.replied() == SOON
    assert one.is_reply(NODES[LEARN_FROM])
    assert one.replied() == []
    assert one.done


def test_each_answers_once_and_only_if_it_was_asked() -> None:
    one = Recovery(done=False)
    one.ask(NODES[0])
    assert not one.is_reply(NODES[1])
    assert one.is_reply(NODES[0])
    assert not one.is_reply(NODES[0])


def test_who_is_gone_does_not_answer_any_more() -> None:
    one = Recovery(done=False)
    one.ask(NODES[0])
    one.lost(NODES[0])
    assert not one.is_reply(NODES[0])

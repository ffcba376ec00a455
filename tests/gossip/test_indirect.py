from __future__ import annotations

import pytest

from p2pmesh.gossip.events import Send
from p2pmesh.gossip.indirect import (
    ERRAND_S,
    ERRANDS_BURST,
    ERRANDS_MAX,
    ERRANDS_OF_ONE_MAX,
    ERRANDS_PER_S,
    ProbeRelay,
)
from p2pmesh.gossip.suspicion import TOLD_WITHIN_S
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import ProbeReport, ProbeRequest

ANNA, BEN, CARL, DORA = (NodeId(letter * 16) for letter in (b"a", b"b", b"c", b"d"))


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(16, "big"))


def told(asker: NodeId, subject: NodeId, token: int, *, alive: bool) -> Send:
    return Send(node=asker, message=ProbeReport(subject=subject, token=token, alive=alive))


def test_all_who_asked_about_a_node_are_told_once() -> None:
    indirect = ProbeRelay()
    assert indirect.accept(ANNA, ProbeRequest(subject=CARL, token=1), 0.0)
    assert indirect.accept(BEN, ProbeRequest(subject=CARL, token=7), 0.1)
    assert indirect.accept(BEN, ProbeRequest(subject=DORA, token=8), 0.1)
    assert indirect.found(CARL, alive=True) == [
        told(ANNA, CARL, 1, alive=True),
        told(BEN, CARL, 7, alive=True),
    ]
    assert indirect.found(CARL, alive=True) == []
    assert indirect.found(DORA, alive=False) == [told(BEN, DORA, 8, alive=False)]


def test_news_of_others_answers_nobody() -> None:
    indirect = ProbeRelay()
    indirect.accept(ANNA, ProbeRequest(subject=CARL, token=1), 0.0)
    assert indirect.found(DORA, alive=True) == []


def test_what_was_not_found_out_in_time_counts_as_not_reached() -> None:
    indirect = ProbeRelay()
    indirect.accept(ANNA, ProbeRequest(subject=CARL, token=1), 0.0)
    indirect.accept(ANNA, ProbeRequest(subject=DORA, token=2), 0.1)
    assert indirect.overdue(ERRAND_S - 0.01) == []
    assert indirect.overdue(ERRAND_S) == [told(ANNA, CARL, 1, alive=False)]
    assert indirect.overdue(ERRAND_S + 0.1) == [told(ANNA, DORA, 2, alive=False)]


def test_who_asks_without_end_is_served_at_a_rate() -> None:
    indirect = ProbeRelay()
    accepted = 0
    for step in range(1000):  # 100 in a second, each found out at once
        subject = node(step)
        accepted += indirect.accept(ANNA, ProbeRequest(subject=subject, token=step), step / 100)
        indirect.found(subject, alive=False)
    assert accepted == pytest.approx(ERRANDS_BURST + 10 * ERRANDS_PER_S, abs=2)
    assert indirect.accept(BEN, ProbeRequest(subject=CARL, token=1), 10.0), (
        "others have their own rate"
    )


def test_askers_wait_for_longer_than_indirect_probes_take() -> None:
    assert TOLD_WITHIN_S > ERRAND_S


def test_there_are_never_too_many_and_new_ones_find_room_later() -> None:
    indirect = ProbeRelay()
    asks = [
        indirect.accept(node(number), ProbeRequest(subject=CARL, token=number), 0.0)
        for number in range(ERRANDS_MAX + 1)
    ]
    assert asks == [True] * ERRANDS_MAX + [False]
    assert len(indirect.overdue(ERRAND_S)) == ERRANDS_MAX
    assert indirect.accept(ANNA, ProbeRequest(subject=CARL, token=1), ERRAND_S)


def test_nobody_can_take_all_the_room_and_have_everybody_dialled() -> None:
    indirect = ProbeRelay()
    asks = [
        indirect.accept(ANNA, ProbeRequest(subject=node(number), token=number), 0.0)
        for number in range(ERRANDS_MAX)
    ]
    assert sum(asks) == ERRANDS_OF_ONE_MAX
    assert indirect.accept(BEN, ProbeRequest(subject=CARL, token=1), 0.0)

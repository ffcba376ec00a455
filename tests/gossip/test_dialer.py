from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from p2pmesh.config import Address
from p2pmesh.gossip.dialer import (
    ABSENT_INTERVAL_S,
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    GONE_LAST,
    POLITENESS_S,
    SEED_BACKOFF_MAX_S,
    STABLE_S,
    UNDER_WAY_S,
    UNWANTED_S,
    Dialer,
)
from p2pmesh.gossip.events import Dial
from p2pmesh.identity.keys import NodeId
from tests.gossip.builders import HERE, THERE, View, certificate_by, member_of
from tests.state.builders import NODES, NOW

SMALL, LARGE = NodeId(b"\0" * 16), NodeId(b"\xff" * 16)
ANNA, BEN, CARL = NODES[:3]
SEED = Address("10.0.0.1", 9338)
TO_ANNA = Dial(node=ANNA, addresses=(HERE,))
WANTED = frozenset({ANNA})
NOBODY: frozenset[NodeId] = frozenset()


def dialer(
    me: NodeId = SMALL, *, seeds: tuple[Address, ...] = (), view: View | None = None
) -> Dialer:
    view = view or View(me)
    view.learn(member_of(0))
    return Dialer(view.members, seeds)


def due(
    one: Dialer, at: float, *, wanted: frozenset[NodeId] = WANTED, linked: bool = False
) -> list[Dial]:
    return list(one.due(wanted, WANTED if linked else NOBODY, at))


# Neighbours


def test_the_smaller_id_dials_at_once_and_the_larger_waits() -> None:
    assert due(dialer(SMALL), 0.0) == [TO_ANNA]
    polite = dialer(LARGE)
    assert due(polite, 0.0) == []
    assert due(polite, POLITENESS_S - 0.1) == []
    assert due(polite, POLITENESS_S) == [TO_ANNA]


def test_who_cannot_be_dialled_itself_need_not_wait_for_it() -> None:
    view = View(NODES[3])
    view.learn(member_of(3, addresses=()))
    assert due(dialer(view=view), 0.0) == [TO_ANNA]


def test_only_who_is_wanted_not_linked_and_listens_somewhere_is_dialled() -> None:
    view = View(SMALL)
    view.learn(member_of(1, addresses=()), member_of(2))
    one = dialer(view=view)
    assert due(one, 0.0, wanted=frozenset({ANNA, BEN})) == [TO_ANNA]
    assert due(dialer(), 0.0, linked=True) == []
    assert due(dialer(), 0.0, wanted=NOBODY) == []


def test_an_attempt_under_way_is_not_made_again_unless_it_is_lost() -> None:
    one = dialer()
    assert due(one, 0.0) == [TO_ANNA]
    assert due(one, UNDER_WAY_S - 0.1) == []
    assert due(one, UNDER_WAY_S) == [TO_ANNA]


def pause_after_failure(one: Dialer, now: float) -> float:
    assert due(one, now)
    one.failed(ANNA, now)
    pause = 0.0
    while not due(one, now + pause):
        pause += 0.25
    one.failed(ANNA, now + pause)
    return pause


def test_pauses_grow_up_to_a_bound_and_start_afresh_after_a_link() -> None:
    one = dialer()
    pauses = [pause_after_failure(one, 100.0 * number) for number in range(6)]
    assert pauses == [0.5, 2.0, 4.0, 4.0, 4.0, 4.0]
    assert (pauses[0], pauses[-1]) == (BACKOFF_FIRST_S, BACKOFF_MAX_S)
    one.linked(ANNA, 1000.0)
    one.lost(ANNA, 1000.0 + STABLE_S)
    assert due(one, 1000.0 + STABLE_S) == [TO_ANNA]


def test_a_lost_link_is_dialled_at_once_by_both() -> None:
    for me in (SMALL, LARGE):
        one = dialer(me)
        one.linked(ANNA, 0.0)
        one.lost(ANNA, 50.0)
        assert due(one, 50.0) == [TO_ANNA]


def test_links_that_do_not_last_are_tried_with_growing_pauses() -> None:
    one = dialer()
    now, dials = 0.0, 0
    while now < 60:
        if due(one, now):
            dials += 1
            one.linked(ANNA, now)
            one.lost(ANNA, now + STABLE_S / 4)
        now += 0.125
    assert 60 / (BACKOFF_MAX_S + 1) <= dials <= 60 / BACKOFF_MAX_S + 5


# Seeds


def test_seeds_are_dialled_while_nobody_is_linked() -> None:
    one = dialer(seeds=(SEED, THERE))
    assert due(one, 0.0, wanted=NOBODY) == [
        Dial(node=None, addresses=(SEED,)),
        Dial(node=None, addresses=(THERE,)),
    ]
    assert due(one, 5.0, wanted=NOBODY) == []
    one.failed(None, 5.0)
    assert due(one, 5.0 + SEED_BACKOFF_MAX_S, wanted=NOBODY, linked=True) == []
    assert len(due(one, 5.0 + SEED_BACKOFF_MAX_S, wanted=NOBODY)) == 2


def test_seeds_that_all_fail_are_one_failure() -> None:
    seeds = tuple(Address("10.0.0.9", port) for port in range(1, 6))
    one = dialer(seeds=seeds)
    assert len(due(one, 0.0, wanted=NOBODY)) == len(seeds)
    for _ in seeds:
        one.failed(None, 0.1)
    assert len(due(one, 0.1 + BACKOFF_FIRST_S, wanted=NOBODY)) == len(seeds)


def test_once_there_was_a_link_seeds_are_dialled_afresh() -> None:
    one = dialer(seeds=(SEED,))
    for at in range(8):
        due(one, 100.0 * at, wanted=NOBODY)
        one.failed(None, 100.0 * at)
    one.linked(ANNA, 1000.0)
    one.lost(ANNA, 1100.0)
    assert due(one, 1100.0, wanted=NOBODY) == [Dial(node=None, addresses=(SEED,))]


# The absent


def departed(count: int) -> tuple[Dialer, list[NodeId]]:
    nodes = [NodeId(bytes([number]) * 16) for number in range(1, count + 1)]
    view = View(SMALL, book=dict.fromkeys(nodes, (THERE,)))
    return Dialer(view.members, ()), nodes


def dialled(one: Dialer, at: float, links: frozenset[NodeId] = NOBODY) -> list[NodeId | None]:
    return [dial.node for dial in one.due(NOBODY, links, at)]


def test_one_of_the_absent_is_dialled_each_second_in_turn() -> None:
    one, nodes = departed(3)
    turns = [dialled(one, NOW + 0.25 * quarter) for quarter in range(4 * 8)]
    seconds = [list(chain(*turns[at : at + 4])) for at in range(0, len(turns), 4)]
    twice = [node for node in nodes for _ in range(2)]
    assert seconds == [[node] for node in [*twice, nodes[0], nodes[0]]]
    assert ABSENT_INTERVAL_S == 1.0


def test_those_who_went_last_are_looked_for_first_and_yet_nobody_is_forgotten() -> None:
    one, nodes = departed(100)
    turns = [node for second in range(200) for node in dialled(one, NOW + second)]
    assert set(turns[: 2 * GONE_LAST]) >= set(nodes[-GONE_LAST:])
    assert set(turns) == set(nodes)


def test_who_is_linked_or_came_back_is_not_absent() -> None:
    one, nodes = departed(2)
    assert dialled(one, NOW, frozenset(nodes[:1])) == [nodes[1]]
    assert dialled(one, NOW + 1, frozenset(nodes)) == []


def test_the_removed_are_looked_for() -> None:
    view = View(SMALL)
    view.learn(member_of(0), certificate_by([1], 0))
    assert dialled(Dialer(view.members, ()), NOW) == [ANNA]


def test_the_absent_without_address_hold_nobody_up() -> None:
    view = View(SMALL)
    view.learn(member_of(0, addresses=()), member_of(1), member_of(2, addresses=()))
    view.expire(NOW + 1000)
    one = Dialer(view.members, ())
    turns = {node for second in range(8) for node in dialled(one, NOW + second)}
    assert turns == {BEN}


# Links


def test_a_link_stays_while_either_end_wants_it_and_a_while_longer() -> None:
    one = dialer()
    one.linked(ANNA, 0.0)
    one.keep(ANNA, 100.0)
    assert one.unwanted(100.0 + UNWANTED_S) == []
    assert one.unwanted(100.1 + UNWANTED_S) == [ANNA]


def test_a_new_link_stays_for_a_while_even_if_nobody_wants_it() -> None:
    one = dialer()
    one.linked(BEN, 0.0)
    assert one.unwanted(UNWANTED_S) == []
    assert one.unwanted(UNWANTED_S + 0.1) == [BEN]
    one.lost(BEN, UNWANTED_S + 0.2)
    assert one.unwanted(1000.0) == []


def test_wanting_what_is_not_linked_makes_no_link() -> None:
    one = dialer()
    one.keep(ANNA, 0.0)
    assert one.unwanted(1000.0) == []


# For others


def test_somebody_asked_about_is_dialled_at_once() -> None:
    assert dialer().try_once(ANNA) == TO_ANNA
    assert dialer().try_once(CARL) is None


def test_attempts_at_others_are_forgotten() -> None:
    one = dialer()
    due(one, 0.0)
    one.failed(ANNA, 0.0)
    one.forget_except(WANTED)
    assert due(one, 0.1) == []
    one.forget_except(NOBODY)
    assert due(one, 0.1) == [TO_ANNA]


# Whatever happens


class Dials(RuleBasedStateMachine):
    """One neighbour that is wanted, and attempts that end this way or that."""

    def __init__(self) -> None:
        super().__init__()
        self.dialer, self.now = dialer(), 0.0
        self.not_before = self.last_at = 0.0

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 5.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def look(self) -> None:
        self.due()

    def due(self) -> bool:
        dials = due(self.dialer, self.now)
        assert dials in ([], [TO_ANNA])
        if dials:
            assert self.now >= self.not_before, "it pauses after a failure"
            self.last_at = self.now
        else:
            assert self.now - self.last_at <= UNDER_WAY_S, "nobody is given up"
        return bool(dials)

    @rule()
    def fails(self) -> None:
        if self.due():
            self.not_before = self.now + BACKOFF_FIRST_S
        self.dialer.failed(ANNA, self.now)
        self.last_at = self.now

    @rule(stays_s=st.sampled_from([0.0, 1.0, 10.0]))
    def links(self, stays_s: float) -> None:
        self.dialer.linked(ANNA, self.now)
        self.now += stays_s
        self.dialer.lost(ANNA, self.now)
        self.last_at = self.now
        self.not_before = self.now + (BACKOFF_FIRST_S if stays_s < STABLE_S else 0)


TestDials = Dials.TestCase


@pytest.mark.parametrize("failures", [1, 100, 2000])
def test_failing_for_ever_neither_overflows_nor_gives_up(failures: int) -> None:
    one = dialer()
    for number in range(failures):
        assert due(one, number * BACKOFF_MAX_S) == [TO_ANNA]
        one.failed(ANNA, number * BACKOFF_MAX_S)
    assert due(one, failures * BACKOFF_MAX_S) == [TO_ANNA]


def test_a_failure_that_nobody_waits_for_delays_nothing() -> None:
    one = dialer()
    one.failed(ANNA, 0.0)
    assert due(one, 0.0) == [TO_ANNA]
    one.failed(ANNA, 0.0)
    one.failed(ANNA, 0.4)  # of a dial for somebody who asked
    assert due(one, BACKOFF_FIRST_S) == [TO_ANNA]

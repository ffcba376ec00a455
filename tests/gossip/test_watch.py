from __future__ import annotations

import time

from p2pmesh.gossip.events import Send
from p2pmesh.gossip.neighbours import Neighbours
from p2pmesh.gossip.probe import MISSES_MIN, PROBE_TIMEOUT_S, SILENCE_S, Prober
from p2pmesh.gossip.suspicion import HELPERS_MAX, SUSPECTS_PER_TURN
from p2pmesh.gossip.watch import Watch
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.wire.messages import ProbeReport, ProbeRequest
from p2pmesh.wire.registers import MEMBER
from tests.gossip.builders import accusation, mesh_of
from tests.state.builders import NODES, member, sealed

SMALLER, SUBJECT, ME, *_, LARGER = sorted(NODES)


class Observer:
    """A member of eight that is linked with all others and observes one of them."""

    def __init__(self) -> None:
        self.view, self.prober = mesh_of(8, ME), Prober()
        self.near = Neighbours(self.view.members, self.view.shared)
        self.near.subjects = frozenset({SUBJECT})
        self.links = set(NODES) - {ME}
        for node in self.links:
            self.prober.link_up(node, 0.0)
        self.watch = Watch(self.view.members, self.prober, self.near, self.links)
        for node in self.links:
            self.watch.heard(node)
        self.now = 0.0

    def miss(self, node: NodeId, count: int) -> None:
        for _ in range(count):
            self.prober.ask(node, self.now)
            self.now += PROBE_TIMEOUT_S
            self.prober.count(self.links, self.now)


def test_each_link_is_probed_from_one_end() -> None:
    observer = Observer()
    near, watch = observer.near, observer.watch
    near.subjects = near.observers = frozenset()
    assert watch.is_mine_to_probe(LARGER, 0.0)
    assert not watch.is_mine_to_probe(SMALLER, 0.0)
    near.subjects, near.observers = frozenset({SMALLER}), frozenset({LARGER})
    assert watch.is_mine_to_probe(SMALLER, 0.0)
    assert not watch.is_mine_to_probe(LARGER, 0.0)
    near.subjects, near.observers = frozenset({SMALLER}), frozenset({SMALLER})
    assert watch.is_mine_to_probe(SMALLER, 0.0), "each watches over the other"


def test_who_should_be_probing_and_is_silent_is_probed() -> None:
    observer = Observer()
    observer.near.observers = frozenset({LARGER})
    assert not observer.watch.is_mine_to_probe(LARGER, SILENCE_S)
    assert observer.watch.is_mine_to_probe(LARGER, SILENCE_S + 0.1)


def test_nobody_is_asked_about_who_answers() -> None:
    assert Observer().watch.ask_around(1.0) == []


def test_links_that_answer_are_asked_about_one_that_does_not() -> None:
    observer = Observer()
    silent = next(node for node in NODES if node not in (ME, SUBJECT))
    observer.miss(silent, 1)
    observer.miss(SUBJECT, MISSES_MIN - 1)
    asked = observer.watch.ask_around(observer.now)
    assert len({one.node for one in asked}) == HELPERS_MAX
    assert {one.node for one in asked} <= observer.links - {SUBJECT, silent}
    assert {type(one.message) for one in asked} == {ProbeRequest}
    assert {one.message.subject for one in asked if isinstance(one.message, ProbeRequest)} == {
        SUBJECT
    }


def test_other_helpers_are_asked_the_next_time() -> None:
    observer = Observer()
    observer.miss(SUBJECT, MISSES_MIN)
    rounds = set()
    for _ in range(5):
        observer.now += 10
        rounds |= {one.node for one in observer.watch.ask_around(observer.now)}
    assert len(rounds) > HELPERS_MAX


def test_its_own_neighbours_are_asked_first() -> None:
    observer = Observer()
    first = frozenset(sorted(observer.links - {SUBJECT})[3:6])
    observer.near.near = lambda node: first  # type: ignore[method-assign]
    observer.miss(SUBJECT, MISSES_MIN)
    assert {one.node for one in observer.watch.ask_around(observer.now)} == first


def test_what_the_helpers_say_decides() -> None:
    observer = Observer()
    observer.miss(SUBJECT, MISSES_MIN)
    for one in observer.watch.ask_around(observer.now):
        assert isinstance(one.message, ProbeRequest)
        observer.watch.suspicion.told(
            one.node, SUBJECT, one.message.token, alive=False, now=observer.now
        )
    assert observer.watch.accuse(frozenset(), observer.now)
    index = NODES.index(SUBJECT)
    assert observer.watch.suspicion.accusations == {SUBJECT: accusation(index)}
    assert not observer.watch.accuse(frozenset(), observer.now)


def test_a_sign_of_life_answers_those_who_asked() -> None:
    observer = Observer()
    observer.watch.indirect.accept(LARGER, ProbeRequest(subject=SUBJECT, token=4), 0.0)
    told = ProbeReport(subject=SUBJECT, token=4, alive=True)
    assert observer.watch.heard(SUBJECT) == [Send(node=LARGER, message=told)]
    assert observer.watch.heard(SUBJECT) == []


def test_members_that_never_were_anywhere_cost_little_time_and_hold_nobody_up() -> None:
    """A guard against the wrong order of growth, ten times above what is measured."""
    view, prober = mesh_of(2), Prober()
    near = Neighbours(view.members, view.shared)
    body = member(addresses=()).to_wire()
    for number in range(1000):
        key = SigningKey((1000 + number).to_bytes(32, "big"))
        view.learn(sealed(key, MEMBER, body=body))
    watch = Watch(view.members, prober, near, {NODES[1]})
    prober.link_up(NODES[1], 0.0)
    watch.heard(NODES[1])
    near.update(frozenset())
    assert len(near.subjects) == 1000
    for second in range(1, 4):
        prober.count(near.wanted, float(second))
    began_at = time.perf_counter()
    asked = watch.ask_around(3.0)
    assert time.perf_counter() - began_at < 0.1
    assert len({one.message for one in asked}) == SUSPECTS_PER_TURN

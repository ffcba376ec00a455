from __future__ import annotations

from p2pmesh.gossip.catch_up import CatchUp
from p2pmesh.gossip.clock import MeshClock
from p2pmesh.gossip.dissemination import Dissemination
from p2pmesh.gossip.heartbeat import CUTOFF_S, Heartbeat
from p2pmesh.gossip.neighbours import Neighbours
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import AHEAD_S_MAX
from p2pmesh.state.fingerprint import CHANGES_KEPT_S
from p2pmesh.wire.messages import PLAN_DIGEST_BYTES
from tests.gossip.builders import View, certificate_by, member_of, mesh_of
from tests.state.builders import NODES, NOW, record

ANNA = NODES[1]


class Sign:
    """The pulse of a member of three, and what it is made of."""

    def __init__(self, *, settled: bool = True, me: NodeId = NODES[0]) -> None:
        self.view: View = mesh_of(3, me)
        self.catch_up = CatchUp(done=settled)
        self.dissemination, self.clock = Dissemination(), MeshClock()
        self.near = Neighbours(self.view.members, self.view.shared)
        self.heartbeat = Heartbeat(
            self.view.members, self.clock, self.near, self.catch_up, self.dissemination
        )
        self.catch_up.begin(NOW)


def test_a_probe_says_when_what_and_what_for() -> None:
    sign = Sign()
    sign.near.wanted = frozenset({ANNA})
    sign.dissemination.learned([b"i" * 16], NOW + 19)
    sign.heartbeat.plan = b"p" * PLAN_DIGEST_BYTES
    probe = sign.heartbeat.probe(ANNA, 7, NOW + 20.25)
    assert (probe.token, probe.at_ms) == (7, (NOW * 1000) + 20_250)
    assert (probe.plan, probe.keep, probe.recent) == (sign.heartbeat.plan, True, (b"i" * 16,))
    assert not sign.heartbeat.probe(NODES[2], 8, NOW + 20).keep


def test_what_may_be_on_its_way_is_not_compared() -> None:
    one, other = Sign(), Sign()
    one.view.learn(record(1, epoch=NOW - 600, issued_at=NOW + 18), now=NOW + 20)
    probe = one.heartbeat.probe(ANNA, 1, NOW + 20)
    assert probe.cutoff == NOW + 20 - CUTOFF_S
    assert probe.fingerprint == other.heartbeat.probe(ANNA, 1, NOW + 20).fingerprint
    later = NOW + 18 + CUTOFF_S
    assert (
        one.heartbeat.probe(ANNA, 1, later).fingerprint
        != other.heartbeat.probe(ANNA, 1, later).fingerprint
    )


def test_who_is_not_up_to_date_compares_everything() -> None:
    sign = Sign(settled=False)
    sign.view.learn(record(1, epoch=NOW - 600, issued_at=NOW + 20), now=NOW + 20)
    probe = sign.heartbeat.probe(ANNA, 1, NOW + 20)
    assert probe.cutoff == NOW + 20 + AHEAD_S_MAX
    assert probe.fingerprint == sign.view.document.fingerprint


def test_of_two_that_meet_across_a_cut_one_compares_everything() -> None:
    cutoffs = []
    pair = sorted(NODES[:2])
    for me, other in (pair, pair[::-1]):
        sign = Sign(me=me)
        number = NODES.index(other)
        sign.view.learn(certificate_by([2], number))
        cutoffs.append(sign.heartbeat.probe(other, 1, NOW + 20).cutoff - NOW - 20)
    assert cutoffs == [AHEAD_S_MAX, -CUTOFF_S]


def test_an_answer_is_of_the_same_cutoff() -> None:
    one, other = Sign(), Sign()
    probe = one.heartbeat.probe(ANNA, 7, NOW + 20)
    answer = other.heartbeat.answer(NODES[0], probe, NOW + 21)
    assert (answer.token, answer.cutoff) == (7, probe.cutoff)
    assert answer.fingerprint == probe.fingerprint


def test_asked_about_what_was_long_ago_it_says_what_is_now() -> None:
    one, other = Sign(), Sign()
    probe = one.heartbeat.probe(ANNA, 7, NOW)
    later = NOW + 2 * CHANGES_KEPT_S + 100
    other.view.learn(member_of(1, 2, issued_at=later), now=later)
    answer = other.heartbeat.answer(NODES[0], probe, later)
    assert answer.cutoff >= later
    assert answer.fingerprint == other.view.document.fingerprint


def test_knowing_the_same_counts_for_settling_and_the_plan_is_kept() -> None:
    sign, peer = Sign(settled=False), Sign(settled=False)
    peer.heartbeat.plan = b"p" * PLAN_DIGEST_BYTES
    probe = peer.heartbeat.probe(NODES[0], 1, NOW)
    assert sign.heartbeat.read(ANNA, probe, NOW)
    assert sign.heartbeat.plans == {ANNA: peer.heartbeat.plan}
    sign.catch_up.review(frozenset({ANNA}), frozenset(), NOW)
    assert sign.catch_up.done


def test_knowing_something_else_does_not() -> None:
    sign, peer = Sign(settled=False), Sign(settled=False)
    peer.view.learn(member_of(3))
    sign.heartbeat.read(ANNA, peer.heartbeat.probe(NODES[0], 1, NOW), NOW)
    sign.catch_up.review(frozenset({ANNA}), frozenset(), NOW)
    assert not sign.catch_up.done


def test_only_part_of_what_is_known_is_told_apart() -> None:
    sign, peer = Sign(), Sign()
    assert not sign.heartbeat.read(ANNA, peer.heartbeat.probe(NODES[0], 1, NOW + 20), NOW + 20)

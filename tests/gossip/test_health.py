from __future__ import annotations

from dataclasses import dataclass, field

from p2pmesh.gossip.events import Health, HealthChanged
from p2pmesh.gossip.health import Healths
from p2pmesh.gossip.neighbours import Neighbours
from p2pmesh.gossip.probe import PROBE_TIMEOUT_S, Prober
from p2pmesh.identity.keys import NodeId
from tests.gossip.builders import View, accused_by, certificate_by, member_of, mesh_of
from tests.state.builders import NODES

ME, ANNA, STRANGER = NODES[0], NODES[1], NODES[7]


@dataclass
class Seen:
    """What node 0 of three sees."""

    view: View = field(default_factory=lambda: mesh_of(3))
    prober: Prober = field(default_factory=Prober)
    links: set[NodeId] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.near = Neighbours(self.view.members, self.view.shared)
        self.healths = Healths(
            self.view.members,
            self.prober,
            self.near,
            self.view.removal,
            self.links,
        )

    def link(self, node: NodeId = ANNA) -> None:
        self.links.add(node)
        self.prober.link_up(node, 0.0)
        self.healths.touch([node])

    def miss(self) -> None:
        self.prober.ask(ANNA, 1.0)
        self.healths.touch(self.prober.count({ANNA}, 1.0 + PROBE_TIMEOUT_S))


def test_a_node_is_live_for_itself() -> None:
    assert Seen().healths.of(ME) is Health.LIVE


def test_strangers_are_suspect_and_members_are_not() -> None:
    seen = Seen()
    assert seen.healths.of(STRANGER) is Health.SUSPECT
    assert seen.healths.of(ANNA) is Health.LIVE


def test_a_link_is_what_its_answers_say() -> None:
    seen = Seen()
    seen.link()
    assert seen.healths.of(ANNA) is Health.LIVE
    seen.miss()
    assert seen.healths.of(ANNA) is Health.SUSPECT


def test_a_wanted_link_that_is_not_there_is_suspect() -> None:
    seen = Seen()
    seen.near.wanted = frozenset({ANNA})
    assert seen.healths.of(ANNA) is Health.SUSPECT


def test_a_member_that_is_no_neighbour_is_suspect_while_two_miss_it() -> None:
    seen = Seen()
    seen.view.learn(accused_by(0, 1), accused_by(2, 1))
    assert seen.healths.of(ANNA) is Health.SUSPECT
    seen.view.learn(member_of(1, 2))
    assert seen.healths.of(ANNA) is Health.LIVE


def test_an_accused_neighbour_is_what_its_answers_say() -> None:
    seen = Seen()
    seen.link()
    seen.view.learn(accused_by(0, 1), accused_by(2, 1))
    assert seen.healths.of(ANNA) is Health.LIVE


def test_whoever_the_mesh_removed_is_dead_even_if_it_answers() -> None:
    seen = Seen()
    seen.link()
    seen.view.learn(certificate_by([0, 2], 1))
    assert seen.healths.of(ANNA) is Health.DEAD
    seen.view.learn(member_of(1, 2))
    assert seen.healths.of(ANNA) is Health.LIVE


def test_only_changes_are_told_and_only_once() -> None:
    seen = Seen()
    seen.link()
    assert seen.healths.changes() == [HealthChanged(node=ANNA, health=Health.LIVE)]
    seen.healths.touch([ANNA, ME])
    assert seen.healths.changes() == []
    seen.miss()
    assert seen.healths.changes() == [HealthChanged(node=ANNA, health=Health.SUSPECT)]
    assert seen.healths.changes() == []


def test_what_is_not_touched_is_not_looked_at() -> None:
    seen = Seen()
    assert seen.healths.changes() == []


def test_nothing_is_kept_of_strangers_that_are_gone() -> None:
    seen = Seen()
    seen.link(STRANGER)
    assert seen.healths.changes() == [HealthChanged(node=STRANGER, health=Health.LIVE)]
    seen.links.discard(STRANGER)
    seen.healths.touch([STRANGER])
    assert seen.healths.changes() == [HealthChanged(node=STRANGER, health=Health.SUSPECT)]
    assert seen.healths._told == {}

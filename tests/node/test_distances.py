from __future__ import annotations

from dataclasses import dataclass, field

from p2pmesh.identity.keys import NodeId
from p2pmesh.node.distances import PATIENCE_S, MeasuredDistances
from p2pmesh.state.registers import FAR_MAX

A, B = NodeId(b"a" * 16), NodeId(b"b" * 16)


@dataclass
class Trips:
    """Links with their round trips in seconds; None while they are not known."""

    known: dict[NodeId, float | None] = field(default_factory=dict)
    catching_up: bool = False

    @property
    def linked(self) -> frozenset[NodeId]:
        return frozenset(self.known)

    def rtt_s(self, node: NodeId) -> float | None:
        return self.known.get(node)


def test_a_node_that_founds_a_mesh_has_nothing_to_measure() -> None:
    found = MeasuredDistances(Trips())
    assert not found.are_measured
    found.look(0.0)
    assert (found.are_measured, found.far) == (True, ())


def test_a_newcomer_has_measured_when_every_link_has_a_round_trip() -> None:
    trips = Trips(catching_up=True)
    found = MeasuredDistances(trips)
    found.look(0.0)
    assert not found.are_measured
    trips.known, trips.catching_up = {A: 0.002, B: None}, False
    found.look(1.0)
    assert not found.are_measured
    trips.known[B] = 0.08
    found.look(2.0)
    assert (found.are_measured, found.far) == (True, ((B, 2),))
    trips.known[NodeId(b"c" * 16)] = None
    found.look(3.0)
    assert found.are_measured, "it is known once and for all"


def test_a_node_that_never_answers_is_not_waited_for() -> None:
    found = MeasuredDistances(Trips({A: None}))
    found.look(100.0)
    found.look(100.0 + PATIENCE_S - 0.1)
    assert not found.are_measured
    found.look(100.0 + PATIENCE_S)
    assert found.are_measured


def test_who_is_not_linked_any_more_is_forgotten_and_the_furthest_are_told() -> None:
    trips = Trips({A: 0.5, B: 0.02})
    found = MeasuredDistances(trips)
    found.look(0.0)
    assert found.far == ((A, 3), (B, 1))
    trips.known = {NodeId(bytes([n]) * 16): 0.05 + 0.2 * (n % 2) for n in range(2 * FAR_MAX)}
    found.look(1.0)
    assert len(found.far) == FAR_MAX
    assert {link for _, link in found.far} == {3}
    assert list(found.far) == sorted(found.far)

from __future__ import annotations

import pytest

from p2pmesh.gossip.members import Members
from p2pmesh.gossip.neighbours import Neighbours
from p2pmesh.gossip.overlay import RINGS, Overlay
from p2pmesh.gossip.shared import Shared
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.state.document import Document
from p2pmesh.wire.records import Record
from p2pmesh.wire.registers import MEMBER
from tests.gossip.builders import HERE, STARTED, certificate_by, member_of, mesh_of
from tests.state.builders import MESH, NODES, NOW, member, sealed

NOBODY: frozenset[NodeId] = frozenset()


def crowd(count: int) -> list[Record]:
    """The `member` records of so many nodes."""
    body = member(addresses=(HERE,)).to_wire()
    keys = [SigningKey(bytes([number]) * 32) for number in range(count)]
    return [sealed(key, MEMBER, epoch=STARTED, body=body) for key in keys]


def test_before_it_is_worked_out_there_is_nobody() -> None:
    near = Neighbours(mesh_of(3).members, Shared())
    assert near.wanted == near.eager == near.subjects == near.observers == NOBODY


def test_in_a_small_mesh_everybody_is_near() -> None:
    view = mesh_of(1)
    near = Neighbours(view.members, view.shared)
    view.learn(member_of(1), member_of(2))
    others = frozenset(NODES[1:3])
    assert near.update(NOBODY) == others
    assert near.wanted == near.eager == near.subjects == near.observers == others
    assert near.near(NODES[1]) == {NODES[0], NODES[2]}


def test_without_a_change_nothing_is_worked_out() -> None:
    made: list[Overlay] = []

    def overlay(members: frozenset[tuple[NodeId, bool]], like: Overlay | None) -> Overlay:
        made.append(Overlay(members, like))
        return made[-1]

    view = mesh_of(1)
    near = Neighbours(view.members, Shared(overlay=overlay))
    view.learn(member_of(1))
    assert near.update(NOBODY)
    view.learn(member_of(1, 2))
    assert near.update(NOBODY) == NOBODY
    assert len(made) == 2


def test_those_who_are_gone_are_told_as_well() -> None:
    view = mesh_of(1)
    near = Neighbours(view.members, view.shared)
    view.learn(member_of(1), member_of(2))
    near.update(NOBODY)
    view.learn(certificate_by([0, 2], 1))
    assert near.update(NOBODY) == frozenset(NODES[1:3])
    assert near.wanted == {NODES[2]}


def test_who_is_removed_and_looked_for_all_the_same_is_observed() -> None:
    view = mesh_of(1)
    near = Neighbours(view.members, view.shared)
    view.learn(member_of(1), member_of(2), certificate_by([2], 1))
    near.update(NOBODY)
    assert NODES[1] not in near.subjects
    assert near.update(NOBODY, frozenset({NODES[1]})) == frozenset(NODES[1:3])
    assert near.subjects == near.wanted == frozenset(NODES[1:3])
    assert near.observers == {NODES[2]}


@pytest.mark.parametrize("skipped", [0, 30])
def test_all_nodes_see_the_same_pairs(skipped: int) -> None:
    document, shared = Document(MESH), Shared()
    for record in crowd(60):
        document.merge(record, NOW)
    members = list(document.owners)
    skip = frozenset(members[:skipped])
    all_members = {node: Members(node, document, {}, shared) for node in members}
    near = {node: Neighbours(members, Shared()) for node, members in all_members.items()}
    for node, one in near.items():
        all_members[node].refresh(members)
        one.update(skip)
    for node, one in near.items():
        assert node not in one.wanted | one.subjects | one.observers
        assert one.eager <= one.near(node) <= one.wanted | one.observers
        assert one.subjects == {other for other in members if node in near[other].observers}
        assert one.subjects <= one.wanted, "whoever is watched over is linked with"
        assert len(one.observers) == RINGS
        assert not one.observers & skip
        assert all(node in near[other].eager for other in one.eager)

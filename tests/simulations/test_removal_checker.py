from __future__ import annotations

import pytest

from p2pmesh.gossip.events import Publish
from p2pmesh.wire.evidence import Accusation, accused_to_wire, make_certificate
from p2pmesh.wire.registers import ACCUSED, MEMBER
from simulations.node import NOBODY, Handled, Node
from simulations.removal_checker import Justice, quorum
from simulations.schedule import ViolationError
from simulations.world import World
from tests.simulations.meshes import settled


def judged(size: int = 5) -> tuple[World, Justice]:
    world = settled(size)
    justice = Justice(world)
    world.readers.append(justice)
    return world, justice


def accusation(node: Node, subject: Node) -> Publish:
    assert node.core is not None
    member = node.core.document.get(subject.id, MEMBER)
    assert member is not None
    row = Accusation(subject.id, member.epoch, member.seq)
    return Publish(register=ACCUSED, body=accused_to_wire([row]))


def remove(world: World, accusers: list[Node], subject: Node) -> Handled:
    """Have the first node hold a certificate, whatever its core thinks of it."""
    holder = world.nodes[0]
    for one in accusers:
        one.hostile = True  # it may lie
        one.tell(accusation(one, subject))
    assert holder.core is not None
    document = holder.core.document
    member = document.get(subject.id, MEMBER)
    records = []
    for one in accusers:
        assert one.core is not None
        record = one.core.document.get(one.id, ACCUSED)
        assert record is not None
        records.append(record)
    assert member is not None
    row = Accusation(subject.id, member.epoch, member.seq)
    assert document.merge(make_certificate(row, records), holder.clock())
    return Handled(holder, None, holder.clock(), [], frozenset({subject.id}))


def test_the_count_is_the_one_that_is_promised() -> None:
    assert [quorum(n) for n in range(7)] == [1, 1, 2, 3, 3, 4, 5]


def test_an_honest_node_accuses_nobody_whom_it_could_talk_to() -> None:
    world, _ = judged()
    with pytest.raises(ViolationError, match="could talk to all the time"):
        world.nodes[0].tell(accusation(world.nodes[0], world.nodes[1]))


def test_who_was_just_frozen_may_be_accused() -> None:
    world, _ = judged()
    world.nodes[1].freeze()
    world.run(8)
    assert world.nodes[0].core is not None
    assert world.nodes[1].id in world.nodes[0].core.removed


def test_a_certificate_needs_as_many_accusers_as_there_were_witnesses() -> None:
    world, justice = judged()
    step = remove(world, [world.nodes[1], world.nodes[2]], world.nodes[4])
    with pytest.raises(ViolationError, match="on the word of 2, where 3 are needed"):
        justice.handled(step)


def test_who_was_there_all_the_time_was_wronged() -> None:
    world, justice = judged()
    step = remove(world, world.nodes[1:4], world.nodes[4])
    for liar in world.nodes[1:4]:
        liar.hostile = False  # they erred in good faith
    justice.handled(step)
    assert len(justice.wronged) == 1
    justice.handled(step)
    assert len(justice.wronged) == 1


def test_only_a_later_version_takes_a_removal_back() -> None:
    world, justice = judged()
    step = remove(world, world.nodes[1:4], world.nodes[4])
    justice.handled(step)
    holder = world.nodes[0]
    assert holder.core is not None
    document = holder.core.document
    del document._certificates[world.nodes[4].id]
    with pytest.raises(ViolationError, match="takes back the removal"):
        justice.handled(step)


def test_what_says_nothing_is_not_judged() -> None:
    world, justice = judged()
    justice.handled(Handled(world.nodes[0], None, 0, [], NOBODY))
    assert justice.wronged == []

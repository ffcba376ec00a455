from __future__ import annotations

import pytest

from p2pmesh.wire.registers import MEMBER
from simulations.convergence import Gap, counts_on, unsettled
from simulations.world import World
from tests.simulations.meshes import settled


def gaps(world: World) -> set[Gap]:
    return {gap for gap, _ in unsettled(world)}


def test_a_mesh_at_rest_has_none() -> None:
    assert gaps(settled()) == set()


def test_a_dead_node_is_a_ghost_until_it_is_removed() -> None:
    world = settled()
    dead = world.nodes[3]
    dead.cut_power()
    assert gaps(world) == {Gap.GHOST}
    world.run(6)
    assert gaps(world) == set()
    assert world.nodes[0].core is not None
    assert not counts_on(world.nodes[0].core, dead.id)


def test_a_new_life_is_unknown_at_first() -> None:
    world = settled()
    world.nodes[3].kill()
    world.nodes[3].start()
    assert {Gap.STATE, Gap.ABSENT} <= gaps(world)


def test_twins_are_seen() -> None:
    world = settled()
    world.add(twin_of=world.nodes[0]).start()
    assert Gap.TWINS in gaps(world)


def test_a_fork_needs_a_proof() -> None:
    world = settled()
    world.forked[world.nodes[1].id] = world.schedule.now
    assert gaps(world) == {Gap.FORKED}
    world.run(30)
    assert gaps(world) == set()


def test_what_somebody_says_has_to_be_known_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    world = settled()
    core = world.nodes[1].core
    assert core is not None
    registers = core.document.registers
    monkeypatch.setattr(
        core.document,
        "registers",
        lambda owner: tuple(one for one in registers(owner) if one.register != MEMBER),
    )
    assert gaps(world) == {Gap.LOST}

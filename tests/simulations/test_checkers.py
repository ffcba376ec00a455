"""The checkers on steps made by hand; `test_planted.py` shows that they find bugs of the core."""

from __future__ import annotations

from typing import Any

import pytest

from p2pmesh.gossip.events import PersistEpoch, Send, SetTimer
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import Record, seal
from p2pmesh.wire.registers import CAPS
from simulations.bodies import caps
from simulations.checkers import TIMERS_MAX, Safety
from simulations.machine import START_S
from simulations.node import NOBODY, Handled, Node
from simulations.schedule import ViolationError
from simulations.world import MESH, World


def watched(size: int = 3) -> tuple[World, Safety]:
    world = World(1, size)
    safety = Safety(world)
    world.watchers.append(safety)
    world.start_all()
    world.run(5)
    return world, safety


def signed(node: Node, **changes: Any) -> Record:
    arguments: dict[str, Any] = {
        "mesh": MESH,
        "register": CAPS,
        "epoch": node.disk.epoch,
        "seq": 99,
        "instance": 1,
        "issued_at": START_S,
        "ttl_s": 60,
        "body": caps(1).body,
    }
    return seal(node.key, **{**arguments, **changes})


def step(node: Node, *outs: Any, changed: frozenset[Any] = NOBODY) -> Handled:
    return Handled(node, None if not node.core else PUBLISHED, node.clock(), list(outs), changed)


PUBLISHED = caps(1)


@pytest.mark.parametrize(
    ("out", "complaint"),
    [
        (PersistEpoch(epoch=1), "goes from epoch"),
        (SetTimer(after_s=0, token="x"), "never lets time pass"),
    ],
)
def test_what_goes_out_is_checked(out: Any, complaint: str) -> None:
    world, safety = watched()
    with pytest.raises(ViolationError, match=complaint):
        safety.handled(step(world.nodes[0], out))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"issued_at": START_S - 3600}, "which has run out"),
        ({"epoch": START_S * 2, "instance": 0}, "before it is on disk"),
    ],
)
def test_records_that_go_out_are_checked(changes: dict[str, Any], complaint: str) -> None:
    world, safety = watched()
    node = world.nodes[0]
    if "instance" in changes:
        changes["instance"] = node.instance
    facts = Push(records=(signed(node, **changes).raw,))
    with pytest.raises(ViolationError, match=complaint):
        safety.handled(step(node, Send(node=world.nodes[1].id, message=facts)))


def test_a_record_that_nobody_signed_is_not_passed_on() -> None:
    world, safety = watched()
    raw = signed(world.nodes[1]).raw
    facts = Push(records=(bytes(64) + raw[64:],))
    with pytest.raises(ViolationError, match="nobody signed"):
        safety.handled(step(world.nodes[0], Send(node=world.nodes[2].id, message=facts)))


def test_a_record_that_its_owner_never_wrote_is_not_believed() -> None:
    world, safety = watched()
    node, other = world.nodes[:2]
    assert node.core is not None
    assert node.core.document.merge(signed(other), node.clock())
    with pytest.raises(ViolationError, match="never wrote"):
        safety.handled(step(node, changed=frozenset({other.id})))


def test_a_change_has_to_be_told() -> None:
    world, safety = watched()
    node, other = world.nodes[:2]
    assert node.core is not None
    assert node.core.document.merge(signed(other), node.clock())
    with pytest.raises(ViolationError, match="without a word"):
        safety.handled(step(node))


def test_timers_are_counted() -> None:
    world, safety = watched()
    node = world.nodes[0]
    node.timers = TIMERS_MAX + 1
    with pytest.raises(ViolationError, match="timers under way"):
        safety.handled(step(node))


def test_of_a_large_mesh_a_few_nodes_are_followed() -> None:
    world, safety = watched(40)
    node = world.nodes[1]
    safety.handled(step(node, SetTimer(after_s=0, token="x")))
    with pytest.raises(ViolationError, match="lets time pass"):
        safety.handled(step(world.nodes[5], SetTimer(after_s=0, token="x")))

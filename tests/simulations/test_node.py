from __future__ import annotations

from itertools import pairwise

import pytest

from p2pmesh.gossip.events import Event, TimerFired
from p2pmesh.state.registers import Member
from p2pmesh.wire.registers import MEMBER
from simulations.convergence import unsettled
from simulations.faults import Stage, crash, roam, twin
from simulations.machine import START_S
from simulations.node import Disk, Handled, Node
from simulations.world import World


class Diary:
    """When each node was told what."""

    def __init__(self, world: World) -> None:
        self.told: list[tuple[float, Node, Event | None]] = []
        self._world = world
        world.watchers.append(self)

    def handled(self, step: Handled) -> None:
        self.told.append((self._world.schedule.now, step.node, step.event))

    def ticks(self, node: Node) -> list[float]:
        return [
            at for at, who, what in self.told if who is node and what == TimerFired(token="tick")
        ]


def settled(size: int = 3) -> World:
    world = World(1, size)
    world.start_all()
    world.run(10)
    assert list(unsettled(world)) == []
    return world


def test_a_frozen_process_is_late_and_a_sleeping_machine_loses_the_time() -> None:
    world = settled()
    diary = Diary(world)
    frozen, asleep, awake = world.nodes
    world.run(0.5)
    frozen.freeze()
    asleep.suspend()
    world.run(20)
    assert diary.ticks(frozen) == diary.ticks(asleep) == []
    assert len(diary.ticks(awake)) == 20
    frozen.resume()
    asleep.resume()
    assert (world.schedule.now, diary.ticks(frozen)) == (30.5, [])
    world.run(0.6)
    assert diary.ticks(frozen)[0] == 30.5
    assert diary.ticks(asleep)[0] == 31.0  # half a second was left when the lid closed
    world.run(40)
    assert list(unsettled(world)) == []


def test_a_process_reads_its_clock_once() -> None:
    world = settled()
    node = world.nodes[0]
    before = node.clock()
    node.jump_clock(-20)
    assert node.clock() == before
    node.kill()
    node.disk = Disk()
    node.start()
    assert node.clock() == START_S + world.schedule.now - 20
    assert node.disk.epoch == START_S - 10


def test_a_slow_node_gets_to_everything_late_and_in_order() -> None:
    world = settled()
    diary = Diary(world)
    slow = world.nodes[0]
    slow.slow_down(0.3)
    world.run(10)
    at = diary.ticks(slow)
    assert [later - earlier for earlier, later in pairwise(at)] == pytest.approx([1.3] * 6)
    assert list(unsettled(world)) == []
    slow.slow_down(0)
    world.run(10)
    assert len(diary.ticks(slow)) == len(at) + 10
    assert list(unsettled(world)) == []


def test_epochs_grow_with_every_start_on_a_kept_disk() -> None:
    world = settled()
    node = world.nodes[0]
    first = node.disk.epoch
    for _ in range(2):
        node.kill()
        node.start()
    assert node.disk.epoch > first + 1


def test_who_is_killed_or_loses_power_is_removed() -> None:
    for how, after_s in (("kill", 5), ("power", 5)):
        world = settled()
        crash(Stage(world), how=how)
        world.run(after_s)
        assert list(unsettled(world)) == []
        assert len(world.went_down) == 1


def test_who_comes_to_another_network_is_found_there() -> None:
    world = settled()
    roam(Stage(world))
    world.run(40)
    assert list(unsettled(world)) == []
    moved = next(node for node in world.nodes if not node.address.host.startswith("10.0."))
    for node in world.nodes:
        assert node.core is not None
        record = node.core.document.get(moved.id, MEMBER)
        assert record is not None
        assert Member.from_wire(record.body).addresses == (moved.address,)


def test_of_two_with_one_key_one_gives_way() -> None:
    world = settled()
    twin(Stage(world))
    assert len(world.honest) == 4
    world.run(45.5)
    assert len(world.honest) == 3
    assert list(unsettled(world)) == []

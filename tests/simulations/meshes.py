"""A small simulated mesh for tests of the simulation's own parts."""

from __future__ import annotations

from simulations.convergence import unsettled
from simulations.faults import Stage
from simulations.node import Handled
from simulations.world import World


def settled(size: int = 4, *, hostile: int = 0, seconds: float = 20) -> World:
    """A mesh that has run for a while and in which nothing is open."""
    world = World(1, size)
    for node in world.nodes[size - hostile :]:
        node.hostile = True
    world.start_all()
    world.run(seconds)
    assert list(unsettled(world)) == []
    return world


def staged(size: int = 4, *, hostile: int = 0, seconds: float = 20) -> Stage:
    """The same, ready for faults."""
    return Stage(settled(size, hostile=hostile, seconds=seconds))


class Steps:
    """A watcher that keeps all that it sees."""

    def __init__(self) -> None:
        self.seen: list[Handled] = []

    def handled(self, step: Handled) -> None:
        self.seen.append(step)

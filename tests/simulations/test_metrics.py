from __future__ import annotations

import pytest

from simulations.bodies import caps
from simulations.convergence import Gap
from simulations.hosts import Cut
from simulations.metrics import CatchUp, Idle, Removals, Spread, percentile
from tests.simulations.meshes import settled


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([], 99) == 0
    assert percentile([3, 1, 2], 50) == 2
    assert percentile(range(1, 101), 99) == 100


def test_an_update_takes_until_the_last_node_has_it() -> None:
    world = settled()
    spread = Spread(world)
    world.readers.append(spread)
    node = world.nodes[0]
    spread.publish(node, caps(77))
    assert spread.lost == 1
    world.run(1)
    farthest = max(world.network.one_way_s(0, other) for other in (1, 2, 3))
    assert spread.lost == 0
    assert spread.latencies_s == [pytest.approx(farthest + 0.001, abs=0.002)]
    spread.publish(node, caps(77))  # says nothing new
    assert spread.lost == 0


def test_an_update_of_or_for_the_dead_is_not_waited_for() -> None:
    world = settled()
    spread = Spread(world)
    world.network.cuts.append(Cut(frozenset({0}), frozenset({1, 2, 3})))
    spread.publish(world.nodes[0], caps(77))
    assert spread.lost == 1
    world.nodes[0].kill()
    assert spread.lost == 0


def test_a_removal_takes_until_nobody_counts_on_the_dead() -> None:
    world = settled()
    removals = Removals(world)
    world.readers.append(removals)
    world.nodes[3].cut_power()
    assert removals.pending == 1
    world.run(6)
    assert removals.pending == 0
    (latency_s,) = removals.latencies_s
    assert 2 < latency_s < 5


def test_who_comes_back_is_not_waited_for() -> None:
    world = settled()
    removals = Removals(world)
    world.readers.append(removals)
    world.nodes[3].kill()
    assert removals.pending == 1
    world.nodes[3].start()
    world.run(6)
    assert (removals.pending, removals.latencies_s) == (0, [])


def test_who_went_down_meanwhile_counts_on_nobody() -> None:
    world = settled()
    removals = Removals(world)
    world.readers.append(removals)
    world.nodes[3].cut_power()
    world.nodes[2].kill()
    world.nodes[2].start()
    world.nodes[2].kill()
    world.run(1)
    world.nodes[2].start()
    assert removals.pending == 1
    world.run(6)
    assert removals.pending == 0


def test_settling_ends_once() -> None:
    world = settled()
    world.nodes[3].cut_power()
    took: list[float] = []
    CatchUp(world, took.append)
    CatchUp(world, took.append, frozenset({Gap.GHOST}))
    assert took == [0]
    world.run(10)
    assert len(took) == 2
    assert took[1] > 2


def test_idle_bytes_are_those_since_it_began() -> None:
    world = settled()
    idle = Idle(world)
    world.run(10)
    mean, largest = idle.kb_per_s()
    sent = sum(one.sent_bytes for one in world.network.traffic.values())
    assert 0 < mean <= largest
    assert mean * 10 * 1000 * 4 < sent

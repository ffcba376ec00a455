from __future__ import annotations

import pytest

from simulations.convergence import unsettled
from simulations.faults import (
    FAULTS,
    clock,
    clog,
    crash,
    disk_full,
    flip_flop,
    freeze,
    join,
    knob,
    lose,
    partition,
    reset,
    restart_all,
    roam,
    slow,
    suspend,
    twin,
)
from tests.simulations.meshes import staged


def test_every_fault_has_its_name() -> None:
    assert set(FAULTS) == {
        "knob",
        "partition",
        "flip_flop",
        "clog",
        "lose",
        "reset",
        "crash",
        "restart_all",
        "join",
        "freeze",
        "suspend",
        "slow",
        "disk_full",
        "clock",
        "roam",
        "twin",
    }


def test_somebody_always_stays_awake() -> None:
    stage = staged()
    crash(stage, share=1.0)
    assert len(stage.world.honest) == 1
    crash(stage, count=5)
    assert len(stage.world.honest) == 1


def test_a_crash_may_end_with_another_disk() -> None:
    stage = staged()
    before = {node.number: node.disk.epoch for node in stage.world.nodes}
    crash(stage, count=1, how="power", for_s=2, disk="lost")
    (down,) = stage.world.down
    stage.world.run(1)
    assert not down.powered
    stage.world.run(20.5)
    assert down.core is not None
    assert down.disk.epoch > before[down.number]
    assert list(unsettled(stage.world)) == []


def test_a_knob_turns_back() -> None:
    stage = staged()
    knob(stage, name="drop", value=0.5, for_s=1)
    assert stage.world.network.conditions.drop == 0.5
    stage.world.run(1)
    assert stage.world.network.conditions.calm


@pytest.mark.parametrize(("one_way", "cuts"), [(True, 1), (False, 2)])
def test_a_partition_cuts_in_one_direction_or_both(*, one_way: bool, cuts: int) -> None:
    stage = staged()
    partition(stage, one_way=one_way, for_s=3)
    assert len(stage.world.network.cuts) == cuts
    stage.world.run(3)
    assert stage.world.network.cuts == []


def test_flip_flops_come_and_go_until_all_is_healed() -> None:
    stage = staged()
    flip_flop(stage, period_s=5, times=3)
    seen = []
    for _ in range(6):
        stage.world.run(4.9)
        seen.append(len(stage.world.network.cuts))
        stage.world.run(0.1)
    assert seen == [1, 0, 1, 0, 1, 0]
    flip_flop(stage, period_s=5, times=3)
    stage.heal()
    stage.world.run(11)
    assert stage.world.network.cuts == []


def test_single_connections_clog_fall_silent_or_break() -> None:
    stage = staged()
    before = {id(end) for node in stage.world.nodes for end in node.links.ends.values()}
    clog(stage, count=3, for_s=0.5)
    assert len(stage.world.network.cuts) == 6
    stage.world.run(0.5)
    assert stage.world.network.cuts == []
    lose(stage, count=3)
    reset(stage, count=3)
    stage.world.run(13)
    after = {id(end) for node in stage.world.nodes for end in node.links.ends.values()}
    assert not after >= before
    assert list(unsettled(stage.world)) == []


def test_who_has_to_write_to_a_full_disk_gives_up_until_there_is_room() -> None:
    stage = staged()
    disk_full(stage, count=3, for_s=20)
    full = [node for node in stage.world.nodes if node.disk_full]
    crash(stage, count=4, for_s=2, disk="lost")
    stage.world.run(5)
    down = [node for node in full if node.core is None]
    assert down
    assert all(node.gave_up for node in down)
    stage.world.run(30.5)
    assert all(node.core is not None for node in stage.world.nodes)
    assert list(unsettled(stage.world)) == []


def test_machines_stand_still_and_go_on() -> None:
    stage = staged()
    freeze(stage, for_s=2)
    suspend(stage, for_s=2)
    slow(stage, lag_s=0.2, for_s=2)
    assert sum(node.awake for node in stage.world.nodes) == 2
    assert sum(node.lag_s > 0 for node in stage.world.nodes) == 1
    stage.world.run(2)
    assert all(node.awake and not node.lag_s for node in stage.world.nodes)


def test_a_new_clock_counts_from_a_new_start() -> None:
    stage = staged()
    clock(stage, seconds=-20, restart=True)
    stage.world.run(1)
    (node,) = (one for one in stage.world.nodes if one.offset_s)
    assert node.clock() < stage.world.nodes[node.number - 1].clock() - 19
    stage.world.run(20.5)
    assert list(unsettled(stage.world)) == []


def test_healing_undoes_everything_but_deaths() -> None:
    stage = staged(6)
    crash(stage)
    crash(stage, for_s=100)
    freeze(stage, for_s=100)
    slow(stage, lag_s=0.1)
    knob(stage, name="loss", value=0.1)
    partition(stage)
    stage.heal()
    assert stage.world.network.conditions.calm
    assert stage.world.network.cuts == []
    assert len(stage.world.honest) == 5
    assert all(node.awake and not node.lag_s for node in stage.world.honest)


def test_who_has_met_only_nodes_that_are_gone_is_invited_anew() -> None:
    stage = staged()
    first, second = stage.world.nodes[:2]
    first.kill()
    second.kill()
    stage.world.run(10)
    join(stage)
    newcomer = stage.world.nodes[-1]
    newcomer.kill()
    newcomer.seeds = (first.address, second.address)
    newcomer.start()
    stage.world.run(5)
    assert list(unsettled(stage.world))
    stage.heal()
    stage.world.run(10)
    assert list(unsettled(stage.world)) == []


def test_newcomers_and_those_who_move_and_come_back_are_found() -> None:
    stage = staged()
    join(stage, count=2)
    roam(stage)
    stage.world.run(40)
    assert len(stage.world.honest) == 6
    assert list(unsettled(stage.world)) == []
    restart_all(stage)
    assert stage.world.honest == []
    stage.world.run(30)
    assert len(stage.world.honest) == 6
    assert list(unsettled(stage.world)) == []


@pytest.mark.parametrize("same_second", [False, True])
def test_a_twin_has_the_key_and_the_disk(*, same_second: bool) -> None:
    stage = staged()
    twin(stage, same_second=same_second)
    copy = stage.world.nodes[-1]
    (original,) = (node for node in stage.world.nodes[:-1] if node.id == copy.id)
    assert copy.core is not None
    assert original.core is not None
    assert (copy.disk.epoch == original.disk.epoch) == same_second

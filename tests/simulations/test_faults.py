from __future__ import annotations

import pytest

from simulations.faults import (
    FAULTS,
    clock,
    crash,
    flip_flop,
    freeze,
    join,
    knob,
    partition,
    restart_all,
    roam,
    slow,
    suspend,
    twin,
)
from simulations.gaps import unsettled
from tests.simulations.meshes import staged


def test_every_fault_has_its_name() -> None:
    assert set(FAULTS) == {
        "knob",
        "partition",
        "flip_flop",
        "crash",
        "restart_all",
        "join",
        "freeze",
        "suspend",
        "slow",
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
    stage.world.run(20)
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
    stage.world.run(20)
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

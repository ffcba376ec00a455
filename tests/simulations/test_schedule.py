from __future__ import annotations

from simulations.schedule import Schedule, branch


def test_equal_times_keep_their_order() -> None:
    schedule, seen = Schedule(), list[int]()
    for number in range(5):
        schedule.after(1, seen.append, number)
    schedule.run(1)
    assert seen == [0, 1, 2, 3, 4]
    assert (schedule.now, schedule.steps) == (1, 5)


def test_what_is_due_later_waits() -> None:
    schedule, seen = Schedule(), list[float]()
    schedule.after(2, lambda: seen.append(schedule.now))
    schedule.run(1.5)
    assert (schedule.now, seen) == (1.5, [])
    schedule.run(3)
    assert (schedule.now, seen) == (3, [2])


def test_branches_of_chance_do_not_touch_each_other() -> None:
    assert branch(1, "x").random() == branch(1, "x").random()
    assert len({branch(1, "x").random(), branch(1, "y").random(), branch(2, "x").random()}) == 3

from __future__ import annotations

from simulations.machine import START_S, Machine
from simulations.network import Network
from simulations.schedule import Schedule


class Clockwork(Machine):
    """A machine whose process only notes when its timers ring."""

    def __init__(self) -> None:
        self.schedule = Schedule()
        self.rang: list[tuple[float, str]] = []
        self.running = True
        super().__init__(0, self.schedule, Network(self.schedule, 1))

    @property
    def listening(self) -> bool:
        return self.running

    def ring(self, token: str) -> None:
        self.rang.append((self.schedule.now, token))


def test_timers_stand_still_in_suspend_and_the_clock_does_not() -> None:
    machine = Clockwork()
    machine.set_timer(2, "a")
    machine.schedule.run(1)
    machine.suspend()
    machine.schedule.run(11)
    machine.resume()
    machine.schedule.run(20)
    assert machine.rang == [(12, "a")]
    assert machine.clock() == START_S + 20


def test_a_frozen_process_hears_of_its_timers_when_it_goes_on() -> None:
    machine = Clockwork()
    machine.set_timer(2, "a")
    machine.freeze()
    machine.schedule.run(10)
    assert machine.rang == []
    machine.resume()
    machine.schedule.run(11)
    assert machine.rang == [(10, "a")]


def test_timers_end_with_their_process() -> None:
    machine = Clockwork()
    machine.set_timer(2, "a")
    machine.halt()
    machine.boot(7)
    machine.schedule.run(10)
    assert (machine.rang, machine.timers) == ([], 0)


def test_what_is_to_be_done_waits_for_a_slow_process_in_order() -> None:
    machine, done = Clockwork(), list[tuple[float, int]]()
    machine.slow_down(0.5)
    machine.once_awake(lambda: done.append((machine.schedule.now, 1)))
    machine.slow_down(0)
    machine.once_awake(lambda: done.append((machine.schedule.now, 2)))
    machine.schedule.run(1)
    machine.once_awake(lambda: done.append((machine.schedule.now, 3)))
    assert done == [(0.5, 1), (0.5, 2), (1, 3)]


def test_a_clock_that_is_set_counts_from_the_next_start() -> None:
    machine = Clockwork()
    machine.jump_clock(-30)
    assert machine.clock() == START_S
    machine.boot(1)
    assert machine.clock() == START_S - 30

"""One simulated machine: its power, its clocks, its timers, and a process that may stand still.

A process reads the time once and then goes by a clock that nobody sets and that goes on while the
machine sleeps, as `p2pmesh.node.clocks` does; its timers do not run while it sleeps, as trio's.
It knows nothing of what the process does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from simulations.network import Network
from simulations.schedule import Schedule

START_S = 1_800_000_000  # unix time at the start of every run


class Machine(ABC):
    """A machine with at most one process: whether it runs, and what a timer does, is its own.

    Args:
        number: Tells machines apart.
        schedule: The heap.
        network: Told when the process can take what its kernel kept.
    """

    def __init__(self, number: int, schedule: Schedule, network: Network) -> None:
        self.number = number
        self.instance = 0  # of the process; drawn anew for each
        self.powered = True
        self.frozen = False
        self.offset_s = 0.0  # what its clock says more than the true time
        self.lag_s = 0.0  # how late its process gets to everything
        self.steady_since = 0.0  # when something was last done to it
        self.timers = 0  # under way
        self._schedule, self._network = schedule, network
        self._started_offset_s = 0.0
        self._slept_s = 0.0
        self._suspended_at = 0.0
        self._busy_until = 0.0
        self._kept: list[Callable[[], None]] = []

    @property
    @abstractmethod
    def listening(self) -> bool:
        """See `Host`; also whether there is a process."""

    @property
    def awake(self) -> bool:
        """See `Host`."""
        return self.listening and self.powered and not self.frozen

    def clock(self) -> float:
        """The unix time that the process goes by."""
        return START_S + self._schedule.now + self._started_offset_s

    # --- what happens to it -----------------------------------------------------------------------

    def freeze(self) -> None:
        """Stop the process; its kernel goes on taking what comes."""
        self.touch()
        self.frozen = True

    def suspend(self) -> None:
        """Close the lid: nothing runs, and no timer either."""
        self.touch()
        self.powered, self._suspended_at = False, self._schedule.now

    def resume(self) -> None:
        """Undo `freeze` or `suspend`."""
        self.touch()
        if not self.powered:
            self._slept_s += self._schedule.now - self._suspended_at
        self.powered, self.frozen = True, False
        kept, self._kept = self._kept, []
        for action in kept:
            self._schedule.after(0, action)
        self._network.wake(self.number)

    def slow_down(self, lag_s: float) -> None:
        """Have its process get to everything so much later."""
        self.touch()
        self.lag_s = lag_s

    def jump_clock(self, offset_s: float) -> None:
        """Set its clock so far ahead of the true time; a process that runs does not notice."""
        self.touch()
        self.offset_s = offset_s

    def touch(self) -> None:
        """Something is being done to it: what others think of it now may be wrong for a while."""
        self.steady_since = self._schedule.now

    # --- its process ------------------------------------------------------------------------------

    def boot(self, instance: int) -> None:
        """A process starts."""
        self.powered, self.frozen, self._started_offset_s = True, False, self.offset_s
        self.instance = instance
        self.touch()

    def halt(self) -> None:
        """The process is gone."""
        self.touch()
        self.frozen, self.timers = False, 0
        self._kept.clear()
        self._network.wake(self.number)

    def once_awake(self, action: Callable[[], None]) -> None:
        """Call `action` as soon as the process gets to it; never if it ends before."""
        if not self.awake:
            self._kept.append(action)
        elif self.lag_s or self._busy_until > self._schedule.now:
            self._busy_until = max(self._busy_until, self._schedule.now + self.lag_s)
            self._schedule.after(
                self._busy_until - self._schedule.now, self._late, action, self.instance
            )
        else:
            action()

    def set_timer(self, after_s: float, token: str) -> None:
        """Have `ring(token)` called after that time in which the machine did not sleep."""
        self.timers += 1
        self._schedule.after(after_s, self._due, token, self.instance, self._slept_s)

    @abstractmethod
    def ring(self, token: str) -> None:
        """A timer of the process ran out."""

    def _late(self, action: Callable[[], None], instance: int) -> None:
        if instance != self.instance or not self.listening:
            return
        if self.awake:
            action()
        else:
            self._kept.append(action)

    def _due(self, token: str, instance: int, slept_s: float) -> None:
        if instance != self.instance or not self.listening:
            return
        if not self.powered:
            left_s = max(0.0, self._schedule.now - self._suspended_at)
            self._kept.append(lambda: self._again(token, instance, left_s))
        elif self._slept_s > slept_s:
            late_s = self._slept_s - slept_s
            self._schedule.after(late_s, self._due, token, instance, self._slept_s)
        elif self.frozen:
            self._kept.append(lambda: self._due(token, instance, slept_s))
        else:
            self.timers -= 1
            self.ring(token)

    def _again(self, token: str, instance: int, left_s: float) -> None:
        self._schedule.after(left_s, self._due, token, instance, self._slept_s)

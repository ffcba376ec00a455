"""This machine's clock: how a node reads it, and whether the others say that it is wrong.

Unix time is read once, at the start; from then on it goes by a clock that nobody sets and that
goes on while the machine sleeps. So a leap of the system's clock does not age every lease in the
mesh, and an hour of suspend is an hour:

    Linux              CLOCK_BOOTTIME counts suspend
    macOS              CLOCK_MONOTONIC does; Python's `time.monotonic` there does not
    Windows            `time.monotonic` does
    elsewhere          `time.monotonic`: where it stops in suspend, a node that wakes up is behind
                       by as much, finds that out by its probes, and is told at the next start

Small differences between nodes are mesh time's affair; a large one is the user's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from statistics import median_low

from p2pmesh.errors import LocalError
from p2pmesh.identity.hello import CLOCK_SKEW_S_MAX


def passing_s() -> float:
    """Seconds of a clock that nobody sets and that goes on in suspend; its start means nothing."""
    if sys.platform == "linux":
        clock = time.CLOCK_BOOTTIME
    elif sys.platform == "darwin":
        clock = time.CLOCK_MONOTONIC
    else:
        return time.monotonic()
    return time.clock_gettime(clock)


class SteadyClock:
    """Unix time as it was at the start, going on at an even pace.

    Args:
        wall: Unix time in seconds, read once.
        passing: Seconds of a steady clock.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, passing: Callable[[], float] = passing_s
    ) -> None:
        self._passing = passing
        self._ahead_s = wall() - passing()

    def __call__(self) -> float:
        """Unix time in seconds."""
        return self._passing() + self._ahead_s


def check_clock(ahead_s: Collection[int]) -> None:
    """Refuse to take part with a clock that nobody else has.

    One peer's word is enough where there is no other. Of several more than half have to agree
    with each other: those who do not know the time themselves turn nobody away.

    Args:
        ahead_s: What peers' clocks said more than this one, in seconds.

    Raises:
        LocalError: Theirs and this one differ by more than a minute.
    """
    if not ahead_s:
        return
    middle_s = median_low(ahead_s)
    agreeing = sum(abs(one_s - middle_s) <= CLOCK_SKEW_S_MAX for one_s in ahead_s)
    if abs(middle_s) <= CLOCK_SKEW_S_MAX or 2 * agreeing <= len(ahead_s):
        return
    hours, minutes = abs(middle_s) // 3600, abs(middle_s) // 60 % 60
    away = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
    side = "behind" if middle_s > 0 else "ahead of"
    raise LocalError(f"This clock is {away} {side} the mesh; set it and start again")

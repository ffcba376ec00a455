from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from p2pmesh.errors import LocalError
from p2pmesh.identity.hello import CLOCK_SKEW_S_MAX
from p2pmesh.node.clocks import SteadyClock, check_clock, passing_s

HOUR_S = 3600


class Machine:
    """A system's clock and one that only passes."""

    def __init__(self) -> None:
        self.wall_s, self.passed_s = 1_800_000_000.0, 55.0

    def wait(self, seconds: float) -> None:
        self.wall_s += seconds
        self.passed_s += seconds

    def clock(self) -> SteadyClock:
        return SteadyClock(lambda: self.wall_s, lambda: self.passed_s)


def test_it_starts_as_the_systems_clock_and_goes_on_evenly() -> None:
    machine = Machine()
    clock = machine.clock()
    assert clock() == machine.wall_s
    machine.wait(12.5)
    assert clock() == machine.wall_s == 1_800_000_012.5


@pytest.mark.parametrize("leap_s", [-3 * HOUR_S, 3 * HOUR_S, -10 * 365 * 86400])
def test_setting_the_systems_clock_neither_stops_it_nor_makes_it_leap(leap_s: float) -> None:
    machine = Machine()
    clock = machine.clock()
    before = clock()
    machine.wall_s += leap_s
    assert clock() == before
    machine.wait(1.0)
    assert clock() == before + 1.0


def test_it_is_unix_time_on_this_machine() -> None:
    clock = SteadyClock()
    assert clock() == pytest.approx(time.time(), abs=0.1)
    readings = [clock() for _ in range(1000)]
    assert readings == sorted(readings)


@pytest.mark.skipif(sys.platform != "linux", reason="that system counts in another way")
def test_suspend_counts_on_linux() -> None:
    booted_s = float(Path("/proc/uptime").read_text("ascii").split()[0])  # includes suspend
    assert passing_s() == pytest.approx(booted_s, abs=0.1)


# Whether it is right


def sentence(*ahead_s: int) -> str | None:
    try:
        check_clock(ahead_s)
    except LocalError as exc:
        return str(exc)
    return None


@pytest.mark.parametrize(
    ("ahead_s", "away"),
    [
        (3 * HOUR_S + 2 * 60 + 59, "3 h 02 min behind"),
        (-(26 * HOUR_S + 10 * 60), "26 h 10 min ahead of"),
        (61, "1 min behind"),
        (-3599, "59 min ahead of"),
        (HOUR_S, "1 h 00 min behind"),
    ],
)
def test_the_sentence(ahead_s: int, away: str) -> None:
    assert sentence(ahead_s) == f"This clock is {away} the mesh; set it and start again"


@pytest.mark.parametrize("ahead_s", [0, CLOCK_SKEW_S_MAX, -CLOCK_SKEW_S_MAX])
def test_a_clock_within_a_minute_is_right(ahead_s: int) -> None:
    assert sentence(ahead_s) is None


def test_nobodys_word_is_no_reason() -> None:
    assert sentence() is None


@pytest.mark.parametrize(
    ("ahead_s", "gives_way"),
    [
        ((HOUR_S, HOUR_S + 2), True),
        ((HOUR_S, HOUR_S + 2, 0), True),
        ((HOUR_S, 0), False),
        ((HOUR_S, 0, 1), False),
        ((HOUR_S, -HOUR_S), False),
        ((HOUR_S, 2 * HOUR_S, 3 * HOUR_S), False),
        ((HOUR_S, HOUR_S, 2 * HOUR_S, 3 * HOUR_S), False),
        ((55, 65, 70), True),
    ],
)
def test_peers_that_disagree_turn_nobody_away(ahead_s: tuple[int, ...], *, gives_way: bool) -> None:
    assert (sentence(*ahead_s) is not None) == gives_way
    assert (sentence(*reversed(ahead_s)) is not None) == gives_way

from __future__ import annotations

import pytest

from p2pmesh.transport.pace import Pace


def test_a_burst_is_free_and_then_the_rate_holds() -> None:
    pace = Pace(rate_per_s=10.0, burst=5)
    assert all(pace.take(100.0) <= 100.0 for _ in range(5))
    assert pace.take(100.0) == pytest.approx(100.1)
    assert pace.take(100.0) == pytest.approx(100.2)


def test_time_pays_for_more() -> None:
    pace = Pace(rate_per_s=10.0, burst=5)
    for _ in range(10):
        pace.take(100.0)
    assert pace.take(101.0) == pytest.approx(100.6)
    assert pace.take(1000.0) == pytest.approx(999.6), "no more than a burst is saved up"


def test_what_costs_more_takes_longer() -> None:
    pace = Pace(rate_per_s=10.0, burst=0)
    assert pace.take(0.0, 25.0) == pytest.approx(2.5)

from __future__ import annotations

import pytest

from simulations.hosts import Conditions


@pytest.mark.parametrize("name", ["loss", "jitter_s", "drop", "duplicate"])
def test_conditions_are_calm_only_if_nothing_happens_to_packets(name: str) -> None:
    conditions = Conditions()
    assert conditions.calm
    setattr(conditions, name, 0.1)
    assert not conditions.calm

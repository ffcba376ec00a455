from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest

from simulations.runner import play
from simulations.scenario import Scenario, Step, load
from simulations.schedule import ViolationError
from simulations.world import World


def scenario(**changes: Any) -> Scenario:
    plain: dict[str, Any] = {"name": "own", "about": "x", "safety_s": 12.0, "liveness_s": 10.0}
    return Scenario(**{**plain, **changes})


def test_a_run_ends_soon_after_the_mesh_has_settled() -> None:
    result = play(scenario(liveness_s=500.0), 1, 3)
    assert result.figures["settled_s"] == 0
    assert result.simulated_s < 20
    assert result.missed == []


def test_limits_that_are_missed_are_named() -> None:
    result = play(scenario(limits={"queue_max": 0.5, "nothing": 1.0}), 1, 3)
    assert "queue_max is" in result.missed[0]
    assert result.missed[1] == "nothing was never reached (at most 1)"
    assert result.tail


def test_the_size_is_drawn_from_the_seed_where_none_is_given() -> None:
    sizes = {play(scenario(nodes=[2, 6], safety_s=1.0, liveness_s=0.1), s).nodes for s in range(9)}
    assert sizes <= set(range(2, 7))
    assert len(sizes) > 2


def test_a_violation_ends_the_run_and_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: World, __: object) -> None:
        raise ViolationError("it broke")

    monkeypatch.setattr(World, "handled", broken)
    before = gc.get_threshold()
    assert play(scenario(), 1, 2).missed == ["it broke"]
    assert gc.get_threshold() == before


def test_a_mesh_that_does_not_settle_says_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Step(fault="partition", at_s=1.0, arguments={"share": 0.5})
    monkeypatch.setattr("simulations.faults.Stage.heal", lambda _: None)
    result = play(scenario(steps=(cut,), safety_s=30.0), 1, 4)
    assert any(what.startswith("at the end") for what in result.missed)


def test_the_cast_is_drawn() -> None:
    mesh = replace(load("undialable"), newer=0.5, clocks_s=20.0, safety_s=12.0, steps=(), limits={})
    result = play(mesh, 1, 10)
    assert result.missed == []

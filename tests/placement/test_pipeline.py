from __future__ import annotations

from p2pmesh.models.parts import StageRange
from p2pmesh.placement.pipeline import Stage
from tests.placement.placement_strategies import node

A, B = node("a"), node("b")


def test_the_memory_of_a_stage_is_no_part_of_its_units_id() -> None:
    assert Stage(A, 0, 3, 77).range == Stage(A, 0, 3, 78).range == StageRange(A, 0, 3)

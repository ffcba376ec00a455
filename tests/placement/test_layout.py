from __future__ import annotations

from p2pmesh.models.parts import WHOLE, StageName
from p2pmesh.placement.layout import Pipeline, Whole
from p2pmesh.placement.pipeline import Stage
from tests.placement.placement_strategies import model, node

A, B, C = node("a"), node("b"), node("c")
BIG = model("big")


def test_a_layout_names_the_part_of_each_of_its_nodes() -> None:
    whole = Whole(nodes=(A,))
    assert (whole.part_on(A), whole.part_on(B)) == (WHOLE, None)
    pipeline = Pipeline.of(BIG, (Stage(B, 0, 3, 1), Stage(A, 4, 7, 1)))
    assert pipeline.nodes == (B, A)
    assert [pipeline.part_on(n) for n in (A, B, C)] == [
        str(StageName(pipeline.unit, 1)),
        str(StageName(pipeline.unit, 0)),
        None,
    ]


def test_nodes_agree_on_ranges_and_not_on_figures() -> None:
    one = Pipeline.of(BIG, (Stage(B, 0, 3, 1), Stage(A, 4, 7, 1)))
    figures = Pipeline.of(BIG, (Stage(B, 0, 3, 2), Stage(A, 4, 7, 2)))
    ranges = Pipeline.of(BIG, (Stage(B, 0, 4, 1), Stage(A, 5, 7, 1)))
    assert one.decision() == figures.decision() != ranges.decision()

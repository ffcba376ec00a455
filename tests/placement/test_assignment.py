from __future__ import annotations

from dataclasses import replace

from p2pmesh.models.parts import WHOLE, PartId, ReplicaKey, StageName
from p2pmesh.placement.assignment import Assignment, Reason, Refusal
from p2pmesh.placement.layout import Layout, Pipeline, Whole
from p2pmesh.placement.pipeline import Stage
from tests.placement.placement_strategies import GIB, model, node

A, B = node("a"), node("b")
BIG = model("big")


def assignment(layout: Layout) -> Assignment:
    return Assignment(
        digest=BIG, layout=layout, reason=Reason.PLACED, copies=2, need_bytes=GIB, holders=2
    )


def test_an_assignment_has_one_replica_for_each_of_its_nodes() -> None:
    whole = assignment(Whole(nodes=(A, B)))
    assert list(whole.replicas()) == [ReplicaKey(n, PartId(BIG, WHOLE)) for n in (A, B)]
    pipeline = Pipeline.of(BIG, (Stage(B, 0, 3, GIB), Stage(A, 4, 7, GIB)))
    split = assignment(pipeline)
    assert split.nodes == (B, A)
    assert list(split.replicas()) == [
        ReplicaKey(n, PartId(BIG, str(StageName(pipeline.unit, number))))
        for number, n in enumerate((B, A))
    ]


def test_nodes_agree_on_the_choice_and_not_on_the_figures_that_explain_it() -> None:
    one = assignment(Whole(nodes=(A,)))
    why = Refusal(Reason.NO_ENGINES, B)
    figures = replace(one, need_bytes=2 * GIB, roomiest=B, room_bytes=GIB, refusal=why)
    assert one.decision() == figures.decision()
    for other in (
        replace(one, layout=Whole(nodes=(B,))),
        replace(one, reason=Reason.LITTLE_ROOM),
        replace(one, copies=3),
    ):
        assert other.decision() != one.decision()

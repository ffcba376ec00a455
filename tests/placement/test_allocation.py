from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import StageName, parse_stage
from p2pmesh.placement.assignment import Reason
from p2pmesh.placement.facts import (
    ModelFacts,
    NodeFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
)
from p2pmesh.placement.layout import Pipeline, Whole
from p2pmesh.placement.pipeline import Stage
from p2pmesh.placement.plan import plan
from tests.placement.placement_strategies import GIB, STATES, model, node, only, ready
from tests.placement.split_world import (
    EVEN,
    changed,
    engine,
    layered,
    random_facts,
    residents,
    some_of,
)

A, B, C = node("a"), node("b"), node("c")
BIG = model("big")


# Pipelines.


@pytest.mark.parametrize("seed", range(300))
def test_any_part_of_a_plan_with_pipelines_leads_to_the_same_plan(seed: int) -> None:
    rng = Random(seed)
    facts = random_facts(rng)
    for _ in range(4):
        result = plan(facts)
        after_some = some_of(rng, result, facts)
        assert plan(after_some) == result
        facts = changed(rng, after_some)


def failing_somewhere(rng: Random, facts: PlacementInputs) -> PlacementInputs:
    """The facts with nodes on which parts of a model failed that do not run any."""
    running = {(one.digest, one.node) for one in facts.residents}
    nodes = [one.node for one in facts.nodes]
    some = {
        model.digest: [n for n in rng.sample(nodes, 2) if (model.digest, n) not in running]
        for model in facts.models
    }
    models = (replace(model, failing=tuple(some[model.digest])) for model in facts.models)
    return replace(facts, models=tuple(models))


def test_where_parts_failed_nothing_is_placed_that_fits_elsewhere() -> None:
    avoided = 0
    for seed in range(300):
        rng = Random(seed)
        facts = failing_somewhere(rng, random_facts(rng))
        result = plan(facts)
        failing = {one.digest: set(one.failing) for one in facts.models}
        if any(failing[one.digest] & set(one.nodes) for one in result.assignments):
            continue  # a node that is tried again fails no more, by what it says
        avoided += any(one.nodes and failing[one.digest] for one in result.assignments)
        assert plan(some_of(rng, result, facts)) == result
    assert avoided > 100


def test_a_pipeline_of_which_a_stage_failed_makes_way_for_one_without_that_node() -> None:
    nodes = (engine(A, 9 * GIB), engine(B, 9 * GIB), engine(C, 9 * GIB))
    facts = split_facts(*nodes)
    first = only(plan(facts), BIG)
    assert isinstance(first.layout, Pipeline)
    head, behind = first.nodes
    [other] = {A, B, C} - {head, behind}
    running = tuple(residents(first, only=[0]))
    failing = tuple(replace(one, failing=(behind,)) for one in facts.models)
    facts = replace(facts, models=failing, residents=running)
    second = only(plan(facts), BIG)
    assert set(second.nodes) == {head, other}
    alone = replace(facts, nodes=tuple(one for one in nodes if one.node != other))
    assert only(plan(alone), BIG).nodes == first.nodes, "where it can be nowhere else it stays"


def test_plans_with_pipelines_fit_and_do_not_hang_on_the_order_of_facts() -> None:
    pipelines = 0
    for seed in range(100):
        rng = Random(seed)
        facts = random_facts(rng)
        result = plan(facts)
        again = PlacementInputs(
            nodes=tuple(rng.sample(facts.nodes, len(facts.nodes))),
            models=tuple(rng.sample(facts.models, len(facts.models))),
            wants=tuple(rng.sample(facts.wants, len(facts.wants))),
            residents=facts.residents[::-1],
        )
        assert plan(again).encode() == result.encode()
        needs = {part.digest: part for part in facts.models}
        room = {part.node: part.budget_bytes for part in facts.nodes}
        for row in result.assignments:
            if isinstance(row.layout, Pipeline):
                pipelines += 1
                shapes = dict(needs[row.digest].shapes)
                for stage in row.layout.stages:
                    assert stage.need_bytes == shapes[row.nodes[0]].need(*stage[1:3])
                    room[stage.node] -= stage.need_bytes
            else:
                for n in row.nodes:
                    room[n] -= needs[row.digest].need_on(n)
        assert min(room.values()) >= 0
    assert pipelines > 50


def split_facts(
    *nodes: NodeFacts, split: int = 2, holders: Iterable[NodeId] = (A, B), **changes: Any
) -> PlacementInputs:
    wish = PlacementRequest(owner=A, digest=BIG, split=split)
    facts = PlacementInputs(nodes=nodes, models=(layered(BIG, *holders),), wants=(wish,))
    return replace(facts, **changes)


def test_a_split_makes_one_pipeline_of_that_many_nodes() -> None:
    facts = split_facts(engine(A, 9 * GIB), engine(B, 9 * GIB), engine(C, 9 * GIB), holders=(A,))
    row = only(plan(facts), BIG)
    assert isinstance(row.layout, Pipeline)
    assert (row.nodes[0], len(row.nodes), row.copies, row.reason) == (A, 2, 1, Reason.PLACED)
    head, tail = row.replicas()
    assert (head.node, parse_stage(head.part.name)) == (A, StageName(row.layout.unit, 0))
    assert parse_stage(tail.part.name) == StageName(row.layout.unit, 1)
    assert plan(facts).on(A) == (head.part,)
    three = only(plan(replace(facts, wants=(replace(facts.wants[0], split=3),))), BIG)
    assert sorted(three.nodes) == sorted((A, B, C))
    whole = only(plan(replace(facts, wants=(replace(facts.wants[0], split=1),))), BIG)
    assert whole.layout == Whole(nodes=(A,))


def test_golden_pipeline() -> None:
    nodes = (engine(A, 9 * GIB), engine(B, 9 * GIB), engine(C, 12 * GIB, rpc="8.0.0"))
    result = plan(split_facts(*nodes))
    assert result.digest.hex() == "b09bdc703f79375e6343058b689d8fbe"
    (row,) = result.assignments
    assert isinstance(row.layout, Pipeline)
    assert row.layout.unit == "cff7f5758f4f4d17"


def test_the_largest_split_of_all_wishes_counts() -> None:
    facts = split_facts(*(engine(n, 9 * GIB) for n in (A, B, C)))
    more = PlacementRequest(owner=B, digest=BIG, split=3, replicas=2)
    assert len(only(plan(replace(facts, wants=(*facts.wants, more))), BIG).nodes) == 3


def test_a_running_unit_stays_while_it_is_feasible() -> None:
    facts = split_facts(engine(A, 9 * GIB), engine(B, 9 * GIB), holders=(A, B))
    first = only(plan(facts), BIG)
    for state in STATES:
        for some in ((0, 1), (0,), (1,)):
            here = tuple(residents(first, state, only=some))
            roomy = split_facts(engine(A, 9 * GIB), engine(B, 12 * GIB), engine(C, 64 * GIB))
            kept = only(plan(replace(roomy, residents=here)), BIG)
            assert kept.layout == first.layout
    here = tuple(residents(first))
    assert only(plan(roomy), BIG).layout != first.layout
    for worse in (
        [engine(A, 9 * GIB), engine(B, 3 * GIB), engine(C, 64 * GIB)],
        [engine(A, 9 * GIB), engine(B, 9 * GIB, rpc="8.0.0"), engine(C, 64 * GIB)],
        [
            engine(A, 9 * GIB, may_head=False),
            engine(B, 9 * GIB),
            engine(C, 64 * GIB, confined=True),
        ],
        [engine(A, 9 * GIB), engine(C, 64 * GIB)],
    ):
        moved = only(plan(split_facts(*worse, residents=here)), BIG)
        assert isinstance(moved.layout, Pipeline)
        assert moved.layout != first.layout
    assert len(only(plan(split_facts(*facts.nodes, split=3, residents=here)), BIG).nodes) == 0


def test_a_head_without_the_right_goes_on_while_its_stages_are_confined() -> None:
    head, confined = engine(A, 9 * GIB, may_head=False), engine(B, 9 * GIB, confined=True)
    facts = split_facts(head, confined, engine(C, 12 * GIB), holders=(A,))
    first = only(plan(facts), BIG)
    assert first.nodes == (A, B)
    here = tuple(residents(first))
    roomy = split_facts(head, confined, engine(C, 64 * GIB, confined=True), holders=(A,))
    assert only(plan(replace(roomy, residents=here)), BIG).layout == first.layout
    opened = split_facts(head, engine(B, 9 * GIB), engine(C, 12 * GIB), holders=(A,))
    assert only(plan(replace(opened, residents=here)), BIG).reason == Reason.NO_RIGHT


def test_a_unit_that_another_node_signs_does_not_count() -> None:
    facts = split_facts(engine(A, 9 * GIB), engine(B, 9 * GIB), engine(C, 9 * GIB))
    first = only(plan(facts), BIG)
    other = Pipeline.of(BIG, (Stage(C, 0, 0, 0), Stage(A, 1, 7, 0)))
    lie = Resident(
        digest=BIG,
        node=B,
        state="ready",
        name=str(StageName(other.unit, 0)),
        stages=tuple(one.range for one in other.stages),
    )
    assert only(plan(replace(facts, residents=(lie,))), BIG) == first


def test_a_copy_that_answers_keeps_its_memory_beside_the_pipeline() -> None:
    model = layered(BIG, A, B)
    roomy, tight = (engine(A, size * GIB) for size in (16, 12))
    for first, found in ((roomy, True), (tight, False)):
        facts = split_facts(first, engine(B, 5 * GIB), residents=(ready(A, BIG),))
        row = only(plan(facts), BIG)
        assert isinstance(row.layout, Pipeline) is found
        if not found:
            assert row.layout == Whole(nodes=(A,))
            assert (row.reason, row.roomiest) == (Reason.NO_STAGE_ROOM, A)
        assert model.need_bytes == 9 * GIB


def test_a_holder_that_tells_no_layers_is_no_head() -> None:
    """Whatever room it claims: why there is no pipeline follows from those that do."""
    told = layered(BIG, A, B)
    for shape in (EVEN._replace(layer_bytes=(), layer_reads=()), EVEN._replace(layer_bytes=(GIB,))):
        model = replace(told, holders=(A, B, C), shapes=(*told.shapes, (C, shape)))
        nodes = engine(A, GIB), engine(B, GIB), engine(C, 2**62)
        for split in (2, 3):
            row = only(plan(split_facts(*nodes, split=split, models=(model,))), BIG)
            assert (row.reason, row.nodes) == (Reason.NO_STAGE_ROOM, ())


# Pipelines that nobody asked for.


def unasked(*nodes: NodeFacts, **changes: Any) -> PlacementInputs:
    return split_facts(*nodes, split=0, **changes)


def test_a_model_that_fits_on_no_node_becomes_a_pipeline_of_the_fewest_nodes() -> None:
    six = [engine(n, 6 * GIB) for n in (A, B, C)]
    row = only(plan(unasked(*six)), BIG)
    assert isinstance(row.layout, Pipeline)
    assert (len(row.nodes), row.copies, row.split, row.reason) == (2, 1, 0, Reason.PLACED)
    four = [engine(n, 4 * GIB) for n in (A, B, C)]
    assert len(only(plan(unasked(*four)), BIG).nodes) == 3
    alone = only(plan(unasked(six[0])), BIG)
    assert (alone.reason, alone.nodes) == (Reason.TOO_LARGE, ())
    assert alone.refusal is not None
    assert alone.refusal.reason is Reason.NO_ENGINES


def test_no_new_pipeline_is_made_with_a_node_that_does_not_know_how_far_it_is() -> None:
    nodes = engine(A, 6 * GIB), replace(engine(B, 6 * GIB), measured=False)
    assert only(plan(unasked(*nodes)), BIG).nodes == ()
    running = only(plan(unasked(engine(A, 6 * GIB), engine(B, 6 * GIB))), BIG)
    here = tuple(residents(running))
    assert only(plan(unasked(*nodes, residents=here)), BIG).layout == running.layout


def test_stages_of_all_models_stay_within_what_stages_may_take() -> None:
    small = replace(engine(B, 64 * GIB), stage_bytes=5 * GIB)
    first = plan(unasked(engine(A, 6 * GIB), small, holders=(A,)))
    assert set(only(first, BIG).nodes) == {A, B}
    other = model("other")
    two = unasked(engine(A, 6 * GIB), engine(C, 6 * GIB), small, holders=(A,))
    second = replace(
        two,
        models=(*two.models, layered(other, C)),
        wants=(*two.wants, PlacementRequest(owner=C, digest=other)),
    )
    result = plan(second)
    assert [len(only(result, one).nodes) for one in (BIG, other)].count(0) == 1, "room for one"
    roomy = [replace(n, stage_bytes=64 * GIB) for n in second.nodes]
    both = plan(replace(second, nodes=tuple(roomy)))
    assert all(len(only(both, one).nodes) == 2 for one in (BIG, other))
    kept = replace(second, residents=tuple(residents(only(result, BIG))))
    assert plan(kept) == result


def test_near_nodes_are_taken_before_far_ones_with_more_room() -> None:
    far = replace(engine(C, 64 * GIB), far=((A, 2), (B, 2)))
    nodes = engine(A, 6 * GIB), engine(B, 6 * GIB), far
    assert set(only(plan(unasked(*nodes)), BIG).nodes) == {A, B}
    assert set(only(plan(unasked(nodes[0], far, holders=(A,))), BIG).nodes) == {A, C}


def test_it_becomes_whole_when_a_large_node_joins_and_a_pipeline_again_when_that_leaves() -> None:
    small = engine(A, 6 * GIB), engine(B, 6 * GIB)
    first = only(plan(unasked(*small)), BIG)
    here = tuple(residents(first))
    large = unasked(*small, engine(C, 9 * GIB), holders=(A, B, C), residents=here)
    whole = only(plan(large), BIG)
    assert whole.layout == Whole(nodes=(C,))
    moved = replace(large, residents=(*here, ready(C, BIG)))
    assert only(plan(moved), BIG).layout == whole.layout
    stayed = unasked(*small, engine(C, 9 * GIB), residents=here)
    assert only(plan(stayed), BIG).layout == first.layout, "the large node lacks the file"
    left = unasked(*small, residents=(ready(C, BIG),))
    assert only(plan(left), BIG).layout == first.layout


@pytest.mark.parametrize(
    ("budget", "becomes_whole"), [(9 * GIB, False), (10 * GIB, False), (11 * GIB, True)]
)
def test_a_pipeline_that_runs_makes_way_for_a_copy_in_its_own_memory_only_with_room_to_spare(
    budget: int,
    becomes_whole: bool,  # noqa: FBT001
) -> None:
    first = only(plan(unasked(engine(A, 6 * GIB), engine(B, 6 * GIB))), BIG)
    grown = engine(A, budget), engine(B, 6 * GIB)
    row = only(plan(unasked(*grown, residents=tuple(residents(first)))), BIG)
    assert (row.layout == Whole(nodes=(A,))) is becomes_whole
    assert becomes_whole or row.layout == first.layout
    assert only(plan(unasked(*grown)), BIG).layout == Whole(nodes=(A,))


def test_a_model_is_split_where_others_took_the_room_for_a_copy() -> None:
    other = model("other")
    facts = unasked(engine(A, 16 * GIB), engine(B, 8 * GIB), holders=(A,))
    whole = ModelFacts(digest=other, need_bytes=10 * GIB, holders=(A,))
    wish = PlacementRequest(owner=A, digest=other)
    full = replace(facts, models=(*facts.models, whole), wants=(*facts.wants, wish))
    result = plan(full)
    assert only(result, other).nodes == (A,)
    assert isinstance(only(result, BIG).layout, Pipeline)
    assert only(plan(facts), BIG).layout == Whole(nodes=(A,))


def test_a_pipeline_that_nobody_asks_for_any_more_stays_until_a_copy_can_take_over() -> None:
    nodes = engine(A, 9 * GIB), engine(B, 9 * GIB)
    first = only(plan(split_facts(*nodes)), BIG)
    here = tuple(residents(first))
    assert only(plan(unasked(*nodes, residents=here)), BIG).layout == first.layout
    roomy = engine(A, 9 * GIB), engine(B, 16 * GIB)
    assert only(plan(unasked(*roomy, residents=here)), BIG).layout == Whole(nodes=(B,))

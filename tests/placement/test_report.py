from __future__ import annotations

from dataclasses import replace

from hypothesis import given

from p2pmesh.placement.facts import PlacementInputs
from p2pmesh.placement.plan import plan
from p2pmesh.placement.report import (
    Lack,
    ModelReport,
    Report,
    candidates,
    differences,
    helps,
    report,
)
from p2pmesh.placement.shape import Shape
from p2pmesh.placement.what_if import change
from tests.placement.placement_strategies import (
    GIB,
    MODELS,
    NODES,
    any_facts,
    described,
    facts_of,
    only,
    want,
)
from tests.placement.split_world import EVEN, engine, layered

FAST_MIB_PER_S = 200 * 1024
SECOND_US = 1_000_000


def made(facts: PlacementInputs, shape: Shape | None = EVEN) -> Report:
    shapes = {} if shape is None else {one.digest: shape for one in facts.models}
    return report(facts, plan(facts), shapes)


def first(facts: PlacementInputs, shape: Shape | None = EVEN) -> ModelReport:
    return made(facts, shape).models[0]


@given(any_facts)
def test_every_part_is_counted_once_on_its_node(facts: PlacementInputs) -> None:
    seen = made(facts)
    parts = [(one.digest, part) for one in seen.models for part in one.parts]
    on_nodes = [pair for node in seen.nodes for pair in node.parts]
    assert sorted(parts, key=repr) == sorted(on_nodes, key=repr)
    for node in seen.nodes:
        assert node.used_bytes == sum(part.need_bytes for _, part in node.parts)
        assert node.used_bytes <= node.facts.budget_bytes


@given(any_facts)
def test_a_plan_does_not_differ_from_itself(facts: PlacementInputs) -> None:
    assert differences(made(facts), made(facts)) == ()


@given(any_facts)
def test_a_model_that_a_node_could_run_lacks_nothing_there(facts: PlacementInputs) -> None:
    seen = made(facts)
    for model in seen.models:
        for one in candidates(facts, seen, model.digest):
            assert (one.node in model.assignment.nodes) == one.runs
            fits = one.holds and one.need_bytes <= one.free_bytes
            assert one.lacks == () if one.runs or fits else one.lacks


def test_a_whole_copy_takes_the_time_to_read_its_layers() -> None:
    fast = replace(engine(NODES[0], 16 * GIB), memory_mib_per_s=FAST_MIB_PER_S)
    facts = PlacementInputs(
        nodes=(fast,), models=(layered(MODELS[0], NODES[0]),), wants=(want(MODELS[0]),)
    )
    model = first(facts)
    assert model.token_us == model.token_us_max == 8 * SECOND_US // 200
    assert model.link_us == 0
    assert not model.is_pipeline


def test_copies_on_nodes_of_different_speed_are_both_told() -> None:
    fast = replace(engine(NODES[0], 16 * GIB), memory_mib_per_s=FAST_MIB_PER_S)
    slow = replace(engine(NODES[1], 16 * GIB), memory_mib_per_s=FAST_MIB_PER_S // 10)
    facts = PlacementInputs(
        nodes=(fast, slow),
        models=(layered(MODELS[0], *NODES[:2]),),
        wants=(want(MODELS[0], replicas=2),),
    )
    model = first(facts)
    assert model.token_us_max == 10 * model.token_us


def test_a_pipeline_takes_the_time_of_its_stages_and_its_hops() -> None:
    facts = PlacementInputs(
        nodes=(engine(NODES[0], 6 * GIB), engine(NODES[1], 6 * GIB)),
        models=(layered(MODELS[0], NODES[0]),),
        wants=(replace(want(MODELS[0]), split=2),),
    )
    model = first(facts)
    assert model.is_pipeline
    assert model.parts[0].first_layer == 0
    assert model.parts[-1].last_layer == 7
    assert model.token_us == sum(part.read_us for part in model.parts) + model.link_us
    assert model.link_us > 0


def test_the_speed_of_a_model_that_tells_nothing_is_unknown() -> None:
    facts = facts_of({NODES[0]: 4 * GIB}, [described(MODELS[0], GIB, NODES[0])], [want(MODELS[0])])
    assert first(facts, None).token_us == 0


def test_differences_name_the_models_that_move() -> None:
    facts = facts_of(
        {NODES[0]: 4 * GIB, NODES[1]: 4 * GIB},
        [described(MODELS[0], GIB, *NODES[:2]), described(MODELS[1], GIB, *NODES[:2])],
        [want(MODELS[0]), want(MODELS[1])],
    )
    [host] = only(plan(facts), MODELS[0]).nodes
    [other] = {*NODES[:2]} - {host}
    [one] = [
        one
        for one in differences(made(facts), made(change(facts, removed=[host])))
        if one.digest == MODELS[0]
    ]
    assert one.before is not None
    assert one.after is not None
    assert (one.before.assignment.nodes, one.after.assignment.nodes) == ((host,), (other,))


def test_what_would_help_is_the_least_of_each_thing() -> None:
    """One node lacks a little memory, one much, and a roomy one lacks the file."""
    facts = facts_of(
        {NODES[0]: 3 * GIB, NODES[1]: GIB, NODES[2]: 8 * GIB},
        [described(MODELS[0], 4 * GIB, *NODES[:2])],
        [want(MODELS[0])],
    )
    helping = helps(facts, made(facts), MODELS[0])
    assert [(lack, one.node, one.missing_bytes) for lack, one in helping] == [
        (Lack.FILE, NODES[2], 0),
        (Lack.MEMORY, NODES[0], GIB),
    ]


def test_a_node_where_a_copy_fails_lacks_a_load_that_does_not() -> None:
    one = replace(described(MODELS[0], GIB, *NODES[:2]), failing=(NODES[0],))
    facts = facts_of(dict.fromkeys(NODES[:2], 4 * GIB), [one], [want(MODELS[0])])
    found = {one.node: (one.runs, one.lacks) for one in candidates(facts, made(facts), MODELS[0])}
    assert found == {NODES[0]: (False, (Lack.LOAD,)), NODES[1]: (True, ())}


def test_nothing_has_to_help_a_model_that_has_its_place() -> None:
    facts = facts_of({NODES[0]: 4 * GIB}, [described(MODELS[0], GIB, NODES[0])], [want(MODELS[0])])
    assert helps(facts, made(facts), MODELS[0]) == []


def test_of_a_pipeline_nodes_lack_engines_and_the_right() -> None:
    facts = PlacementInputs(
        nodes=(
            engine(NODES[0], 6 * GIB, may_head=False),
            engine(NODES[1], 6 * GIB),
            engine(NODES[2], 6 * GIB, rpc="6.0.0"),
        ),
        models=(layered(MODELS[0], NODES[0]),),
        wants=(replace(want(MODELS[0]), split=2),),
    )
    found = {one.node: one.lacks for one in candidates(facts, made(facts), MODELS[0])}
    assert found == {NODES[0]: (Lack.RIGHT,), NODES[1]: (), NODES[2]: (Lack.ENGINE,)}
    confined = replace(facts.nodes[1], confined=True)
    facts = replace(facts, nodes=(facts.nodes[0], confined))
    assert not any(one.lacks for one in candidates(facts, made(facts), MODELS[0]))


def test_a_model_that_fits_nowhere_is_helped_by_engines_too() -> None:
    facts = PlacementInputs(
        nodes=(engine(NODES[0], 6 * GIB), engine(NODES[1], 6 * GIB, rpc="6.0.0")),
        models=(layered(MODELS[0], NODES[0]),),
        wants=(want(MODELS[0]),),
    )
    helping = {lack: one.node for lack, one in helps(facts, made(facts), MODELS[0])}
    assert helping == {Lack.MEMORY: NODES[0], Lack.ENGINE: NODES[1]}

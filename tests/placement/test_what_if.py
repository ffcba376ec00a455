from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.identity.keys import NodeId
from p2pmesh.placement.assignment import Reason
from p2pmesh.placement.facts import PlacementInputs
from p2pmesh.placement.layout import Pipeline
from p2pmesh.placement.plan import plan
from p2pmesh.placement.what_if import ImaginedNode, change, imagined_id
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
from tests.placement.split_world import engine, layered

imagined = st.builds(
    ImaginedNode,
    budget_bytes=st.integers(1, 8).map(lambda count: count * GIB),
    memory_mib_per_s=st.sampled_from([0, 20_000, 200_000]),
)


@given(any_facts)
def test_no_change_changes_nothing(facts: PlacementInputs) -> None:
    assert change(facts).encode() == facts.encode()


@given(any_facts, st.sets(st.sampled_from(NODES)))
def test_removing_nodes_changes_nothing_else(facts: PlacementInputs, gone: set[NodeId]) -> None:
    left = change(facts, removed=gone)
    assert left.nodes == tuple(one for one in facts.nodes if one.node not in gone)
    assert left.residents == tuple(one for one in facts.residents if one.node not in gone)
    assert left.wants == facts.wants
    kept = {one.digest: one for one in left.models}
    for model in facts.models:
        holders = tuple(node for node in model.holders if node not in gone)
        if holders == model.holders:
            assert kept[model.digest] == model
        elif not holders:
            assert model.digest not in kept
        else:
            assert kept[model.digest].holders == holders
            for node in holders:
                assert kept[model.digest].need_on(node) == model.need_on(node)
    assert gone.isdisjoint(node for one in plan(left).assignments for node in one.nodes)


@given(
    any_facts,
    st.lists(st.sampled_from(NODES), unique=True),
    st.lists(imagined, max_size=4),
    st.randoms(use_true_random=False),
)
def test_the_order_of_changes_means_nothing(
    facts: PlacementInputs, gone: list[NodeId], added: list[ImaginedNode], rng: random.Random
) -> None:
    made = change(facts, removed=gone, added=added)
    others = rng.sample(gone, len(gone)), rng.sample(added, len(added))
    again = change(facts, removed=others[0], added=others[1])
    assert again.encode() == made.encode()
    assert plan(again).digest == plan(made).digest


def test_a_model_that_fits_nowhere_fits_on_a_node_that_is_large_enough() -> None:
    facts = facts_of(
        {NODES[0]: 4 * GIB}, [described(MODELS[0], 40 * GIB, NODES[0])], [want(MODELS[0])]
    )
    assert only(plan(facts), MODELS[0]).reason is Reason.TOO_LARGE
    small = change(facts, added=[ImaginedNode(budget_bytes=32 * GIB)])
    assert only(plan(small), MODELS[0]).reason is Reason.TOO_LARGE
    large = change(facts, added=[ImaginedNode(budget_bytes=64 * GIB)])
    assert only(plan(large), MODELS[0]).nodes == (imagined_id(1),)


def test_an_imagined_node_takes_part_in_pipelines() -> None:
    model = layered(MODELS[0], NODES[0])
    facts = PlacementInputs(
        nodes=(engine(NODES[0], 6 * GIB), engine(NODES[1], 6 * GIB, rpc="6.0.0")),
        models=(model,),
        wants=(replace(want(MODELS[0]), split=2),),
    )
    assert not isinstance(only(plan(facts), MODELS[0]).layout, Pipeline)
    more = change(facts, added=[ImaginedNode(budget_bytes=6 * GIB, memory_mib_per_s=200_000)])
    layout = only(plan(more), MODELS[0]).layout
    assert isinstance(layout, Pipeline)
    assert set(layout.nodes) == {NODES[0], imagined_id(1)}


def test_an_imagined_node_confines_stages_where_most_do() -> None:
    """So it takes stages of a head that has no right."""
    head = engine(NODES[0], 6 * GIB, may_head=False)
    others = [replace(engine(node, GIB), confined=True) for node in NODES[1:3]]
    facts = PlacementInputs(
        nodes=(head, *others),
        models=(layered(MODELS[0], NODES[0]),),
        wants=(replace(want(MODELS[0]), split=2),),
    )
    more = change(facts, added=[ImaginedNode(budget_bytes=6 * GIB)])
    assert set(only(plan(more), MODELS[0]).nodes) == {NODES[0], imagined_id(1)}
    [made] = (one for one in more.nodes if one.node == imagined_id(1))
    assert made.confined
    alone = change(replace(facts, nodes=(head,)), added=[ImaginedNode(budget_bytes=GIB)])
    assert not any(one.confined for one in alone.nodes)


def test_ids_of_imagined_nodes_differ() -> None:
    assert len({imagined_id(number) for number in range(1, 17)}) == 16

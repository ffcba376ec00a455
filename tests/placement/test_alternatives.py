from __future__ import annotations

from dataclasses import replace

from p2pmesh.models.parts import ShardKind, ShardQuality
from p2pmesh.placement.alternatives import Alternatives, alternatives
from p2pmesh.placement.explain import explain_layers, explain_shards
from p2pmesh.placement.facts import ModelFacts, NodeFacts, PlacementInputs, PlacementRequest
from p2pmesh.placement.layout import Experts, Pipeline
from p2pmesh.placement.plan import plan
from p2pmesh.placement.shape import Shape
from tests.placement.placement_strategies import GIB, model, node, only
from tests.placement.split_world import residents
from tests.state.builders import card

A, B = node("a"), node("b")
MOE, SMALL = model("moe"), model("small")
SHAPE = Shape((2 * GIB,) * 8, (GIB,) * 8, 4 * GIB, GIB, 4096)
CARD = card(experts=16, size_bytes=18 * GIB, expert_bytes=16 * GIB, parameters=18 * GIB)


def facts(budget: int = 16, *, experts: bool = True) -> PlacementInputs:
    described = ModelFacts(
        digest=MOE,
        need_bytes=20 * GIB,
        holders=(A, B),
        shapes=((A, SHAPE), (B, SHAPE)),
        expert_bytes=((A, 16 * GIB), (B, 16 * GIB)) if experts else (),
        qualities=(ShardQuality(ShardKind.EXPERTS, "ab" * 32, 16, 8, 50_000, 930_000),),
    )
    return PlacementInputs(
        nodes=tuple(
            NodeFacts(node=one, budget_bytes=budget * GIB, rpc="7.0.0", may_head=True)
            for one in (A, B)
        ),
        models=(described,),
        wants=(PlacementRequest(digest=MOE, owner=A),),
    )


def found(inputs: PlacementInputs) -> Alternatives:
    others = alternatives(inputs, MOE, CARD)
    assert others is not None
    return others


def test_shards_and_a_pipeline_are_what_owners_could_have_whatever_runs() -> None:
    inputs = facts()
    running = replace(inputs, residents=tuple(residents(only(plan(inputs), MOE))))
    for one in (inputs, running):
        others = found(one)
        assert isinstance(others.experts.layout, Experts)
        assert isinstance(others.layers.layout, Pipeline)


def test_the_finest_quantisation_that_fits_whole_is_named() -> None:
    # Beside the weights a copy takes 2 GiB: 14 are left for 18 Gi weights.
    fits = found(facts()).fits
    assert fits is not None
    assert (fits.node, fits.size_bytes, fits.name) == (max(A, B), 14 * GIB, "Q5_K_M")
    assert found(facts(5)).fits is None, "not even the smallest"
    assert found(facts()).smaller == ()


def test_other_models_have_no_such_ways() -> None:
    assert alternatives(facts(experts=False), MOE, CARD) is None
    assert alternatives(facts(), SMALL, CARD) is None
    without = alternatives(facts(), MOE, None)
    assert without is not None
    assert without.fits is None


def test_each_way_is_told_by_itself() -> None:
    others = found(facts())
    assert explain_shards(others.experts).startswith("expert shards, of 16 experts of a layer ")
    assert explain_layers(others.layers).startswith("it fits on no node: split over 2 nodes")
    none = found(facts(5))
    assert explain_shards(none.experts).startswith("not in expert shards: each takes")
    assert explain_layers(none.layers).startswith("not split over several nodes either: its layers")
    whole = found(facts(20))
    assert explain_shards(whole.experts) == explain_layers(whole.layers) == "it is whole"

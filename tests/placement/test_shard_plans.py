"""Plans in which models of experts are served in shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import UNMEASURED, Shard, ShardKind, ShardQuality, is_shard, shard_name
from p2pmesh.placement.assignment import Reason
from p2pmesh.placement.explain import explain
from p2pmesh.placement.facts import (
    ModelFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
)
from p2pmesh.placement.layout import Experts, Pipeline, Whole
from p2pmesh.placement.plan import plan
from p2pmesh.placement.reconcile import Start, Stop, reconcile
from p2pmesh.sharing import Sharing
from tests.placement.placement_strategies import GIB, STATES, model, only
from tests.placement.sharded import (
    GOOD,
    MOE,
    NEWER,
    OTHER,
    PLACES,
    RANKING,
    A,
    B,
    C,
    D,
    facts,
    moe,
    planned,
    residents_of,
)
from tests.placement.split_world import residents


def test_a_model_of_experts_that_fits_on_no_node_is_served_in_shards() -> None:
    row = only(plan(facts(16, 16, 16)), MOE)
    assert isinstance(row.layout, Experts)
    assert row.reason is Reason.PLACED
    assert explain(row).startswith("it fits on no node: expert shards, of 16 experts of a layer 1")
    assert explain(row).endswith("measured divergence 0.050")
    assert all(is_shard(one.part.name) for one in row.replicas())


def test_one_that_fits_is_whole_and_one_that_fits_later_becomes_whole() -> None:
    assert isinstance(only(plan(facts(16, 16, 20)), MOE).layout, Whole)
    sharded = facts(16, 16, 16)
    running = residents_of(only(plan(sharded), MOE))
    row = only(plan(facts(16, 16, 16, 20, residents=running)), MOE)
    assert (row.layout, row.reason) == (Whole(nodes=(D,)), Reason.PLACED)


def test_shards_that_are_not_good_enough_leave_it_to_a_pipeline() -> None:
    bad = GOOD._replace(divergence=170_000)
    row = only(plan(facts(16, 16, 16, described=moe(A, B, C, known=(bad,)))), MOE)
    assert isinstance(row.layout, Pipeline)
    assert "0.170 is their least measured divergence, more than the 0.100" in explain(row)
    without = facts(16, 16, 16, described=moe(A, B, C, known=(bad,), deep=False))
    row = only(plan(without), MOE)
    assert row.nodes == ()
    assert "0.170 is their least measured divergence, more than the 0.100" in explain(row)


def test_the_owner_says_how_good_they_have_to_be_and_whether_there_may_be_any() -> None:
    bad = GOOD._replace(divergence=170_000)
    described = moe(A, B, C, known=(bad,))
    wish = PlacementRequest(digest=MOE, owner=A, divergence_max=500_000)
    assert planned(plan(facts(16, 16, 16, described=described, wish=wish)))
    wish = replace(wish, moe=Sharing.LAYERS)
    row = only(plan(facts(16, 16, 16, described=described, wish=wish)), MOE)
    assert isinstance(row.layout, Pipeline)
    assert row.shard_refusal is None
    wish = PlacementRequest(digest=MOE, owner=A, moe=Sharing.EXPERTS)
    row = only(plan(facts(16, 16, 16, described=described, wish=wish)), MOE)
    assert row.nodes == (), "a pipeline is not what was asked for"


def test_the_strictest_owner_counts() -> None:
    lax = PlacementRequest(digest=MOE, owner=A, divergence_max=500_000)
    base = facts(16, 16, 16, described=moe(A, B, C, known=(GOOD._replace(divergence=170_000),)))
    both = replace(base, wants=(lax, PlacementRequest(digest=MOE, owner=B)))
    assert isinstance(only(plan(both), MOE).layout, Pipeline)


def test_what_is_not_measured_will_do_only_where_the_model_can_run_nowhere() -> None:
    guessed = GOOD._replace(divergence=UNMEASURED)
    row = only(plan(facts(16, 16, 16, described=moe(A, B, C, known=(guessed,)))), MOE)
    assert isinstance(row.layout, Pipeline)
    flat = moe(A, B, C, known=(guessed,), deep=False)
    row = only(plan(facts(16, 16, 16, described=flat)), MOE)
    assert isinstance(row.layout, Experts)
    assert "unmeasured, predicted to cover 93 % of the importance" in explain(row)


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ((), "nothing is known of their quality: `p2pmesh experts rank`"),
        ((GOOD._replace(divergence=UNMEASURED, coverage=800_000),), "experts measure"),
        ((GOOD._replace(coverage=390_000),), "cannot be true, as they cover 39 % of the"),
        ((GOOD._replace(critical=14),), "each takes 18.0 GiB and more, 0 nodes"),
    ],
)
def test_it_says_why_there_are_no_shards(known: tuple[ShardQuality, ...], says: str) -> None:
    described = moe(A, B, C, known=known, deep=False)
    row = only(plan(facts(16, 16, 16, described=described)), MOE)
    assert row.nodes == ()
    assert says in explain(row)


def test_a_pipeline_that_runs_stays_unless_shards_are_asked_for() -> None:
    pipeline = only(plan(facts(16, 16, 16, described=moe(A, B, C, known=()))), MOE)
    assert isinstance(pipeline.layout, Pipeline)
    stages = tuple(one.range for one in pipeline.layout.stages)
    running = tuple(
        Resident(digest=MOE, node=one.node, state="ready", name=one.part.name, stages=stages)
        for one in pipeline.replicas()
    )
    row = only(plan(facts(16, 16, 16, residents=running)), MOE)
    assert isinstance(row.layout, Pipeline)
    assert explain(row).endswith("`--moe experts` asks for them in its place")
    wish = PlacementRequest(digest=MOE, owner=A, moe=Sharing.EXPERTS)
    asked = plan(facts(16, 16, 16, residents=running, wish=wish))
    assert isinstance(only(asked, MOE).layout, Experts)
    started = residents_of(only(asked, MOE), "loading", where=(A,))
    some = facts(16, 16, 16, residents=(*running, *started), wish=wish)
    assert plan(some) == asked


def test_shards_of_an_older_ranking_stay_while_it_is_good_enough() -> None:
    old = plan(facts(16, 16, 16))
    running = residents_of(only(old, MOE))
    newer = ShardQuality(ShardKind.EXPERTS, NEWER, PLACES, 6, 20_000, 950_000)
    both = facts(16, 16, 16, described=moe(A, B, C, known=(GOOD, newer)), residents=running)
    assert planned(plan(both)) == planned(old)
    alone = facts(16, 16, 16, described=moe(A, B, C, known=(newer,)), residents=running)
    assert {one.ranking for one in planned(plan(alone)).values()} == {NEWER}


def test_a_dead_node_leaves_the_others_as_they_are_but_one() -> None:
    before = plan(facts(16, 16, 16))
    running = residents_of(only(before, MOE), where=(A, B))
    after = planned(plan(facts(16, 16, described=moe(A, B), residents=running)))
    old = planned(before)
    assert sum(after[one] == old[one] for one in (A, B)) == 1


# What only one holder of several says.

LIE = ShardQuality(ShardKind.EXPERTS, NEWER, PLACES, 8, 0, 1_000_000)


def doubtful(*holders: NodeId, known: tuple[ShardQuality, ...] = ()) -> ModelFacts:
    return replace(moe(*holders, known=known), hearsay=(LIE,))


def test_what_one_says_starts_no_shards() -> None:
    row = only(plan(facts(16, 16, 16, described=doubtful(A, B, C))), MOE)
    assert isinstance(row.layout, Pipeline)
    assert "only one node says how good they are" in explain(row)
    row = only(plan(facts(16, 16, 16, described=doubtful(A, B, C, known=(GOOD,)))), MOE)
    assert isinstance(row.layout, Experts)
    assert row.layout.quality == GOOD, "however good the other may be"


def test_what_one_says_stops_no_shards_of_others() -> None:
    base = facts(16, 16, 16, described=doubtful(A, B, C, known=(GOOD,)))
    honest = residents_of(only(plan(base), MOE), where=(A, B))
    shard = Shard(*LIE[:4], 0xFF)
    lying = Resident(digest=MOE, node=C, state="ready", name=shard_name(MOE, shard), shard=shard)
    kept = planned(plan(replace(base, residents=(*honest, lying))))
    assert {one.ranking for one in kept.values()} == {RANKING}
    assert {A, B} <= kept.keys()


def test_shards_that_run_stay_when_only_one_can_make_them_any_more() -> None:
    running = residents_of(only(plan(facts(16, 16, 16)), MOE), where=(A, B))
    alone = replace(moe(A, B, C, known=()), hearsay=(GOOD,))
    base = facts(16, 16, 16, described=alone, residents=running)
    assert planned(plan(base)) == {one.node: one.shard for one in running}, "and no others start"
    again = facts(16, 16, 16, residents=running)
    assert planned(plan(again)).keys() == {A, B, C}


# Smaller quantisations.

SMALL, TINY = model("small"), model("tiny")


def quantised(
    *budgets: int,
    smaller: Mapping[ModelDigest, tuple[int, tuple[NodeId, ...]]],
    wish: PlacementRequest | None = None,
    residents: tuple[Resident, ...] = (),
    wanted: tuple[ModelDigest, ...] = (),
) -> PlacementInputs:
    """A model that fits nowhere, with quantisations of it: their need in GiB and holders."""
    base = facts(*budgets, wish=wish, residents=residents)
    [big] = base.models
    others = tuple(
        ModelFacts(digest=digest, need_bytes=need * GIB, holders=holders)
        for digest, (need, holders) in smaller.items()
    )
    digests = sorted(smaller, key=lambda digest: -smaller[digest][0])
    return replace(
        base,
        models=(replace(big, smaller=tuple(digests)), *others),
        wants=(*base.wants, *(PlacementRequest(digest=one, owner=B) for one in wanted)),
    )


def test_a_smaller_quantisation_that_fits_answers_for_a_model_that_does_not() -> None:
    base = quantised(16, 16, 16, smaller={SMALL: (12, (B,)), TINY: (8, (A, B, C))})
    result = plan(base)
    row, stands_in = only(result, MOE), only(result, SMALL)
    assert (row.nodes, row.reason, row.instead) == ((), Reason.SMALLER, SMALL)
    assert (stands_in.nodes, stands_in.copies) == ((B,), 1)
    assert only(result, TINY).copies == 0, "the largest that fits is the best"
    assert "a smaller quantisation of the same model answers for it" in explain(row)
    for state in STATES:
        running = (Resident(digest=SMALL, node=B, state=state),)
        assert plan(replace(base, residents=running)) == result


def test_one_that_does_not_fit_leaves_it_to_the_next_and_then_to_shards() -> None:
    base = quantised(16, 16, 16, smaller={SMALL: (17, (B,)), TINY: (8, (A,))})
    assert only(plan(base), MOE).instead == TINY
    base = quantised(16, 16, 16, smaller={SMALL: (17, (B,))})
    assert isinstance(only(plan(base), MOE).layout, Experts)


def test_only_auto_takes_a_smaller_quantisation() -> None:
    smaller = {SMALL: (12, (B,))}
    for sharing, layout in ((Sharing.EXPERTS, Experts), (Sharing.LAYERS, Pipeline)):
        wish = PlacementRequest(digest=MOE, owner=A, moe=sharing)
        row = only(plan(quantised(16, 16, 16, smaller=smaller, wish=wish)), MOE)
        assert isinstance(row.layout, layout)
        assert row.instead is None


def test_a_stand_in_makes_way_for_the_model_itself() -> None:
    running = (Resident(digest=SMALL, node=B, state="ready"),)
    base = quantised(16, 16, 16, 20, smaller={SMALL: (12, (B,))}, residents=running)
    result = plan(base)
    assert (only(result, MOE).nodes, only(result, MOE).instead) == ((D,), None)
    assert only(result, SMALL).copies == 0


def test_a_quantisation_that_somebody_wants_stands_in_as_well_and_stays() -> None:
    base = quantised(16, 16, 16, smaller={SMALL: (12, (B,))}, wanted=(SMALL,))
    result = plan(base)
    assert only(result, MOE).instead == SMALL
    assert only(result, SMALL).nodes == (B,)
    running = (Resident(digest=SMALL, node=B, state="ready"),)
    grown = quantised(16, 16, 16, 20, smaller={SMALL: (12, (B,))}, wanted=(SMALL,))
    result = plan(replace(grown, residents=running))
    assert only(result, MOE).nodes == (D,)
    assert only(result, SMALL).nodes == (B,)


def test_what_runs_already_stays_when_a_quantisation_comes() -> None:
    running = residents_of(only(plan(facts(16, 16, 16)), MOE))
    base = quantised(16, 16, 16, smaller={SMALL: (1, (B,))}, residents=running)
    assert isinstance(only(plan(base), MOE).layout, Experts)


@pytest.mark.parametrize("seed", range(200))
def test_any_part_of_a_plan_with_shards_leads_to_the_same_plan(seed: int) -> None:
    rng = Random(seed)
    base = facts(*(rng.randint(6, 18) for _ in range(rng.randint(2, 4))))
    small = ModelFacts(
        digest=OTHER, need_bytes=rng.randint(1, 8) * GIB, holders=tuple(n.node for n in base.nodes)
    )
    base = replace(
        base,
        models=(*base.models, small),
        wants=(*base.wants, PlacementRequest(digest=OTHER, owner=B, replicas=rng.randint(1, 2))),
    )
    result = plan(base)
    row, other = only(result, MOE), only(result, OTHER)
    started = [
        replace(one, state=rng.choice(STATES))
        for one in (residents_of(row) if isinstance(row.layout, Experts) else ())
        if rng.random() < 0.5
    ] + [
        Resident(digest=OTHER, node=one, state=rng.choice(STATES))
        for one in other.nodes
        if rng.random() < 0.5
    ]
    assert plan(replace(base, residents=tuple(started))) == result


def test_where_only_shards_will_do_a_pipeline_ends() -> None:
    described = moe(A, B, C, known=())
    pipeline = only(plan(facts(16, 16, 16, described=described)), MOE)
    wish = PlacementRequest(digest=MOE, owner=A, moe=Sharing.EXPERTS)
    base = facts(16, 16, 16, described=described, wish=wish)
    running = replace(base, residents=tuple(residents(pipeline)))
    assert only(plan(running), MOE).nodes == ()


def test_what_owners_say_of_experts_is_nothing_to_other_models() -> None:
    dense = replace(moe(A, B, C, known=()), expert_bytes=())
    for sharing in Sharing:
        wish = PlacementRequest(digest=MOE, owner=A, moe=sharing)
        base = facts(16, 16, 16, described=dense, wish=wish)
        row = only(plan(base), MOE)
        assert isinstance(row.layout, Pipeline)
        assert plan(replace(base, residents=tuple(residents(row)))) == plan(base)


# What a node does about it.


def test_a_node_starts_its_shard_and_leaves_the_one_that_it_runs() -> None:
    base = facts(16, 16, 16)
    result = plan(base)
    [start] = reconcile(me=A, plan=result, facts=base, running={}, proven=())
    assert isinstance(start, Start)
    assert start.shard == planned(result)[A]
    assert start.part.name == shard_name(MOE, planned(result)[A])
    running = residents_of(only(result, MOE), where=(A,))
    some = replace(base, residents=running)
    assert (
        reconcile(me=A, plan=plan(some), facts=some, running={start.part: "ready"}, proven=()) == ()
    )


def test_a_node_stops_a_shard_that_has_no_room_beside_the_one_that_replaces_it() -> None:
    base = facts(16, 16, 16)
    old = residents_of(only(plan(base), MOE), where=(A, B))
    some = facts(16, 16, described=moe(A, B), residents=old)
    result = plan(some)
    [changed] = (one for one in old if one.shard != planned(result)[one.node])
    running = {changed.part: "ready"}
    actions = reconcile(me=changed.node, plan=result, facts=some, running=running, proven=())
    assert [type(one) for one in actions] == [Stop]

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import UNMEASURED, Shard, ShardKind, ShardQuality, is_shard, shard_name
from p2pmesh.placement.assignment import Assignment, Reason
from p2pmesh.placement.experts import (
    SHARDS_MAX,
    Host,
    extended,
    good_enough,
    new_set,
    shard_bytes,
    shards_of,
)
from p2pmesh.placement.explain import explain
from p2pmesh.placement.facts import (
    ModelFacts,
    NodeFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
    ResidentState,
)
from p2pmesh.placement.layout import Experts, Pipeline, Whole
from p2pmesh.placement.plan import Plan, plan
from p2pmesh.placement.reconcile import Start, Stop, reconcile
from p2pmesh.placement.shape import Shape
from p2pmesh.sharing import DIVERGENCE_MAX, Sharing
from tests.placement.placement_strategies import GIB, STATES, model, node, only
from tests.placement.split_world import residents

A, B, C, D = (node(name) for name in "abcd")
MOE = model("moe")
OTHER = model("other")
RANKING, NEWER = "ab" * 32, "cd" * 32
PLACES = 16
GOOD = ShardQuality(ShardKind.EXPERTS, RANKING, PLACES, 8, 50_000, 930_000)
SHAPE = Shape((2 * GIB,) * 8, (GIB,) * 8, 4 * GIB, GIB, 4096)
NEED, EXPERTS = 20 * GIB, 16 * GIB  # a place is 1 GiB, and all else 4


def host(name: str, room: int, running: Shard | None = None, *, ready: bool = True) -> Host:
    return Host(node(name), room * GIB, NEED, EXPERTS, running, ready)


def sizes(shards: dict[NodeId, Shard]) -> dict[NodeId, int]:
    return {node: shard.size for node, shard in shards.items()}


def union(shards: dict[NodeId, Shard]) -> int:
    kept = 0
    for shard in shards.values():
        kept |= shard.kept
    return kept


rooms = st.lists(st.integers(0, 24), min_size=1, max_size=10)
qualities = st.builds(lambda critical: GOOD._replace(critical=critical), st.integers(1, PLACES - 1))


# A new set.


def test_each_has_the_critical_experts_and_a_share_of_the_others() -> None:
    shards = shards_of(GOOD, [host("a", 16), host("b", 16), host("c", 16)])
    assert sorted(sizes(shards).values()) == [10, 11, 11]
    assert union(shards) == 0xFFFF
    assert all(shard.kept & 0xFF == 0xFF for shard in shards.values())
    others = [shard.kept >> 8 for shard in shards.values()]
    assert sum(others) == 0xFF, "none of them twice"


def test_shares_follow_the_memory_of_the_nodes() -> None:
    shards = shards_of(GOOD, [host("a", 14), host("b", 18)])  # room for 10 and 14
    assert sizes(shards) == {node("a"): 10, node("b"): 14}


def test_a_node_with_room_for_the_critical_experts_alone_takes_part() -> None:
    shards = shards_of(GOOD, [host("a", 12), host("b", 20)])
    assert sizes(shards) == {A: 8, B: 16}
    assert shards_of(GOOD, [host("a", 12), host("b", 12)]) == {}, "others would live nowhere"


def test_there_is_no_set_where_experts_would_live_nowhere() -> None:
    assert shards_of(GOOD, [host("a", 15), host("b", 16)]) == {}  # 3 + 4 of 8 places
    assert shards_of(GOOD, [host("a", 30)]) == {}, "one node"
    assert shards_of(GOOD, []) == {}
    assert shards_of(GOOD, [Host(A, 9 * GIB, NEED, 0), Host(B, 9 * GIB, NEED, 3)]) == {}


@given(quality=qualities, rooms=rooms)
def test_a_set_fits_and_is_whole(quality: ShardQuality, rooms: list[int]) -> None:
    hosts = [host(f"{number}", room) for number, room in enumerate(rooms)]
    shards = shards_of(quality, hosts)
    assert not shards or union(shards) == 0xFFFF
    assert len(shards) <= SHARDS_MAX
    for one in hosts:
        if shard := shards.get(one.node):
            assert shard_bytes(NEED, EXPERTS, shard) <= one.room_bytes
            assert shard.kept & ((1 << quality.critical) - 1) == (1 << quality.critical) - 1


@given(quality=qualities, rooms=rooms, more=st.integers(0, 24))
def test_a_further_node_makes_no_shard_bigger(
    quality: ShardQuality, rooms: list[int], more: int
) -> None:
    hosts = [host(f"{number}", room) for number, room in enumerate(rooms)]
    before = sizes(shards_of(quality, hosts))
    after = sizes(shards_of(quality, [*hosts, host("new", more)]))
    assert all(after.get(one, 0) <= size for one, size in before.items())


# One that runs.


def running_set(*names: str, room: int = 16) -> dict[NodeId, Shard]:
    return shards_of(GOOD, [host(name, room) for name in names])


def test_a_node_that_joins_gets_its_share_and_moves_nothing() -> None:
    old = running_set("a", "b", "c")
    hosts = [host(name, 16, old[node(name)]) for name in "abc"]
    new = extended(GOOD, [*hosts, host("d", 16)])
    assert {one: shard for one, shard in new.items() if one != D} == old
    assert new[D].size == GOOD.critical + 2, "its share of eight others among four"


def test_of_those_that_stay_one_after_the_other_takes_what_is_lost() -> None:
    old = running_set("a", "b", "c")
    left = {name: old[node(name)] for name in "ab"}
    first = extended(GOOD, [host(name, 16, one) for name, one in left.items()])
    changed = [name for name in "ab" if first[node(name)] != left[name]]
    assert len(changed) == 1
    loading = [host(name, 16, first[node(name)], ready=name not in changed) for name in "ab"]
    assert extended(GOOD, loading) == first, "the other one waits"
    done = first
    for _ in range(2):
        done = extended(GOOD, [host(name, 16, done[node(name)]) for name in "ab"])
    assert union(done) == 0xFFFF
    assert extended(GOOD, [host(name, 16, done[node(name)]) for name in "ab"]) == done


def test_while_one_stops_for_its_larger_shard_the_others_stay() -> None:
    old = running_set("a", "b", "c")
    left = {name: old[node(name)] for name in "ab"}
    first = extended(GOOD, [host(name, 16, one) for name, one in left.items()])
    [changing] = [name for name in "ab" if first[node(name)] != left[name]]
    now = {**left, changing: None}
    assert extended(GOOD, [host(name, 16, one) for name, one in now.items()]) == first


def test_one_that_stays_takes_what_is_lost_when_one_that_joins_answers() -> None:
    stays = running_set("a", "b", "c")[A]
    joining = extended(GOOD, [host("a", 16, stays), host("b", 16)])
    assert joining[A] == stays
    assert extended(GOOD, [host("a", 16, stays), host("b", 16, joining[B], ready=False)]) == joining
    both = extended(GOOD, [host("a", 16, stays), host("b", 16, joining[B])])
    assert both[A] != stays
    assert union(both) == 0xFFFF


def test_a_node_that_joins_takes_what_is_lost() -> None:
    old = running_set("a", "b", "c")
    new = extended(GOOD, [*(host(name, 16, old[node(name)]) for name in "ab"), host("d", 16)])
    assert union(new) == 0xFFFF
    assert all(new[node(name)] == old[node(name)] for name in "ab")


def test_what_runs_goes_on_where_no_whole_set_fits_any_more() -> None:
    old = running_set("a", "b", "c", room=15)
    left = [host("a", 15, old[A])]
    assert extended(GOOD, left) == {A: old[A]}


@given(
    quality=qualities,
    rooms=rooms,
    started=st.sets(st.integers(0, 9)),
)
def test_any_part_of_a_set_that_runs_leads_to_the_same_set(
    quality: ShardQuality, rooms: list[int], started: set[int]
) -> None:
    hosts = [host(f"{number}", room) for number, room in enumerate(rooms)]
    shards = shards_of(quality, hosts)
    some = [
        one._replace(running=shards.get(one.node)) if number in started else one
        for number, one in enumerate(hosts)
    ]
    if any(one.running for one in some):
        assert extended(quality, some) == shards


# Thin shards.

THIN = GOOD._replace(kind=ShardKind.THIN, critical=10)


def test_every_node_with_room_for_a_thin_shard_runs_the_same() -> None:
    shards = shards_of(THIN, [host("a", 14), host("b", 30), host("c", 13)])
    assert sizes(shards) == {A: 10, B: 10}
    assert {shard.kept for shard in shards.values()} == {0x3FF}
    assert sizes(shards_of(THIN, [host("a", 14)])) == {A: 10}, "one is enough"
    running = host("a", 14, shards[A])
    assert extended(THIN, [running, host("b", 20)]) == shards, "a node that joins runs it too"
    assert extended(THIN, [running]) == {A: shards[A]}


def test_the_kinds_compete_by_the_size_that_is_good_enough() -> None:
    hosts = [host("a", 16), host("b", 16), host("c", 16)]
    for critical, kind in ((10, ShardKind.THIN), (12, ShardKind.EXPERTS)):
        found = new_set(MOE, [GOOD, THIN._replace(critical=critical)], hosts)
        assert found is not None
        assert found.quality.kind is kind, "whole experts take 11 places"


# Which quality.


def test_the_smallest_shards_that_are_good_enough_come_first() -> None:
    bad = GOOD._replace(critical=4, divergence=170_000)
    large = GOOD._replace(critical=12, divergence=10_000)
    guessed = GOOD._replace(critical=6, divergence=UNMEASURED)
    poor = GOOD._replace(critical=2, divergence=UNMEASURED, coverage=700_000)
    known = [large, bad, GOOD, guessed, poor]
    assert good_enough(known, DIVERGENCE_MAX) == [GOOD, large]
    assert good_enough(known, 200_000) == [bad, GOOD, large]
    assert good_enough([guessed, poor], DIVERGENCE_MAX, measured=False) == [guessed]
    assert good_enough(known, DIVERGENCE_MAX, measured=False) == [], "one was measured"
    assert good_enough([GOOD._replace(coverage=390_000)], DIVERGENCE_MAX) == [], "that is a lie"


# Plans.


def moe(
    *holders: NodeId, known: tuple[ShardQuality, ...] = (GOOD,), deep: bool = True
) -> ModelFacts:
    shape = SHAPE if deep else SHAPE._replace(layer_bytes=(), layer_reads=())
    return ModelFacts(
        digest=MOE,
        need_bytes=NEED,
        holders=holders,
        shapes=tuple((one, shape) for one in holders),
        expert_bytes=tuple((one, EXPERTS) for one in holders),
        qualities=known,
    )


def facts(
    *budgets: int,
    described: ModelFacts | None = None,
    wish: PlacementRequest | None = None,
    residents: tuple[Resident, ...] = (),
) -> PlacementInputs:
    ids = [A, B, C, D][: len(budgets)]
    return PlacementInputs(
        nodes=tuple(
            NodeFacts(node=one, budget_bytes=budget * GIB, rpc="7.0.0", may_head=True)
            for one, budget in zip(ids, budgets, strict=True)
        ),
        models=(described or moe(*ids),),
        wants=(wish or PlacementRequest(digest=MOE, owner=A),),
        residents=residents,
    )


def residents_of(
    assignment: Assignment, state: ResidentState = "ready", *, where: tuple[NodeId, ...] = ()
) -> tuple[Resident, ...]:
    assert isinstance(assignment.layout, Experts)
    return tuple(
        Resident(
            digest=MOE,
            node=one.node,
            state=state,
            name=shard_name(MOE, one.shard),
            shard=one.shard,
        )
        for one in assignment.layout.shards
        if not where or one.node in where
    )


def planned(result: Plan) -> dict[NodeId, Shard]:
    layout = only(result, MOE).layout
    return {one.node: one.shard for one in layout.shards} if isinstance(layout, Experts) else {}


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
    for moe, layout in ((Sharing.EXPERTS, Experts), (Sharing.LAYERS, Pipeline)):
        wish = PlacementRequest(digest=MOE, owner=A, moe=moe)
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

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import PartId
from p2pmesh.placement.assignment import Reason
from p2pmesh.placement.explain import explain
from p2pmesh.placement.facts import (
    ModelFacts,
    NodeFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
    facts_digest,
)
from p2pmesh.placement.plan import Plan, plan
from p2pmesh.placement.rendezvous import rank
from tests.placement.placement_strategies import (
    GIB,
    MIB,
    STATES,
    actions_of,
    after,
    any_facts,
    described,
    facts_of,
    loading,
    model,
    node,
    only,
    ready,
    want,
)

A, B, C = node("a"), node("b"), node("c")
NAMES = {A: "attic", B: "bench", C: "cellar"}
BIG, SMALL, DEMO = model("big"), model("small"), model("demo")


# What always holds.


@settings(max_examples=400)
@given(any_facts, st.data())
def test_any_part_of_a_plan_leads_to_the_same_plan(
    facts: PlacementInputs, data: st.DataObject
) -> None:
    wanted = plan(facts)
    starts, stops = actions_of(wanted, facts)
    started = {
        Resident(node=n, digest=digest, state=data.draw(st.sampled_from(STATES)))
        for n, digest in starts
        if data.draw(st.booleans())
    }
    stopped = {stop for stop in stops if data.draw(st.booleans())}
    again = plan(after(facts, started, stopped))
    assert again.encode() == wanted.encode()
    assert again == wanted, "the figures of the reasons differ"


@settings(max_examples=400)
@given(any_facts)
def test_a_plan_fits_and_gives_what_is_wanted(facts: PlacementInputs) -> None:
    result = plan(facts)
    budgets = {part.node: part.budget_bytes for part in facts.nodes}
    models = {part.digest: part for part in facts.models}
    holders = {part.digest: part.holders for part in facts.models}
    running = {(part.digest, part.node) for part in facts.residents}
    used = dict.fromkeys(budgets, 0)
    for assignment in result.assignments:
        assert len(assignment.nodes) <= assignment.copies
        assert list(assignment.nodes) == sorted(set(assignment.nodes))
        for n in assignment.nodes:
            used[n] += models[assignment.digest].need_on(n) if assignment.digest in models else 0
            assert n in holders.get(assignment.digest, ()) or (assignment.digest, n) in running
    assert all(used[n] <= budgets[n] for n in budgets if used[n])
    if not any(part.fallback for part in facts.models):
        wanted = {part.digest for part in facts.wants}
        assert {a.digest for a in result.assignments if a.copies} == wanted


@settings(max_examples=400)
@given(any_facts)
def test_a_place_is_left_empty_only_for_the_reason_given(facts: PlacementInputs) -> None:
    result = plan(facts)
    budgets = {part.node: part.budget_bytes for part in facts.nodes}
    rows = result.assignments
    for row in rows:
        holders = [n for part in facts.models for n in part.holders if part.digest == row.digest]
        free = [n for n in holders if n in budgets and n not in row.nodes]
        if row.reason in {Reason.UNWANTED, Reason.STANDBY}:
            assert row.copies == 0
        elif row.reason is Reason.PLACED:
            assert len(row.nodes) == row.copies
        elif row.reason is Reason.NO_HOLDER:
            assert not free
            assert not row.nodes
        elif row.reason is Reason.FEW_HOLDERS:
            assert not free
            assert 0 < len(row.nodes) < row.copies
        elif row.reason is Reason.TOO_LARGE:
            (described,) = (part for part in facts.models if part.digest == row.digest)
            assert all(budgets[n] < described.need_on(n) for n in free)
            assert row.roomiest is not None
            assert row.room_bytes == budgets[row.roomiest] < row.need_bytes
        else:
            assert row.room_bytes < row.need_bytes
            assert bool(row.nodes) == (row.reason is Reason.LITTLE_ROOM)
        assert explain(row)


@given(any_facts)
def test_facts_without_running_copies_still_give_one_digest_per_plan(
    facts: PlacementInputs,
) -> None:
    result = plan(facts)
    assert result.digest == plan(replace(facts)).digest


@settings(max_examples=200)
@given(any_facts, st.data())
def test_a_node_that_goes_moves_only_what_it_had(
    facts: PlacementInputs, data: st.DataObject
) -> None:
    """With room for everything, the loss of one node changes the places on no other."""
    roomy = replace(
        facts, nodes=tuple(replace(part, budget_bytes=100 * GIB) for part in facts.nodes)
    )
    before = plan(roomy)
    settled = after(roomy, {ready(n, a.digest) for a in before.assignments for n in a.nodes}, set())
    if not roomy.nodes:
        return
    gone = data.draw(st.sampled_from(roomy.nodes)).node
    left = replace(settled, nodes=tuple(part for part in settled.nodes if part.node != gone))
    for row in plan(left).assignments:
        assert {n for n in only(before, row.digest).nodes if n != gone} <= set(row.nodes)


# The rules, one by one.


def test_one_copy_goes_to_the_first_of_the_rendezvous_order() -> None:
    budgets = {A: 64 * GIB, B: 16 * GIB, C: 8 * GIB}
    facts = facts_of(budgets, [described(SMALL, GIB, A, B, C)], [want(SMALL)])
    first = rank(SMALL, [(n, budget // MIB) for n, budget in budgets.items()])[0]
    row = only(plan(facts), SMALL)
    assert row.nodes == (first,)
    assert explain(row, NAMES.__getitem__) == "1 of 1 copy"


def test_the_most_demanding_want_counts() -> None:
    wants = [want(SMALL, 2, 1), want(SMALL, 1, 5, owner=B), want(BIG, 1, 3)]
    facts = facts_of(
        {A: 4 * GIB, B: 4 * GIB}, [described(SMALL, GIB, A, B), described(BIG, GIB, A)], wants
    )
    result = plan(facts)
    assert [a.digest for a in result.assignments] == [SMALL, BIG]
    assert only(result, SMALL).nodes == tuple(sorted((A, B)))
    assert explain(only(result, SMALL), NAMES.__getitem__) == "2 of 2 copies"


def test_less_than_one_copy_counts_as_one() -> None:
    facts = facts_of({A: GIB}, [described(SMALL, GIB, A)], [want(SMALL, 0)])
    assert only(plan(facts), SMALL).nodes == (A,)


@pytest.mark.parametrize("keeper", [A, B, C], ids="abc")
def test_a_running_copy_stays_wherever_it_is(keeper: NodeId) -> None:
    facts = facts_of(
        {A: 64 * GIB, B: 8 * GIB, C: 8 * GIB},
        [described(SMALL, GIB, A, B, C)],
        [want(SMALL)],
        [loading(keeper, SMALL)],
    )
    assert only(plan(facts), SMALL).nodes == (keeper,)


@pytest.mark.parametrize("keeper", [A, B, C], ids="abc")
def test_ready_is_kept_before_loading(keeper: NodeId) -> None:
    states = [ready(n, SMALL) if n == keeper else loading(n, SMALL) for n in (A, B, C)]
    facts = facts_of(
        {A: GIB, B: GIB, C: GIB}, [described(SMALL, GIB, A, B, C)], [want(SMALL)], states
    )
    assert only(plan(facts), SMALL).nodes == (keeper,)


def test_a_larger_newcomer_of_equal_priority_moves_nobody() -> None:
    facts = facts_of(
        {A: 8 * GIB},
        [described(SMALL, 2 * GIB, A), described(BIG, 7 * GIB, A)],
        [want(SMALL), want(BIG)],
        [ready(A, SMALL)],
    )
    result = plan(facts)
    assert only(result, SMALL).nodes == (A,)
    assert explain(only(result, BIG), NAMES.__getitem__) == (
        "needs 7.0 GiB, the largest free budget of a node that holds it is 6.0 GiB on attic: the"
        " rest is taken by models that run there or have a higher priority"
    )


def test_a_higher_priority_takes_the_room() -> None:
    facts = facts_of(
        {A: 8 * GIB, B: 2 * GIB},
        [described(SMALL, 2 * GIB, A, B), described(BIG, 7 * GIB, A)],
        [want(SMALL), want(BIG, 1, 1)],
        [ready(A, SMALL)],
    )
    result = plan(facts)
    assert only(result, BIG).nodes == (A,)
    assert only(result, SMALL).nodes == (B,)


def test_an_overcommitted_node_keeps_the_higher_priority() -> None:
    facts = facts_of(
        {A: 3 * GIB},
        [described(SMALL, 2 * GIB, A), described(BIG, 3 * GIB, A)],
        [want(SMALL, 1, 1), want(BIG)],
        [ready(A, SMALL), ready(A, BIG)],
    )
    result = plan(facts)
    assert result.on(A) == (PartId(SMALL),)
    assert only(result, BIG).reason is Reason.NO_ROOM


def test_a_plan_from_scratch_packs_the_larger_first() -> None:
    facts = facts_of(
        {A: 8 * GIB, B: 2 * GIB},
        [described(SMALL, 2 * GIB, A, B), described(BIG, 8 * GIB, A)],
        [want(SMALL), want(BIG)],
    )
    result = plan(facts)
    assert result.on(A) == (PartId(BIG),)
    assert result.on(B) == (PartId(SMALL),)


def test_what_runs_on_dead_nodes_does_not_count() -> None:
    facts = facts_of({B: 8 * GIB}, [described(SMALL, GIB, A, B)], [want(SMALL)], [ready(A, SMALL)])
    assert only(plan(facts), SMALL).nodes == (B,)


def test_a_running_copy_of_a_model_that_nobody_describes_stays() -> None:
    facts = facts_of({A: GIB, B: GIB}, [], [want(SMALL)], [ready(A, SMALL)])
    assert only(plan(facts), SMALL).nodes == (A,)


# The embedded model.


def demo(*wants: PlacementRequest, holders: tuple[NodeId, ...] = (A, B)) -> Plan:
    models = [
        ModelFacts(digest=DEMO, need_bytes=MIB, holders=holders, fallback=True),
        described(SMALL, GIB, A),
    ]
    return plan(facts_of({A: GIB, B: GIB}, models, wants))


def test_the_fallback_runs_while_nobody_wants_another() -> None:
    assert len(only(demo(), DEMO).nodes) == 1
    assert explain(only(demo(), SMALL), NAMES.__getitem__) == "nobody wants it"
    other = only(demo(want(SMALL)), DEMO)
    assert other.nodes == ()
    assert (
        explain(other, NAMES.__getitem__)
        == "served only while no other model that is wanted has a place"
    )


@pytest.mark.parametrize(
    "wish", [want(BIG), want(model("nobody has it"))], ids=["too large", "no file"]
)
def test_the_fallback_runs_while_nothing_that_is_wanted_can(wish: PlacementRequest) -> None:
    models = [
        ModelFacts(digest=DEMO, need_bytes=MIB, holders=(A, B), fallback=True),
        described(BIG, 9 * GIB, A),
    ]
    row = only(plan(facts_of({A: GIB, B: GIB}, models, [wish])), DEMO)
    assert len(row.nodes) == 1
    assert row.reason is Reason.PLACED


def test_the_fallback_takes_no_room_from_what_is_wanted() -> None:
    models = [
        ModelFacts(digest=DEMO, need_bytes=GIB, holders=(A,), fallback=True),
        described(BIG, 2 * GIB, A),
    ]
    running = [ready(A, DEMO)]
    result = plan(facts_of({A: 2 * GIB}, models, [want(BIG)], running))
    assert result.on(A) == (PartId(BIG),)


def test_a_huge_budget_draws_no_more_models_than_a_large_one() -> None:
    models = [model(f"many {number}") for number in range(400)]
    facts = facts_of(
        {A: 2**63, B: 8 * GIB},
        [described(digest, GIB, A, B) for digest in models[:8]],
        [want(digest) for digest in models[:8]],
    )
    assert plan(facts).on(A)
    taken = 0
    for digest in models:
        one = facts_of({A: 2**63, B: 8 * GIB}, [described(digest, GIB, A, B)], [want(digest)])
        taken += only(plan(one), digest).nodes == (A,)
    assert 150 < taken < 250, "weights beyond eight copies count alike"


def test_what_a_node_says_of_a_model_counts_on_that_node_only() -> None:
    liar = replace(described(SMALL, GIB, A, B), own_needs=((B, 2**62),))
    facts = facts_of({A: GIB, B: 2**62 - 1}, [liar], [want(SMALL)], [ready(A, SMALL)])
    assert only(plan(facts), SMALL).nodes == (A,)
    alone = facts_of({B: 2**62 - 1}, [liar], [want(SMALL)])
    row = only(plan(alone), SMALL)
    assert (row.reason, row.need_bytes, row.roomiest) == (Reason.TOO_LARGE, 2**62, B)


def test_the_fallback_can_be_asked_for_like_any_model() -> None:
    assert len(only(demo(want(DEMO, 2)), DEMO).nodes) == 2
    assert len(only(demo(want(DEMO), want(SMALL)), DEMO).nodes) == 1


# Equal facts, equal bytes: on every Python and platform, for ever.


GOLDEN_FACTS = "ba7832b7843dc53fca85106ad95cfe3e"
GOLDEN_PLAN = "7d79d3e2c6a74ac0ce4f76e78b82d7ba"
GOLDEN_EMPTY = "e2bbe909cc3d350d9871e37500a41110"
GOLDEN_REASONS = {Reason.LITTLE_ROOM, Reason.PLACED, Reason.STANDBY, Reason.TOO_LARGE}


def golden_facts() -> PlacementInputs:
    """A mixed world in which every rule has something to do."""
    nodes = [node(f"golden {number}") for number in range(12)]
    models = [model(f"golden {number}") for number in range(9)]
    return PlacementInputs(
        nodes=tuple(
            NodeFacts(node=n, budget_bytes=(8 << (number % 4)) * GIB - number)
            for number, n in enumerate(nodes[:11])
        ),
        models=tuple(
            ModelFacts(
                digest=digest,
                need_bytes=(number * number + 1) * GIB + number,
                holders=tuple(nodes[(number * 5 + step * 3) % 12] for step in range(7)),
                fallback=number == 8,
                own_needs=((nodes[number * 5 % 12], (number * number + 2) * GIB),),
            )
            for number, digest in enumerate(models)
        ),
        wants=tuple(
            PlacementRequest(
                owner=nodes[number * 7 % 12],
                digest=models[number % 8],
                replicas=number % 4,
                priority=number % 3 - 1,
            )
            for number in range(13)
        ),
        residents=tuple(
            Resident(
                node=nodes[number * 5 % 12],
                digest=models[number * 2 % 9],
                state=STATES[number % 2],
            )
            for number in range(10)
        ),
    )


def test_golden_vectors() -> None:
    facts = golden_facts()
    result = plan(facts)
    assert {a.reason for a in result.assignments} == GOLDEN_REASONS
    assert facts_digest(facts).hex() == GOLDEN_FACTS
    assert result.digest.hex() == GOLDEN_PLAN
    assert plan(PlacementInputs()).digest.hex() == GOLDEN_EMPTY

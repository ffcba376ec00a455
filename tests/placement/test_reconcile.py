from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import PartId, ReplicaKey
from p2pmesh.placement.facts import (
    ModelFacts,
    NodeFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
    ResidentState,
)
from p2pmesh.placement.layout import Pipeline
from p2pmesh.placement.plan import plan
from p2pmesh.placement.reconcile import Action, Check, Start, Stop, StopReason, reconcile
from tests.placement.placement_strategies import GIB, any_facts, facts_of, model, node
from tests.placement.split_world import engine, layered, residents

A, B, C = sorted(node(name) for name in "abc")
D = node("d")
HIGH, LOW = model("high"), model("low")


def actions(me: NodeId, facts: PlacementInputs, **running: str) -> tuple[Action, ...]:
    """What a node does that others have proved all they say."""
    states = {PartId(model(name)): state for name, state in running.items()}
    proven = {ReplicaKey(one.node, one.part) for one in facts.residents}
    return reconcile(me=me, plan=plan(facts), facts=facts, running=states, proven=proven)


def world(
    nodes: dict[NodeId, int],
    wants: dict[ModelDigest, tuple[int, int]],
    *residents: tuple[NodeId, ModelDigest, ResidentState],
    need_bytes: int = 2 * GIB,
) -> PlacementInputs:
    """Nodes by budget, wants as (copies, priority); everybody holds both models."""
    return facts_of(
        nodes,
        [
            ModelFacts(digest=digest, need_bytes=need_bytes, holders=tuple(nodes))
            for digest in (HIGH, LOW)
        ],
        [
            PlacementRequest(owner=A, digest=d, replicas=r, priority=p)
            for d, (r, p) in wants.items()
        ],
        [Resident(node=n, digest=d, state=state) for n, d, state in residents],
    )


def test_what_the_plan_has_here_is_started_once() -> None:
    facts = world({A: 4 * GIB}, {LOW: (1, 0)})
    assert actions(A, facts) == (Start(part=PartId(LOW)),)
    for state in ("loading", "ready", "failed", "stopping"):
        assert actions(A, facts, low=state) == ()


def test_what_nobody_wants_is_stopped_at_once() -> None:
    facts = world({A: 4 * GIB}, {}, (A, LOW, "ready"))
    stop = Stop(part=PartId(LOW), reason=StopReason.UNWANTED)
    assert actions(A, facts, low="ready") == (stop,)
    assert actions(A, facts, low="stopping") == ()
    unknown = Stop(part=PartId(model("unheard")), reason=StopReason.UNWANTED)
    assert actions(A, facts, unheard="loading") == (unknown,)


def test_of_two_copies_too_many_exactly_one_goes() -> None:
    facts = world({A: 4 * GIB, B: 4 * GIB}, {LOW: (1, 0)}, (A, LOW, "ready"), (B, LOW, "ready"))
    both = [actions(n, facts, low="ready") for n in (A, B)]
    assert sorted(both, key=len) == [(), (Stop(part=PartId(LOW), reason=StopReason.MOVED),)]


def test_a_copy_goes_only_when_the_planned_ones_are_ready() -> None:
    for state, expected in (("loading", 0), ("ready", 1)):
        early = world(
            {A: 2 * GIB, B: 2 * GIB},
            {HIGH: (1, 1), LOW: (1, 0)},
            (A, HIGH, "loading"),
            (A, LOW, "ready"),
            (B, LOW, "ready" if state == "ready" else "loading"),
        )
        assert plan(early).on(A) == (PartId(HIGH),)
        assert plan(early).on(B) == (PartId(LOW),)
        # HIGH still needs LOW's memory here: only the signed `ready` of B lets LOW go.
        assert len(actions(A, early, low="ready")) == expected


def test_a_copy_goes_only_when_all_planned_ones_are_ready() -> None:
    budgets = {A: 4 * GIB, B: 4 * GIB, C: 4 * GIB}
    running = [(A, LOW), (B, LOW), (C, LOW)]
    loading = world(budgets, {LOW: (2, 0)}, *((n, d, "loading") for n, d in running))
    (spare,) = {A, B, C} - {n for a in plan(loading).assignments for n in a.nodes}
    first = next(n for n in (A, B, C) if n != spare)
    for ready, expected in (((first,), 0), ((A, B, C), 1)):
        facts = world(
            budgets,
            {LOW: (2, 0)},
            *((n, d, "ready" if n in ready else "loading") for n, d in running),
        )
        assert spare not in {n for a in plan(facts).assignments for n in a.nodes}
        assert len(actions(spare, facts, low="loading")) == expected


def test_a_copy_stays_until_the_planned_ones_have_answered() -> None:
    facts = world(
        {A: 4 * GIB, B: 4 * GIB, C: 4 * GIB},
        {LOW: (2, 0)},
        *((n, LOW, "ready") for n in (A, B, C)),
    )
    result = plan(facts)
    (spare,) = {A, B, C} - {n for a in result.assignments for n in a.nodes}
    first, second = sorted({A, B, C} - {spare})

    def now(*proven: NodeId) -> tuple[Action, ...]:
        answered = {ReplicaKey(n, PartId(LOW)) for n in proven}
        return reconcile(
            me=spare, plan=result, facts=facts, running={PartId(LOW): "ready"}, proven=answered
        )

    assert now() == (
        Check(replica=ReplicaKey(first, PartId(LOW))),
        Check(replica=ReplicaKey(second, PartId(LOW))),
    )
    assert now(first) == (Check(replica=ReplicaKey(second, PartId(LOW))),)
    assert now(first, second) == (Stop(part=PartId(LOW), reason=StopReason.MOVED),)


def test_nobody_is_asked_who_does_not_say_ready() -> None:
    facts = world({A: 2 * GIB, B: 4 * GIB}, {LOW: (1, 0)}, (A, LOW, "loading"), (B, LOW, "ready"))
    assert plan(facts).on(B) == (PartId(LOW),)
    running = {PartId(LOW): "ready"}
    checks = reconcile(me=A, plan=plan(facts), facts=facts, running=running, proven=())
    assert checks == (Check(replica=ReplicaKey(B, PartId(LOW))),)
    silent = world({A: 2 * GIB, B: 4 * GIB}, {LOW: (1, 0)}, (B, LOW, "loading"))
    assert plan(silent).on(B) == (PartId(LOW),)
    assert reconcile(me=A, plan=plan(silent), facts=silent, running=running, proven=()) == ()


def test_what_a_copy_takes_here_is_what_this_node_says_itself() -> None:
    mine = ModelFacts(
        digest=LOW, need_bytes=2**62, holders=(A, B), own_needs=((A, 2 * GIB), (B, 2**62))
    )
    facts = facts_of({A: 4 * GIB, B: 2**63}, [mine], [PlacementRequest(owner=B, digest=LOW)])
    running = {PartId(LOW): "ready"}
    resident = facts_of(
        {A: 4 * GIB, B: 2**63},
        [mine],
        [PlacementRequest(owner=B, digest=LOW)],
        [Resident(node=A, digest=LOW, state="ready")],
    )
    assert plan(resident).on(A) == (PartId(LOW),)
    assert reconcile(me=A, plan=plan(resident), facts=resident, running=running, proven=()) == ()
    assert plan(facts).on(A) == (PartId(LOW),) or plan(facts).on(B) == (PartId(LOW),)


def test_a_start_waits_until_its_memory_is_free() -> None:
    facts = world({A: 3 * GIB}, {HIGH: (1, 1), LOW: (1, 0)}, (A, LOW, "ready"))
    evict = Stop(part=PartId(LOW), reason=StopReason.EVICTED)
    assert actions(A, facts, low="ready") == (evict,)
    assert actions(A, facts, low="stopping") == ()
    assert actions(A, facts) == (Start(part=PartId(HIGH)),)


def test_starts_come_in_the_order_of_the_plan_as_far_as_they_fit() -> None:
    facts = world({A: 4 * GIB}, {LOW: (1, 0), HIGH: (1, 1)})
    assert actions(A, facts) == (Start(part=PartId(HIGH)), Start(part=PartId(LOW)))
    assert actions(A, facts, going="stopping") == (
        Start(part=PartId(HIGH)),
        Start(part=PartId(LOW)),
    )


def test_a_node_over_its_budget_does_not_wait_for_others() -> None:
    facts = world(
        {A: 2 * GIB, B: 2 * GIB},
        {HIGH: (1, 1), LOW: (1, 0)},
        (A, HIGH, "ready"),
        (A, LOW, "ready"),
    )
    assert plan(facts).on(B) == (PartId(LOW),)
    evict = Stop(part=PartId(LOW), reason=StopReason.EVICTED)
    assert actions(A, facts, high="ready", low="ready") == (evict,)
    assert actions(A, facts, high="ready", low="stopping") == ()


def test_a_failed_copy_that_the_plan_has_elsewhere_goes() -> None:
    facts = world({A: 4 * GIB, B: 4 * GIB}, {LOW: (1, 0)}, (B, LOW, "loading"))
    assert actions(A, facts, low="failed") == (Stop(part=PartId(LOW), reason=StopReason.FAILED),)
    assert actions(A, facts, low="loading") == ()


def test_a_node_that_does_not_count_as_live_changes_nothing() -> None:
    facts = world({B: 4 * GIB}, {LOW: (1, 0)}, (B, LOW, "ready"))
    assert actions(A, facts, low="ready", high="ready") == ()


@given(any_facts)
def test_actions_do_not_depend_on_the_order_of_processes(facts: PlacementInputs) -> None:
    result = plan(facts)
    for part in facts.nodes:
        mine: dict[PartId, str] = {
            one.part: one.state for one in facts.residents if one.node == part.node
        }
        backwards = dict(reversed(mine.items()))
        one = reconcile(me=part.node, plan=result, facts=facts, running=mine, proven=())
        assert one == reconcile(
            me=part.node, plan=result, facts=facts, running=backwards, proven=()
        )
        changed = [action.part for action in one if not isinstance(action, Check)]
        assert len(set(changed)) == len(changed)
        assert not {a.replica.part for a in one if isinstance(a, Check)}.intersection(changed)


# Pipelines.

NINE = 9 * GIB


def pipeline_world(
    *nodes: NodeFacts, split: int = 2, wanted: bool = True, here: Iterable[Resident] = ()
) -> PlacementInputs:
    """The model HIGH, which A and B hold, to be split."""
    wish = PlacementRequest(owner=A, digest=HIGH, split=split)
    return PlacementInputs(
        nodes=nodes or tuple(engine(n, NINE) for n in (A, B, C)),
        models=(layered(HIGH, A, B),),
        wants=(wish,) if wanted else (),
        residents=tuple(here),
    )


def parts_of(facts: PlacementInputs) -> tuple[ReplicaKey, ...]:
    (assignment,) = plan(facts).assignments
    return tuple(assignment.replicas())


def turn(
    one: ReplicaKey,
    facts: PlacementInputs,
    running: Mapping[PartId, str],
    proven: Collection[ReplicaKey] = (),
) -> tuple[Action, ...]:
    return reconcile(me=one.node, plan=plan(facts), facts=facts, running=running, proven=proven)


def test_stages_start_first_and_the_head_when_all_are_ready() -> None:
    facts = pipeline_world(split=3)
    (assignment,) = plan(facts).assignments
    assert isinstance(assignment.layout, Pipeline)
    head, *behind = assignment.replicas()
    start = Start(part=head.part, stages=assignment.layout.stages)
    for one in behind:
        assert turn(one, facts, {}) == (Start(part=one.part, stages=assignment.layout.stages),)
    both = residents(assignment, only=(1, 2))
    for here, expected in (
        ([], ()),
        (both[:1], ()),
        ([both[0], replace(both[1], state="loading")], ()),
        (both, (start,)),
    ):
        assert turn(head, replace(facts, residents=tuple(here)), {}) == expected


@pytest.mark.parametrize("state", ["loading", "ready", "failed"])
def test_a_head_whose_stage_is_not_ready_any_more_is_stopped_and_the_stages_stay(
    state: str,
) -> None:
    facts = pipeline_world(split=3)
    (assignment,) = plan(facts).assignments
    head, tail, _ = assignment.replicas()
    mine, _, third = residents(assignment)
    for lost in ([mine, third], [mine, third, replace(mine, node=tail.node, state="loading")]):
        broken = replace(facts, residents=tuple(lost))
        assert plan(broken).assignments[0].layout == assignment.layout
        stop = Stop(part=head.part, reason=StopReason.BROKEN)
        assert turn(head, broken, {head.part: state}) == (stop,)
        assert turn(head, broken, {head.part: "stopping"}) == ()
        assert turn(tail, broken, {tail.part: "loading"}) == ()


def test_a_unit_of_which_a_node_is_gone_ends_at_once_everywhere() -> None:
    facts = pipeline_world()
    (assignment,) = plan(facts).assignments
    head, tail = assignment.replicas()
    others = tuple(one for one in facts.nodes if one.node != tail.node)
    left = replace(facts, nodes=others, residents=tuple(residents(assignment, only=(0,))))
    assert plan(left).assignments[0].layout != assignment.layout
    (stop, *_) = turn(head, left, {head.part: "ready"})
    assert stop == Stop(part=head.part, reason=StopReason.BROKEN)


def test_a_unit_that_nobody_wants_or_that_another_needs_the_nodes_of_ends_as_one() -> None:
    facts = pipeline_world()
    (assignment,) = plan(facts).assignments
    here = residents(assignment)
    for worse, reason in (
        (pipeline_world(wanted=False, here=here), StopReason.UNWANTED),
        (pipeline_world(split=3, here=here), StopReason.EVICTED),
        (pipeline_world(split=8, here=here), StopReason.EVICTED),
    ):
        for one in assignment.replicas():
            (stop, *_) = turn(one, worse, {one.part: "ready"})
            assert stop == Stop(part=one.part, reason=reason)


def test_a_unit_stays_until_another_elsewhere_answers() -> None:
    old = pipeline_world(engine(A, NINE), engine(C, NINE))
    (assignment,) = plan(old).assignments
    others = (engine(A, NINE, rpc="8.0.0"), engine(B, NINE), engine(D, 2 * NINE))
    nodes = (engine(C, NINE), *others)
    here = residents(assignment)
    facts = pipeline_world(*nodes, here=here)
    (planned,) = plan(facts).assignments
    assert set(planned.nodes).isdisjoint(assignment.nodes)
    head, tail = planned.replicas()
    ready = replace(facts, residents=(*here, *residents(planned)))
    for one in assignment.replicas():
        assert turn(one, facts, {one.part: "ready"}) == ()
        assert turn(one, ready, {one.part: "ready"}) == (Check(replica=head),)
        assert turn(one, ready, {one.part: "ready"}, [tail]) == (Check(replica=head),)
        moved = Stop(part=one.part, reason=StopReason.MOVED)
        assert turn(one, ready, {one.part: "ready"}, [head]) == (moved,)


def test_a_whole_copy_stays_until_the_head_of_its_pipeline_answers() -> None:
    copy = Resident(digest=HIGH, node=C, state="ready")
    facts = pipeline_world(engine(A, NINE), engine(B, NINE), engine(C, NINE), here=[copy])
    (assignment,) = plan(facts).assignments
    assert C not in assignment.nodes
    head, _ = assignment.replicas()
    whole = ReplicaKey(C, PartId(HIGH))
    for here in ([], residents(assignment, only=(1,)), residents(assignment, "loading")):
        now = replace(facts, residents=(copy, *here))
        assert turn(whole, now, {PartId(HIGH): "ready"}, [head]) == ()
    now = replace(facts, residents=(copy, *residents(assignment)))
    assert turn(whole, now, {PartId(HIGH): "ready"}) == (Check(replica=head),)
    stop = Stop(part=PartId(HIGH), reason=StopReason.MOVED)
    assert turn(whole, now, {PartId(HIGH): "ready"}, [head]) == (stop,)


def test_a_whole_copy_beside_its_own_head_goes_when_the_head_is_ready_here() -> None:
    copy = Resident(digest=HIGH, node=A, state="ready")
    facts = pipeline_world(engine(A, 16 * GIB), engine(C, NINE), here=[copy])
    (assignment,) = plan(facts).assignments
    head, tail = assignment.replicas()
    assert (head.node, tail.node) == (A, C)
    now = replace(facts, residents=(copy, *residents(assignment)))
    for state, expected in (("loading", 0), ("ready", 1)):
        running = {PartId(HIGH): "ready", head.part: state}
        assert len(turn(head, now, running)) == expected


def test_a_stage_of_which_no_record_tells_its_size_any_more_keeps_its_memory() -> None:
    facts = world({A: 4 * GIB}, {LOW: (1, 0)})
    gone = PartId(HIGH, f"stage-{'0' * 16}-1")
    running = {gone: "stopping"}
    assert reconcile(me=A, plan=plan(facts), facts=facts, running=running, proven=()) == ()


def test_two_models_that_wait_for_each_others_memory_do_not_wait_for_ever() -> None:
    """HIGH is to go from A to B and LOW from B to A, since FIRST needs room on A."""
    first = model("first")
    holders = {first: (A,), HIGH: (A, B), LOW: (A, B)}
    sizes = {first: 2, HIGH: 3, LOW: 2}
    facts = facts_of(
        {A: 4 * GIB, B: 4 * GIB},
        [
            ModelFacts(digest=d, need_bytes=sizes[d] * GIB, holders=where)
            for d, where in holders.items()
        ],
        [
            PlacementRequest(owner=A, digest=d, priority=priority)
            for d, priority in ((first, 2), (HIGH, 1), (LOW, 0))
        ],
        [Resident(node=A, digest=HIGH, state="ready"), Resident(node=B, digest=LOW, state="ready")],
    )
    assert plan(facts).on(A) == (PartId(first), PartId(LOW))
    assert plan(facts).on(B) == (PartId(HIGH),)
    stop = Stop(part=PartId(LOW), reason=StopReason.EVICTED)
    here = actions(B, facts, low="ready")
    assert here == (stop,)

"""Small worlds for the tests of pipelines: nodes with engines, and models in layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import ReplicaKey
from p2pmesh.placement.assignment import Assignment
from p2pmesh.placement.facts import (
    ModelFacts,
    NodeFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
    ResidentState,
)
from p2pmesh.placement.layout import Pipeline, Whole
from p2pmesh.placement.plan import Plan
from p2pmesh.placement.shape import Shape
from tests.placement.placement_strategies import GIB, MIB, MODELS, NODES, STATES

EVEN = Shape((GIB,) * 8, (GIB,) * 8, head_bytes=GIB, stage_bytes=GIB // 2, hop_bytes=8192)


def engine(
    node: NodeId,
    budget_bytes: int,
    *,
    rpc: str = "7.0.0",
    may_head: bool = True,
    confined: bool = False,
) -> NodeFacts:
    return NodeFacts(
        node=node, budget_bytes=budget_bytes, rpc=rpc, may_head=may_head, confined=confined
    )


def layered(digest: ModelDigest, *holders: NodeId, shape: Shape = EVEN) -> ModelFacts:
    """A model that takes whole what its layers and its head take."""
    return ModelFacts(
        digest=digest,
        need_bytes=shape.head_bytes + sum(shape.layer_bytes),
        holders=holders,
        shapes=tuple((holder, shape) for holder in holders),
    )


def residents(
    assignment: Assignment, state: ResidentState = "ready", *, only: Iterable[int] | None = None
) -> list[Resident]:
    """The parts of an assignment, as their nodes sign them; `only` some, by their place."""
    layout = assignment.layout
    stages = tuple(s.range for s in layout.stages) if isinstance(layout, Pipeline) else ()
    found = [
        Resident(
            digest=one.part.digest, node=one.node, state=state, name=one.part.name, stages=stages
        )
        for one in assignment.replicas()
    ]
    return found if only is None else [found[place] for place in only]


def running(facts: PlacementInputs) -> set[ReplicaKey]:
    live = {one.node for one in facts.nodes}
    return {ReplicaKey(one.node, one.part) for one in facts.residents if one.node in live}


def some_of(rng: Random, result: Plan, facts: PlacementInputs) -> PlacementInputs:
    """The facts once some parts were started and others stopped, as a plan has it.

    A whole copy of a model whose owner wants it split stays: its node stops it for the pipeline
    only. So does a pipeline that a copy is to replace, until that is there.
    """
    here = running(facts)
    starts = [
        replace(one, state=rng.choice(STATES))
        for assignment in result.assignments
        for one in residents(assignment)
        if ReplicaKey(one.node, one.part) not in here and rng.random() < 0.5
    ]
    planned = {one for assignment in result.assignments for one in assignment.replicas()}
    split = {assignment.digest for assignment in result.assignments if assignment.split}
    started = {one.digest for one in (*facts.residents, *starts) if not one.stages}
    whole = {a.digest for a in result.assignments if a.nodes and isinstance(a.layout, Whole)}
    left = [
        one
        for one in facts.residents
        if ReplicaKey(one.node, one.part) in planned
        or (one.digest in split and not one.stages)
        or (one.digest in whole - started and one.stages)
        or rng.random() < 0.5
    ]
    return replace(facts, residents=(*left, *starts))


def random_facts(rng: Random) -> PlacementInputs:
    """Nodes of two builds, models of a few layers, wishes with and without a split."""
    nodes = tuple(
        NodeFacts(
            node=node,
            budget_bytes=rng.randint(2, 14) * GIB,
            rpc=rng.choice(("7.0.0", "7.0.0", "7.0.0", "8.0.0", "")),
            may_head=rng.random() < 0.8,
            memory_mib_per_s=rng.choice((0, 20_000, 80_000)),
            confined=rng.random() < 0.5,
        )
        for node in NODES
    )
    models = []
    for digest in MODELS[:4]:
        sizes = tuple(rng.choice((1, 2)) * GIB for _ in range(rng.randint(2, 5)))
        shape = Shape(sizes, sizes, rng.randint(1, 2) * GIB, 256 * MIB, 4096)
        models.append(layered(digest, *rng.sample(NODES, rng.randint(1, 4)), shape=shape))
    facts = PlacementInputs(nodes=nodes, models=tuple(models))
    return replace(
        facts,
        wants=random_wants(rng),
        residents=tuple(
            Resident(node=rng.choice(NODES), digest=rng.choice(MODELS[:4]), state=state)
            for state in rng.choices(STATES, k=rng.randint(0, 3))
        ),
    )


def random_wants(rng: Random) -> tuple[PlacementRequest, ...]:
    return tuple(
        PlacementRequest(
            digest=digest,
            owner=rng.choice(NODES),
            replicas=rng.randint(1, 2),
            priority=rng.randint(0, 1),
            split=rng.choice((0, 2, 2, 3)),
        )
        for digest in rng.sample(MODELS[:4], rng.randint(1, 4))
    )


def changed(rng: Random, facts: PlacementInputs) -> PlacementInputs:
    """Another budget, other wishes, or a node less."""
    match rng.randrange(4):
        case 0:
            return replace(facts, wants=random_wants(rng))
        case 1:
            gone = rng.choice(facts.nodes).node
            return replace(facts, nodes=tuple(n for n in facts.nodes if n.node != gone))
        case _:
            nodes = list(facts.nodes)
            place = rng.randrange(len(nodes))
            nodes[place] = replace(nodes[place], budget_bytes=rng.randint(2, 14) * GIB)
            return replace(facts, nodes=tuple(nodes))

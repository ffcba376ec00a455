"""Small worlds for the tests of placement: nodes, models and facts with short names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b, sha256

from hypothesis import strategies as st

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.placement.assignment import Assignment
from p2pmesh.placement.facts import (
    ModelFacts,
    NodeFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
    ResidentState,
)
from p2pmesh.placement.plan import Plan

MIB = 2**20
GIB = 2**30


def node(name: str | int) -> NodeId:
    return NodeId(blake2b(f"node {name}".encode(), digest_size=16).digest())


def model(name: str | int) -> ModelDigest:
    return ModelDigest(sha256(f"model {name}".encode()).hexdigest())


NODES = tuple(node(number) for number in range(5))
MODELS = tuple(model(number) for number in range(5))
OWNER = node("a")
STATES: tuple[ResidentState, ...] = ("loading", "ready")


def facts_of(
    nodes: dict[NodeId, int],
    models: Iterable[ModelFacts],
    wants: Iterable[PlacementRequest] = (),
    residents: Iterable[Resident] = (),
) -> PlacementInputs:
    return PlacementInputs(
        nodes=tuple(NodeFacts(node=n, budget_bytes=budget) for n, budget in nodes.items()),
        models=tuple(models),
        wants=tuple(wants),
        residents=tuple(residents),
    )


def after(
    facts: PlacementInputs, starts: set[Resident], stops: set[tuple[NodeId, ModelDigest]]
) -> PlacementInputs:
    """The facts once some copies were started and others stopped."""
    left = [r for r in facts.residents if (r.node, r.digest) not in stops]
    return replace(facts, residents=(*left, *starts))


def actions_of(
    plan: Plan, facts: PlacementInputs
) -> tuple[list[tuple[NodeId, ModelDigest]], list[tuple[NodeId, ModelDigest]]]:
    """Everything that separates the facts from the plan: starts and stops."""
    live = {part.node for part in facts.nodes}
    planned = {(n, a.digest) for a in plan.assignments for n in a.nodes}
    running = {(r.node, r.digest) for r in facts.residents if r.node in live}
    return sorted(planned - running), sorted(running - planned)


def only(result: Plan, digest: ModelDigest) -> Assignment:
    (found,) = (a for a in result.assignments if a.digest == digest)
    return found


def described(digest: ModelDigest, need_bytes: int, *holders: NodeId) -> ModelFacts:
    return ModelFacts(digest=digest, need_bytes=need_bytes, holders=holders)


def want(
    digest: ModelDigest, replicas: int = 1, priority: int = 0, owner: NodeId = OWNER
) -> PlacementRequest:
    return PlacementRequest(owner=owner, digest=digest, replicas=replicas, priority=priority)


def ready(where: NodeId, digest: ModelDigest) -> Resident:
    return Resident(node=where, digest=digest, state="ready")


def loading(where: NodeId, digest: ModelDigest) -> Resident:
    return Resident(node=where, digest=digest, state="loading")


sizes = st.integers(0, 8).map(lambda count: count * GIB)

node_facts = st.builds(NodeFacts, node=st.sampled_from(NODES), budget_bytes=sizes)
model_facts = st.builds(
    ModelFacts,
    digest=st.sampled_from(MODELS),
    need_bytes=st.integers(1, 6).map(lambda count: count * GIB),
    holders=st.lists(st.sampled_from(NODES), max_size=5).map(tuple),
    fallback=st.integers(0, 5).map(lambda draw: draw == 0),
    own_needs=st.lists(
        st.tuples(st.sampled_from(NODES), st.integers(1, 6).map(lambda count: count * GIB)),
        max_size=2,
    ).map(tuple),
)
wants = st.builds(
    PlacementRequest,
    owner=st.sampled_from(NODES),
    digest=st.sampled_from(MODELS),
    replicas=st.integers(0, 4),
    priority=st.integers(-1, 1),
)
residents = st.builds(
    Resident,
    node=st.sampled_from(NODES),
    digest=st.sampled_from(MODELS),
    state=st.sampled_from(STATES),
)
any_facts = st.builds(
    PlacementInputs,
    nodes=st.lists(node_facts, max_size=6).map(tuple),
    models=st.lists(model_facts, max_size=6).map(tuple),
    wants=st.lists(wants, max_size=8).map(tuple),
    residents=st.lists(residents, max_size=12).map(tuple),
)

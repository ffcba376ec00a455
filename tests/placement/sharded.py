"""A model of experts that fits on no node of a small mesh."""

from __future__ import annotations

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import Shard, ShardKind, ShardQuality, shard_name
from p2pmesh.placement.assignment import Assignment
from p2pmesh.placement.facts import (
    ModelFacts,
    NodeFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
    ResidentState,
)
from p2pmesh.placement.layout import Experts
from p2pmesh.placement.plan import Plan
from p2pmesh.placement.shape import Shape
from tests.placement.placement_strategies import GIB, model, node, only

A, B, C, D = (node(name) for name in "abcd")
MOE = model("moe")
OTHER = model("other")
RANKING, NEWER = "ab" * 32, "cd" * 32
PLACES = 16
GOOD = ShardQuality(ShardKind.EXPERTS, RANKING, PLACES, 8, 50_000, 930_000)
SHAPE = Shape((2 * GIB,) * 8, (GIB,) * 8, 4 * GIB, GIB, 4096)
NEED, EXPERTS = 20 * GIB, 16 * GIB  # a place is 1 GiB, and all else 4


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

from __future__ import annotations

from dataclasses import replace

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import Shard, ShardKind, StageName, StageRange, shard_name, unit_id
from p2pmesh.placement.facts import NodeFacts, PlacementInputs, Resident, ResidentState
from p2pmesh.placement.running import Running, may_share
from tests.placement.placement_strategies import model, node

A, B, GONE = node("a"), node("b"), node("gone")
ONE = model("one")
RANGES = (StageRange(A, 0, 1), StageRange(B, 2, 3))
UNIT = unit_id(ONE, RANGES)
SHARD = Shard(ShardKind.EXPERTS, "ab" * 32, 4, 2, 0b0111)


def stage(number: int, where: NodeId = A, state: ResidentState = "ready") -> Resident:
    name = str(StageName(UNIT, number))
    return Resident(digest=ONE, node=where, state=state, name=name, stages=RANGES)


def running(*residents: Resident) -> Running:
    nodes = tuple(NodeFacts(node=one, budget_bytes=1) for one in (A, B))
    return Running(PlacementInputs(nodes=nodes, residents=residents))


def test_parts_are_known_by_what_they_are() -> None:
    name = shard_name(ONE, SHARD)
    found = running(
        Resident(digest=ONE, node=A, state="ready"),
        Resident(digest=ONE, node=B, state="loading"),
        stage(0),
        stage(1, B, "loading"),
        Resident(digest=ONE, node=B, state="ready", name=name, shard=SHARD),
    )
    assert (found.copies(ONE, "ready"), found.copies(ONE, "loading")) == ([A], [B])
    assert found.units(ONE) == [RANGES]
    assert {where: one.shard for where, one in found.shards(ONE).items()} == {B: SHARD}
    other = model("other")
    assert (found.copies(other, "ready"), found.units(other), found.shards(other)) == ([], [], {})


def test_what_runs_on_nodes_that_are_gone_does_not_count() -> None:
    found = running(Resident(digest=ONE, node=GONE, state="ready"), stage(0, GONE))
    assert (found.copies(ONE, "ready"), found.units(ONE)) == ([], [])


def test_a_stage_counts_only_where_its_unit_has_it() -> None:
    assert running(stage(0, B)).units(ONE) == []
    assert running(stage(5)).units(ONE) == []


def test_of_two_pipelines_the_one_with_more_ready_stages_comes_first() -> None:
    other = (StageRange(A, 0, 2), StageRange(B, 3, 3))
    name = str(StageName(unit_id(ONE, other), 0))
    second = Resident(digest=ONE, node=A, state="ready", name=name, stages=other)
    assert running(stage(0), stage(1, B), second).units(ONE) == [RANGES, other]
    assert running(stage(0, A, "loading"), stage(1, B, "loading"), second).units(ONE)[0] == other


def test_nodes_share_a_pipeline_with_one_build_and_a_right_or_walls() -> None:
    head = NodeFacts(node=A, budget_bytes=1, rpc="7", may_head=True)
    stage = NodeFacts(node=B, budget_bytes=1, rpc="7")
    assert may_share([head, stage])
    assert not may_share([head, None])
    assert not may_share([replace(head, rpc=""), replace(stage, rpc="")])
    assert not may_share([head, replace(stage, rpc="8")])
    assert not may_share([replace(head, may_head=False), stage])
    assert may_share([replace(head, may_head=False), replace(stage, confined=True)])


def test_of_two_shards_on_one_node_the_one_that_is_ready_counts() -> None:
    other = SHARD._replace(kept=0b1011)
    orders: list[tuple[ResidentState, ResidentState]] = [("ready", "loading"), ("loading", "ready")]
    for states in orders:
        residents = [
            Resident(digest=ONE, node=A, state=state, name=shard_name(ONE, one), shard=one)
            for state, one in zip(states, (SHARD, other), strict=True)
        ]
        [found] = running(*residents).shards(ONE).values()
        assert found.state == "ready"

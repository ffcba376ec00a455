"""A small mesh that lives by the plan: nodes with processes, and old news about each other.

Each node signs what it runs; others learn of it later, one by one and in any order. In each step
one thing happens at random: news arrives, a node does one of its actions, a load ends, a process
is gone. No node ever loads more than fits: that is asserted at each start.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import NamedTuple

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import (
    WHOLE,
    PartId,
    ReplicaKey,
    Shard,
    ShardKind,
    ShardQuality,
    StageName,
    is_shard,
    parse_stage,
    takes_requests,
)
from p2pmesh.placement.experts import shard_bytes
from p2pmesh.placement.facts import (
    ModelFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
    ResidentState,
)
from p2pmesh.placement.pipeline import Stage
from p2pmesh.placement.plan import plan
from p2pmesh.placement.reconcile import Check, Start, Stop, StopReason, reconcile
from p2pmesh.placement.shape import Shape
from tests.placement.placement_strategies import GIB, MIB, MODELS, NODES
from tests.placement.split_world import engine

ROUNDS_MAX = 300  # until a failed process was tried again for sure
RETRY_SHARE = 0.2  # of looks at a failed process: it is tried again later than others load
FORGET_SHARE = 0.02  # a node says for longer that something failed than it takes to try others
PLACES = 16  # of experts, which take three quarters of their models


class Signed(NamedTuple):
    """What a node has told the others: what runs there, and of what a part failed lately."""

    residents: tuple[Resident, ...] = ()
    failing: frozenset[ModelDigest] = frozenset()


class SmallMesh:
    """Attributes:
    stale: Whether nodes act on old news.
    failing: Whether loads may fail.
    broken: Where parts fail whenever they are loaded.
    resting: What failed and was stopped; its node goes on saying so for a while.
    split: Whether some models are to be split.
    experts: Whether models have experts, and are too large for most nodes.
    shards: What each shard that was started holds.
    units: All stages of the pipeline that a stage was started for.
    stops: Every stop so far.
    """

    def __init__(
        self,
        rng: Random,
        *,
        priorities: int,
        stale: bool,
        failing: bool = False,
        split: bool = False,
        experts: bool = False,
    ) -> None:
        self.rng = rng
        self.split = split
        self.shards: dict[tuple[NodeId, PartId], Shard] = {}
        self.units: dict[tuple[NodeId, PartId], tuple[Stage, ...]] = {}
        self.stale = stale
        self.failing = failing
        self.broken: set[tuple[NodeId, ModelDigest]] = set()
        self.resting: set[tuple[NodeId, ModelDigest]] = set()
        self.priorities = priorities
        self.budgets = {n: rng.randint(2, 8) * GIB for n in NODES}
        size = (5, 9) if experts else (1, 4)
        self.needs = {digest: rng.randint(*size) * GIB for digest in MODELS}
        self.models = tuple(
            ModelFacts(
                digest=digest,
                need_bytes=need,
                holders=tuple(rng.sample(NODES, rng.randint(1, len(NODES)))),
                fallback=digest == MODELS[0],
            )
            for digest, need in self.needs.items()
        )
        if split:
            self.models = tuple(in_layers(one) for one in self.models)
        if experts:
            self.models = tuple(with_experts(one, rng) for one in self.models)
        self.wants: tuple[PlacementRequest, ...] = ()
        self.running: dict[NodeId, dict[PartId, str]] = {n: {} for n in NODES}
        self.signed: dict[NodeId, list[Signed]] = {n: [Signed()] for n in NODES}
        self.known = {n: dict.fromkeys(NODES, 0) for n in NODES}
        self.stops: list[Stop] = []
        self.acted = 0
        self.change_wants()

    # What happens from outside.

    def change_wants(self) -> None:
        rng = self.rng
        self.wants = tuple(
            PlacementRequest(
                owner=rng.choice(NODES),
                digest=digest,
                replicas=rng.randint(1, 3),
                priority=rng.randrange(self.priorities),
                split=rng.choice((0, 2, 2, 3)) if self.split else 0,
            )
            for digest in rng.sample(MODELS, rng.randint(0, len(MODELS)))
        )

    def share_one(self) -> None:
        """Want one model only, and have room for all its experts on two or three nodes."""
        one = self.models[1]
        kept = Shard(ShardKind.EXPERTS, "ab" * 32, PLACES, 6, (1 << self.rng.randint(10, 12)) - 1)
        quality = ShardQuality(*kept[:4], divergence=50_000, coverage=930_000)
        self.models = (replace(one, qualities=(quality,)),)
        self.wants = (PlacementRequest(owner=NODES[0], digest=one.digest),)
        room = shard_bytes(one.need_bytes, one.need_bytes * 3 // 4, kept)
        self.budgets = dict.fromkeys(NODES, room)

    def break_some(self) -> None:
        """Want one copy of a model that fits on some of its holders, and loads on one of these."""
        one = self.rng.choice([model for model in self.models if model.holders])
        sound = self.rng.choice(one.holders)
        self.budgets[sound] = max(self.budgets[sound], one.need_bytes)
        self.wants = (PlacementRequest(owner=NODES[0], digest=one.digest),)
        self.broken = {(n, one.digest) for n in one.holders if n != sound}

    def break_some_of_many(self) -> None:
        """Want a model that fits on no node, and have two of its holders on which parts load."""
        one = self.models[1]
        sound = self.rng.sample(NODES, 2)
        self.models = (in_layers(replace(one, holders=NODES)),)
        # As a pipeline it takes a layer and half of another on each of two nodes.
        self.budgets = dict.fromkeys(NODES, one.need_bytes * 3 // 5)
        self.wants = (PlacementRequest(owner=NODES[0], digest=one.digest),)
        self.broken = {(n, one.digest) for n in NODES if n not in sound}

    def crash(self) -> None:
        gone = self.rng.choice(sorted(self.budgets))
        self.resting = {one for one in self.resting if one[0] != gone}
        del self.budgets[gone]
        del self.running[gone]

    def join(self) -> None:
        for n in NODES:
            if n not in self.budgets:
                self.budgets[n] = self.rng.randint(2, 8) * GIB
                self.running[n] = {}
                self._sign(n)

    def shrink(self) -> NodeId:
        n = self.rng.choice(sorted(self.budgets))
        self.budgets[n] //= 2
        return n

    # What happens inside.

    def step(self) -> None:
        n = self.rng.choice(sorted(self.budgets))
        turn = self.rng.choice((self._hear, self._act, self._progress))
        turn(n)

    def settle(self) -> None:
        """Brings all news everywhere and lets all nodes act until nothing happens any more."""
        self.stale = self.failing = False
        for _ in range(ROUNDS_MAX):
            if self.at_rest():
                return
            for n in self.rng.sample(sorted(self.budgets), len(self.budgets)):
                self._act(n)
                self._progress(n)
        raise AssertionError("the mesh does not come to rest")

    def at_rest(self) -> bool:
        states = [state for models in self.running.values() for state in models.values()]
        return set(states) <= {"ready"} and not any(self.todo(n) for n in self.budgets)

    def facts(self, reader: NodeId | None = None) -> PlacementInputs:
        """What `reader` knows; the whole truth for None."""
        heard = {
            n: self.signed[n][
                self.known[reader][n] if reader and self.stale and n != reader else -1
            ]
            for n in self.budgets
        }
        failing = {
            model.digest: tuple(n for n, said in heard.items() if model.digest in said.failing)
            for model in self.models
        }
        return PlacementInputs(
            nodes=tuple(engine(n, b) for n, b in self.budgets.items()),
            models=tuple(replace(one, failing=failing[one.digest]) for one in self.models),
            wants=self.wants,
            residents=tuple(resident for said in heard.values() for resident in said.residents),
        )

    def todo(self, n: NodeId) -> tuple[Start | Stop, ...]:
        facts = self.facts(n)
        proven = {ReplicaKey(one.node, one.part) for one in self.residents()}
        actions = reconcile(
            me=n,
            plan=plan(facts),
            facts=facts,
            running=dict(self.running[n]),
            proven=proven,
        )
        # Who is asked and does not run the model does not answer; nothing follows from that here.
        return tuple(action for action in actions if not isinstance(action, Check))

    def residents(self) -> set[Resident]:
        """What really runs and answers, whatever anybody has heard."""
        return {
            self._resident(n, part, "ready")
            for n, parts in self.running.items()
            for part, state in parts.items()
            if state == "ready"
        }

    def ready(self, digest: ModelDigest) -> int:
        """How many copies answer: whole ones, and heads of which all stages are there."""
        return sum(
            state == "ready" and part.digest == digest and self._answers(n, part)
            for n, parts in self.running.items()
            for part, state in parts.items()
        )

    def count(self, reason: StopReason) -> int:
        return sum(stop.reason is reason for stop in self.stops)

    def held_bytes(self, n: NodeId) -> int:
        return sum(self._need(n, part) for part in self.running[n])

    def _hear(self, n: NodeId) -> None:
        about = self.rng.choice(NODES)
        self.known[n][about] = self.rng.randint(self.known[n][about], len(self.signed[about]) - 1)

    def _act(self, n: NodeId) -> None:
        actions = self.todo(n)
        if not actions:
            return
        self.acted += 1
        action = self.rng.choice(actions)
        if isinstance(action, Start):
            assert action.part not in self.running[n]
            self.running[n][action.part] = "loading"
            self.units[n, action.part] = action.stages
            if action.shard is not None:
                self.shards[n, action.part] = action.shard
            if not action.stages:
                assert action.part.name == WHOLE or is_shard(action.part.name)
            elif takes_requests(action.part.name):
                behind = {stage.node for stage in action.stages[1:]}
                assert behind <= {one.node for one in self.facts(n).residents}, "a head too early"
            assert self.held_bytes(n) <= self.budgets[n], "loaded more than fits"
        else:
            if action.reason is StopReason.FAILED:
                self.resting.add((n, action.part.digest))
            self.running[n][action.part] = "stopping"
            self.stops.append(action)
        self._sign(n)

    def _progress(self, n: NodeId) -> None:
        rested = [one for one in sorted(self.resting) if one[0] == n]
        if rested and self.rng.random() < FORGET_SHARE:
            self.resting.discard(self.rng.choice(rested))
            self._sign(n)
        if not self.running[n]:
            return
        part = self.rng.choice(sorted(self.running[n]))
        state = self.running[n][part]
        if state == "stopping":
            del self.running[n][part]
        elif state == "loading":
            failed = self.failing and self.rng.random() < 0.3
            failed |= (n, part.digest) in self.broken
            self.running[n][part] = "failed" if failed else "ready"
            if not failed:
                self.resting.discard((n, part.digest))
        elif state == "failed" and self.rng.random() < RETRY_SHARE:
            self.running[n][part] = "loading"
        self._sign(n)

    def _sign(self, n: NodeId) -> None:
        residents = tuple(
            self._resident(n, part, "ready" if state == "ready" else "loading")
            for part, state in self.running[n].items()
            if state in {"loading", "ready"}
        )
        failed = {part.digest for part, state in self.running[n].items() if state == "failed"}
        tried = {part.digest for part, state in self.running[n].items() if state != "stopping"}
        rested = {digest for node, digest in self.resting if node == n and digest not in tried}
        failing = frozenset(failed | rested)
        self.signed[n].append(Signed(residents, failing))

    def _resident(self, n: NodeId, part: PartId, state: ResidentState) -> Resident:
        stages = tuple(stage.range for stage in self.units.get((n, part), ()))
        shard = self.shards.get((n, part))
        return Resident(
            node=n, digest=part.digest, state=state, name=part.name, stages=stages, shard=shard
        )

    def _need(self, n: NodeId, part: PartId) -> int:
        stages = self.units.get((n, part))
        if stages:
            return next(stage.need_bytes for stage in stages if stage.node == n)
        if shard := self.shards.get((n, part)):
            return shard_bytes(self.needs[part.digest], self.needs[part.digest] * 3 // 4, shard)
        return self.needs[part.digest]

    def _answers(self, n: NodeId, part: PartId) -> bool:
        if not takes_requests(part.name):
            return False
        head = parse_stage(part.name)
        stages = self.units.get((n, part), ())[1:]
        return head is None or all(
            self.running.get(stage.node, {}).get(
                PartId(part.digest, str(StageName(head.unit, number)))
            )
            == "ready"
            for number, stage in enumerate(stages, start=1)
        )


def in_layers(one: ModelFacts) -> ModelFacts:
    """A model of four layers that takes whole what it took."""
    layer = one.need_bytes // 4
    shape = Shape((layer,) * 4, (layer,) * 4, head_bytes=0, stage_bytes=64 * MIB, hop_bytes=1)
    return replace(one, shapes=tuple((holder, shape) for holder in one.holders))


def with_experts(one: ModelFacts, rng: Random) -> ModelFacts:
    """A model of which shards of one kind are good enough, on all nodes."""
    kind, critical = rng.choice(tuple(ShardKind)), rng.randint(4, 12)
    quality = ShardQuality(kind, "ab" * 32, PLACES, critical, 50_000, 930_000)
    experts = tuple((holder, one.need_bytes * 3 // 4) for holder in NODES)
    return replace(one, holders=NODES, expert_bytes=experts, qualities=(quality,))

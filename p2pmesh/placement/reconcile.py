"""From the plan to this node's own actions: what to start and what to stop, now.

Pure. A node changes only its own processes, so a node with older facts than the others can make
a copy too many, never a wrong one. Five rules:

- What the plan has here and does not run is started, as soon as its memory is free.
- What the plan has elsewhere is stopped once every node that it names has signed `ready` and has
  proved it to this node by answering: make before break. Of two copies too many, each sees the
  same plan, so exactly the right one goes.
- What has no place anywhere, or that nobody wants, is stopped at once.
- A node over its own budget stops, at once, what the plan does not have here, the least
  important first.
- What waits for its copies elsewhere, while the plan has them where they have no room, and keeps
  something more important from starting here, is stopped at once: they might wait for each other.

A pipeline is one unit, of which each node runs one stage by the name `stage-<unit>-<i>`:

- Its stages 1, 2, … are started as soon as their memory is free, and are `ready` once they can
  take their head's connections. The head, stage 0, is started once all of them have signed
  `ready`, and is `ready` once it has answered a token, as any engine.
- The head is stopped with `BROKEN` as soon as a stage of its unit does not say `ready` any more:
  at once, without draining, since its requests have lost their way. The plan still has it here,
  so that it is started again when all stages are ready. A stage that lives through this stays.
- When the plan has another unit or other copies, the unit stops as one: at once with `BROKEN`
  where a stage of it is gone, at once with `EVICTED` where another unit needs its nodes, else make
  before break. Its head proves a unit to others: only parts that take requests are asked.
- A whole copy stays until the pipeline that replaces it answers, unless it could never fit beside
  the stage that the plan has here, which the plan avoids: then it is evicted.

What the actions ask of the caller: `Start(part, stages)` of a stage carries all stages of its
unit, the head first, with their nodes, layers and memory; `Served.stages` publishes them, by which
every node knows the unit again, also from one part of it. `Stop` of a stage 1, 2, … drains it as
long as its head has streams open, at most as long as any engine; `BROKEN` waits for nothing.

No two nodes wait for each other: a start waits only for the stop of something less important, or
for copies that are already being loaded. A failed process that the plan has here is left to its
own back-off. A node that the facts do not count as live may be cut off: it changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import (
    WHOLE,
    PartId,
    ReplicaKey,
    Shard,
    StageName,
    parse_stage,
    takes_requests,
)
from p2pmesh.placement.assignment import Assignment
from p2pmesh.placement.experts import shard_bytes
from p2pmesh.placement.facts import PlacementInputs, Resident
from p2pmesh.placement.layout import Experts, Pipeline
from p2pmesh.placement.pipeline import Stage
from p2pmesh.placement.plan import Plan


class StopReason(StrEnum):
    """Why a copy is stopped, in words for the log and the console."""

    UNWANTED = "nobody wants it"
    MOVED = "the nodes that the plan has it on are ready"
    FAILED = "it failed here and the plan has it elsewhere"
    EVICTED = "there is no room for it"
    BROKEN = "a stage of its pipeline is gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Load this part here.

    Attributes:
        stages: For a stage all stages of its unit, the head first.
        shard: For a shard what it holds.
    """

    part: PartId
    stages: tuple[Stage, ...] = ()
    shard: Shard | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Drain and unload this part here."""

    part: PartId
    reason: StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Ask whether a replica really serves: its node says so, and a copy here may go for it."""

    replica: ReplicaKey


Action = Start | Stop | Check


def reconcile(
    *,
    me: NodeId,
    plan: Plan,
    facts: PlacementInputs,
    running: Mapping[PartId, str],
    proven: Collection[ReplicaKey],
) -> tuple[Action, ...]:
    """Return the starts and stops that are due; stops come first.

    Args:
        me: This node.
        plan: What `facts` lead to.
        facts: The same facts.
        running: The state of each of this node's processes (`loading`, `ready`, `failed` or
            `stopping`). A process holds its memory until it is no longer named here.
        proven: The replicas of others that answered this node since they signed `ready`.
    """
    budget_bytes = next((part.budget_bytes for part in facts.nodes if part.node == me), None)
    if budget_bytes is None:
        return ()
    turn = _Turn(me, plan, facts, running, budget_bytes)
    stops, checks = turn.stops(proven)
    turn.evict(stops)
    return (
        *(Stop(part=part, reason=reason) for part, reason in stops.items()),
        *turn.starts(),
        *(Check(replica=one) for one in checks if one.part not in stops),
    )


class _Turn:
    """What one node makes of one plan."""

    def __init__(
        self,
        me: NodeId,
        plan: Plan,
        facts: PlacementInputs,
        running: Mapping[PartId, str],
        budget_bytes: int,
    ) -> None:
        self._me, self._running, self._budget_bytes = me, running, budget_bytes
        self._assignments = {assignment.digest: assignment for assignment in plan.assignments}
        self._here = plan.on(me)
        self._facts = facts
        self._sizes = _Sizes(facts)
        self._ready = {
            ReplicaKey(one.node, one.part) for one in facts.residents if one.state == "ready"
        }
        self._needs = {PartId(model.digest): model.need_on(me) for model in facts.models}
        for part in self._here:
            self._needs[part] = self._sizes.planned(self._assignments[part.digest], me)
        if any(part not in self._needs for part in running):
            for one in facts.residents:
                if one.node == me and one.part not in self._needs:
                    need_bytes = self._sizes.of(one)
                    if need_bytes:
                        self._needs[one.part] = need_bytes

    def stops(
        self, proven: Collection[ReplicaKey]
    ) -> tuple[dict[PartId, StopReason], list[ReplicaKey]]:
        """Return the stops that the plan asks for, and the replicas that must answer before more.

        Both in the order of the parts.
        """
        stops: dict[PartId, StopReason] = {}
        checks: list[ReplicaKey] = []
        for part, state in sorted(self._running.items()):
            if state == "stopping":
                continue
            reason = self._reason(part, state)
            if reason is not None:
                stops[part] = reason
            elif part not in self._here and self._are_ready(part.digest):
                asked = self._others_to_ask(part.digest).difference(proven)
                checks += sorted(asked)
                if not asked:
                    stops[part] = StopReason.MOVED
        return stops, checks

    def evict(self, stops: dict[PartId, StopReason]) -> None:
        """Add to `stops` what has no room here beside what the plan has here, or at all."""
        planned = {part.digest for part in self._here}
        planned_bytes = self._size(self._here)
        staying = [
            part
            for part, state in self._running.items()
            if state != "stopping" and part not in stops
        ]
        excess_bytes = self._size(staying) - self._budget_bytes
        order = {digest: place for place, digest in enumerate(self._assignments)}
        room = self._budget_bytes - self._size(self._running)
        blocked = [
            order[part.digest]
            for part in self._here
            if part not in self._running and self._size([part]) > room
        ]
        # The least important first; what the plan does not know at all was stopped before.
        for part in sorted(staying, key=lambda one: (order.get(one.digest, 0), one), reverse=True):
            if part in self._here:
                continue
            # What replaces it here can never start beside it, and it waits for just that.
            alone = planned_bytes + self._size([part]) > self._budget_bytes
            alone = alone and part.digest in planned
            # It keeps something more important from starting, and waits for what cannot start.
            in_the_way = min(blocked, default=len(order)) < order.get(part.digest, 0)
            if excess_bytes > 0 or alone or (in_the_way and self._is_stuck(part.digest)):
                stops[part] = StopReason.EVICTED
                excess_bytes -= self._size([part])

    def _is_stuck(self, digest: ModelDigest) -> bool:
        """Whether the plan has a model on a node where it has no room beside what runs there."""
        assignment = self._assignments[digest]
        for replica in assignment.replicas():
            here = [one for one in self._facts.residents if one.node == replica.node]
            if any(one.part == replica.part for one in here):
                continue
            used = sum(map(self._sizes.of, here))
            need_bytes = self._sizes.planned(assignment, replica.node)
            if used + need_bytes > self._sizes.budgets[replica.node]:
                return True
        return False

    def starts(self) -> list[Start]:
        """Return the starts that fit beside all that holds memory now, the most important first."""
        if any(one not in self._needs and one.name != WHOLE for one in self._running):
            return []  # a part that ends, of which no record tells any more what it takes
        room = self._budget_bytes - self._size(self._running)
        starts = []
        for part in self._here:
            if part in self._running or self._size([part]) > room or self._waits(part):
                continue
            room -= self._size([part])
            layout = self._assignments[part.digest].layout
            stages = layout.stages if isinstance(layout, Pipeline) else ()
            shard = layout.shard_on(self._me) if isinstance(layout, Experts) else None
            starts.append(Start(part=part, stages=stages, shard=shard))
        return starts

    def _size(self, parts: Iterable[PartId]) -> int:
        return sum(self._needs.get(part, 0) for part in parts)

    def _reason(self, part: PartId, state: str) -> StopReason | None:
        """Why a part must go at once; None when it may stay, or stay for now."""
        if part in self._here:
            return StopReason.BROKEN if self._waits(part) else None
        assignment = self._assignments.get(part.digest)
        if assignment is None or assignment.copies == 0:
            return StopReason.UNWANTED
        if not assignment.nodes:
            return StopReason.EVICTED
        if state == "failed":
            return StopReason.FAILED
        stage = parse_stage(part.name)
        if stage is None:
            return None
        unit = self._nodes_of_unit(part.digest, stage)
        if unit is None:
            return StopReason.BROKEN
        other_unit = isinstance(assignment.layout, Pipeline)
        return StopReason.EVICTED if other_unit and unit.intersection(assignment.nodes) else None

    def _waits(self, part: PartId) -> bool:
        """Whether `part` is a planned head whose stages are not all ready."""
        assignment = self._assignments[part.digest]
        if not isinstance(assignment.layout, Pipeline):
            return False
        head, *behind = assignment.replicas()
        return part == head.part and not self._ready.issuperset(behind)

    def _nodes_of_unit(self, digest: ModelDigest, stage: StageName) -> set[NodeId] | None:
        """The nodes of a unit of which a stage runs here; None when a stage of it is gone."""
        here: set[NodeId] = {self._me}
        all_of_it: set[NodeId] = set()
        for one in self._facts.residents:
            other = parse_stage(one.name) if one.digest == digest else None
            if other is not None and other.unit == stage.unit:
                here.add(one.node)
                all_of_it.update(of.node for of in one.stages)
        return all_of_it if all_of_it and all_of_it <= here else None

    def _are_ready(self, digest: ModelDigest) -> bool:
        """Whether all that the plan has of a model is ready, here and elsewhere."""
        return all(
            self._running.get(one.part) == "ready" if one.node == self._me else one in self._ready
            for one in self._assignments[digest].replicas()
        )

    def _others_to_ask(self, digest: ModelDigest) -> set[ReplicaKey]:
        """The planned replicas elsewhere that take requests."""
        return {
            one
            for one in self._assignments[digest].replicas()
            if one.node != self._me and takes_requests(one.part.name)
        }


class _Sizes:
    """What parts take on any node, by what the facts say."""

    def __init__(self, facts: PlacementInputs) -> None:
        self.budgets = {one.node: one.budget_bytes for one in facts.nodes}
        self._models = {model.digest: model for model in facts.models}

    def of(self, one: Resident) -> int:
        """Return the memory of a running part in bytes; 0 for what nobody describes."""
        model = self._models.get(one.digest)
        name = parse_stage(one.name)
        if model is None:
            return 0
        if one.shard is not None:
            experts = dict(model.expert_bytes).get(one.node, 0)
            return shard_bytes(model.need_on(one.node), experts, one.shard)
        if name is None:
            return model.need_on(one.node)
        shape = dict(model.shapes).get(one.stages[0].node) if one.stages else None
        if shape is None:
            return 0
        _, first, last = one.stages[name.number]
        return shape.need(first, last)

    def planned(self, assignment: Assignment, node: NodeId) -> int:
        """Return the memory in bytes of the part that the plan has on a node."""
        match assignment.layout:
            case Pipeline(stages=stages):
                return next(one.need_bytes for one in stages if one.node == node)
            case Experts(shards=shards):
                return next(one.need_bytes for one in shards if one.node == node)
        model = self._models.get(assignment.digest)
        return 0 if model is None else model.need_on(node)

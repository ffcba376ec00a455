"""`plan(facts)`: which nodes should serve which model.

Pure, and the same function on every node. There are three layouts. `Whole`: each copy lies on one
node. `Pipeline`: the nodes share one copy, each with some of its layers (`pipeline.py`); that is
for models whose owners ask for it, and for those that fit on no node, and there is one of it.
`Experts`: each of several nodes has all of a model but some of its experts, and answers alone
(`experts.py`); that is for models of experts that fit on no node, where shards are good enough.

The rules. Higher priority goes first and sees nothing of what is below it. Among models of one
priority, what runs keeps its place as long as it fits: copies (ready ones before loading ones) and
pipelines. Then come pipelines that owners ask for, then missing copies, larger models first, each
on the nodes that have the file and the room, in the order of weighted rendezvous; and in the end
shards and pipelines of models that found no place for any copy. Where the owners leave the choice,
a smaller quantisation of the same model that has or finds a place stands in before all. Shards that
are measured to be good enough go before a pipeline; where there is neither, shards that are
predicted to be so will do. A pipeline that runs stays, unless its owner asks for shards. What only
one holder of several says of shards starts none, but those that run stay.

A node that says that a part of a model failed there lately gets none of it that can be elsewhere,
and what runs of a pipeline with a stage there does not keep its place. It says so for longer each
time, so that others are tried meanwhile.

Why a plan does not chase its own tail: carry out any part of it, in any order, and planning again
gives the same plan. Take one priority, everything above it being settled. Copies that the plan
keeps still fit. Copies that it starts become running ones that fit, and fill no more places than
were wanted. Copies that it stops were not counted. Those that found no room find none now, since
room in the second reckoning is never more than it was in the first. So nothing is chosen anew.
A pipeline is found again by any of its parts, since each tells the whole unit, and one of which
nothing runs yet is still the best of those that fit. A model that found no place for a copy finds
none while its pipeline runs, since what that takes counts against it or was free before.

Two exceptions. A copy of a model whose owner asks for a split keeps its memory, so that it answers
until the pipeline does: a node that stops it sooner may make room for a better pipeline. A
pipeline that a copy is to replace tells where: a node that stops it before the copy is loading may
make room for a larger model there. And shards that take the experts of a node that has left change
one after the other, each when the one before it is ready.

The embedded model comes last of all, and only when nothing that is wanted has a place: it takes
room from nobody, and a wish that cannot be met leaves nobody without a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import PartId
from p2pmesh.placement.allocation import Allocation
from p2pmesh.placement.assignment import Assignment
from p2pmesh.placement.demand import Demand
from p2pmesh.placement.facts import ModelFacts, PlacementInputs
from p2pmesh.sharing import DIVERGENCE_MAX, Sharing
from p2pmesh.wire.codec import encode

ALGORITHM = 10
"""Goes up with every change that can change a plan; nodes compare plans of equal numbers only."""

PLAN_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The placement of each model that is wanted or described.

    Attributes:
        assignments: The wanted ones in the order in which they were placed, then the others.
        digest: BLAKE2b-16 of `encode()`.
    """

    algorithm: int
    assignments: tuple[Assignment, ...]
    digest: bytes

    def encode(self) -> bytes:
        """The canonical bytes of every decision, with the version of the algorithm."""
        return _encode(self.algorithm, self.assignments)

    def on(self, node: NodeId) -> tuple[PartId, ...]:
        """The parts that `node` should run, the most important first."""
        return tuple(
            PartId(a.digest, name)
            for a in self.assignments
            if (name := a.layout.part_on(node)) is not None
        )


def plan(facts: PlacementInputs) -> Plan:
    """The plan that follows from `facts`, on whichever node it is computed."""
    table = Allocation(facts)
    demands, idle = _demands(facts)
    assignments = [a for _, group in groupby(demands, key=_priority) for a in table.serve(group)]
    assignments += table.stand_ins(demands)
    placed = {a.digest for a in assignments}
    idle = [model for model in idle if model.digest not in placed]
    fallbacks = {model.digest for model in facts.models if model.fallback}
    if not any(a.nodes for a in assignments if a.digest not in fallbacks):
        standby = [model for model in idle if model.fallback]
        idle = [model for model in idle if not model.fallback]
        assignments += table.serve(Demand(model=m, copies=1, priority=0) for m in standby)
    assignments += [table.left_out(model) for model in idle]
    return Plan(
        algorithm=ALGORITHM,
        assignments=tuple(assignments),
        digest=blake2b(_encode(ALGORITHM, assignments), digest_size=PLAN_DIGEST_BYTES).digest(),
    )


def _encode(algorithm: int, assignments: Iterable[Assignment]) -> bytes:
    return encode([algorithm, [assignment.decision() for assignment in assignments]])


def _priority(demand: Demand) -> int:
    return demand.priority


def _demands(facts: PlacementInputs) -> tuple[list[Demand], list[ModelFacts]]:
    """Return the wanted models in the order of planning, and the others, by digest.

    A wanted model that nobody describes has no known need and no holder: a running copy of it
    stays where it is, a new one has no place to go.
    """
    models = {model.digest: model for model in facts.models}
    for want in facts.wants:
        nothing = ModelFacts(digest=want.digest, need_bytes=0, holders=())
        models.setdefault(want.digest, nothing)
    copies: dict[ModelDigest, int] = {}
    priority: dict[ModelDigest, int] = {}
    split: dict[ModelDigest, int] = {}
    sharing: dict[ModelDigest, set[Sharing]] = {}
    divergence: dict[ModelDigest, int] = {}
    for want in facts.wants:
        copies[want.digest] = max(copies.get(want.digest, 1), want.replicas)
        priority[want.digest] = max(priority.get(want.digest, want.priority), want.priority)
        if want.split > 1:
            split[want.digest] = max(split.get(want.digest, 0), want.split)
        sharing.setdefault(want.digest, set()).add(want.moe)
        divergence[want.digest] = min(
            divergence.get(want.digest, want.divergence_max), want.divergence_max
        )
    demands = [
        Demand(
            model=models[digest],
            copies=count,
            priority=priority.get(digest, 0),
            split=split.get(digest, 0),
            moe=Sharing.strictest(sharing.get(digest, ())),
            divergence_max=divergence.get(digest, DIVERGENCE_MAX),
        )
        for digest, count in copies.items()
    ]
    demands.sort(key=lambda d: (-d.priority, -d.model.need_bytes, d.model.digest))
    return demands, [models[digest] for digest in sorted(models) if digest not in copies]

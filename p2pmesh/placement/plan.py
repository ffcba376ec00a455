"""`plan(facts)`: which nodes should serve which model.

Pure, and the same function on every node. The only layout is `Whole`: each copy lies on one node.

The rules. Higher priority goes first and sees nothing of what is below it. Among models of one
priority, running copies keep their place as long as they fit (ready ones before loading ones);
only then are missing copies placed, larger models first, each on the nodes that have the file and
the room, in the order of weighted rendezvous.

Why a plan does not chase its own tail: carry out any part of it, in any order, and planning again
gives the same plan. Take one priority, everything above it being settled. Copies that the plan
keeps still fit. Copies that it starts become running ones that fit, and fill no more places than
were wanted. Copies that it stops were not counted. Those that found no room find none now, since
room in the second reckoning is never more than it was in the first. So nothing is chosen anew.

The embedded model comes last of all, and only when nothing that is wanted has a place: it takes
room from nobody, and a wish that cannot be met leaves nobody without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from itertools import groupby
from typing import Any

from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import WHOLE, PartId, ReplicaKey
from p2pmesh.placement.facts import ModelFacts, PlacementInputs
from p2pmesh.placement.rendezvous import rank
from p2pmesh.wire.codec import encode

ALGORITHM = 3
"""Goes up with every change that can change a plan; nodes compare plans of equal numbers only."""

PLAN_DIGEST_BYTES = 16
# In the rank of a model more memory than this many of its copies take counts no more: nobody draws
# all models by claiming a huge budget.
WEIGHT_COPIES_MAX = 8
FINGERPRINT_BYTES = 8
MIB = 2**20
GIB = 2**30


class Reason(StrEnum):
    """Why an assignment is as it is; `explain` makes it a sentence."""

    PLACED = "placed"
    UNWANTED = "unwanted"
    STANDBY = "standby"
    NO_HOLDER = "no-holder"
    TOO_LARGE = "too-large"
    NO_ROOM = "no-room"
    FEW_HOLDERS = "few-holders"
    LITTLE_ROOM = "little-room"


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A model in one piece, on each of some nodes.

    Attributes:
        nodes: Sorted by id.
    """

    nodes: tuple[NodeId, ...]

    def part_on(self, node: NodeId) -> str | None:
        """The name of the part that `node` should run; None for none."""
        return WHOLE if node in self.nodes else None

    def decision(self) -> list[Any]:
        """Return the values that nodes have to agree on."""
        return [WHOLE, self.nodes]


Layout = Whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The places of one model, and the figures behind the reason for them.

    Attributes:
        layout: How the model is served, and where.
        copies: How many copies are wanted; 0 when nobody wants it.
        need_bytes: What a copy takes, on `roomiest` where there is one.
        holders: How many live nodes have the file.
        roomiest: Of the nodes that have the file and no copy, the one that lacks the least memory
            (for TOO_LARGE: of its whole budget); None when there is none.
        room_bytes: What `roomiest` has to offer.
    """

    digest: ModelDigest
    layout: Layout
    reason: Reason
    copies: int
    need_bytes: int
    holders: int
    roomiest: NodeId | None = None
    room_bytes: int = 0

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Return the nodes that should serve the model, sorted by id."""
        return self.layout.nodes

    def decision(self) -> list[Any]:
        """Return what nodes agree on: the choice, without the figures that explain it."""
        return [self.digest, self.layout.decision(), self.reason.value, self.copies]

    def replicas(self) -> Iterator[ReplicaKey]:
        """Every part of the layout, with its node."""
        for node in self.nodes:
            name = self.layout.part_on(node)
            assert name is not None, "a layout has a part for each of its nodes"
            yield ReplicaKey(node, PartId(self.digest, name))

    def fingerprint(self) -> bytes:
        """Eight bytes by which nodes compare their plans for this one model."""
        data = encode([ALGORITHM, self.decision()])
        return blake2b(data, digest_size=FINGERPRINT_BYTES).digest()


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
    table = _Allocation(facts)
    demands, idle = _demands(facts)
    assignments = [a for _, group in groupby(demands, key=_priority) for a in table.serve(group)]
    fallbacks = {model.digest for model in facts.models if model.fallback}
    if not any(a.nodes for a in assignments if a.digest not in fallbacks):
        standby = [model for model in idle if model.fallback]
        idle = [model for model in idle if not model.fallback]
        assignments += table.serve(_Demand(model=m, copies=1, priority=0) for m in standby)
    assignments += [table.left_out(model) for model in idle]
    return Plan(
        algorithm=ALGORITHM,
        assignments=tuple(assignments),
        digest=blake2b(_encode(ALGORITHM, assignments), digest_size=PLAN_DIGEST_BYTES).digest(),
    )


def _encode(algorithm: int, assignments: Iterable[Assignment]) -> bytes:
    return encode([algorithm, [assignment.decision() for assignment in assignments]])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demand:
    """A wanted model: what all wants for it come to."""

    model: ModelFacts
    copies: int
    priority: int


def _priority(demand: _Demand) -> int:
    return demand.priority


def _demands(facts: PlacementInputs) -> tuple[list[_Demand], list[ModelFacts]]:
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
    for want in facts.wants:
        copies[want.digest] = max(copies.get(want.digest, 1), want.replicas)
        priority[want.digest] = max(priority.get(want.digest, want.priority), want.priority)
    demands = [
        _Demand(model=models[digest], copies=count, priority=priority.get(digest, 0))
        for digest, count in copies.items()
    ]
    demands.sort(key=lambda d: (-d.priority, -d.model.need_bytes, d.model.digest))
    return demands, [models[digest] for digest in sorted(models) if digest not in copies]


class _Allocation:
    """The state of a plan in the making: the room left, and the places given."""

    def __init__(self, facts: PlacementInputs) -> None:
        self._budgets = {part.node: part.budget_bytes for part in facts.nodes}
        self._room = dict(self._budgets)
        self._places: dict[ModelDigest, list[NodeId]] = {}
        self._running: dict[tuple[ModelDigest, str], list[NodeId]] = {}
        for part in facts.residents:
            if part.node in self._budgets and part.name == WHOLE:
                self._running.setdefault((part.digest, part.state), []).append(part.node)
        self._own_needs = {model.digest: dict(model.own_needs) for model in facts.models}

    def serve(self, demands: Iterable[_Demand]) -> list[Assignment]:
        """Gives demands of one priority their places."""
        equals = list(demands)
        for demand in equals:
            self.keep(demand)
        for demand in equals:
            self.extend(demand)
        return [self.assignment(demand) for demand in equals]

    def keep(self, demand: _Demand) -> None:
        """Gives the running copies their places, ready ones first, as far as they fit."""
        digest = demand.model.digest
        ready, loading = (self._running.get((digest, state), []) for state in ("ready", "loading"))
        self._give(demand, self._rank(demand, ready) + self._rank(demand, loading))

    def extend(self, demand: _Demand) -> None:
        """Gives the copies still missing a place among the nodes that have the file."""
        if len(self._places[demand.model.digest]) < demand.copies:
            free = self._free(demand)
            fitting = [node for node in free if self._room[node] >= self._need(demand, node)]
            self._give(demand, self._rank(demand, fitting))

    def assignment(self, demand: _Demand) -> Assignment:
        """Return the assignment of a demand, once all of its priority have been served."""
        places = self._places[demand.model.digest]
        holders = self._holders(demand.model)
        free = self._free(demand)
        reason = self._reason(demand, len(places), len(holders), free)
        offers = self._budgets if reason is Reason.TOO_LARGE else self._room
        short = len(places) < demand.copies
        roomiest = None
        if free and short:
            roomiest = min(free, key=lambda n: (self._need(demand, n) - offers[n], n))
        return Assignment(
            digest=demand.model.digest,
            layout=Whole(nodes=tuple(sorted(places))),
            reason=reason,
            copies=demand.copies,
            need_bytes=self._need(demand, roomiest),
            holders=len(holders),
            roomiest=roomiest,
            room_bytes=0 if roomiest is None else offers[roomiest],
        )

    def left_out(self, model: ModelFacts) -> Assignment:
        """The assignment of a model that is not wanted: no place."""
        return Assignment(
            digest=model.digest,
            layout=Whole(nodes=()),
            reason=Reason.STANDBY if model.fallback else Reason.UNWANTED,
            copies=0,
            need_bytes=model.need_bytes,
            holders=len(self._holders(model)),
        )

    def _reason(self, demand: _Demand, placed: int, holders: int, free: list[NodeId]) -> Reason:
        if placed >= demand.copies:
            return Reason.PLACED
        if placed:
            return Reason.LITTLE_ROOM if free else Reason.FEW_HOLDERS
        if not holders:
            return Reason.NO_HOLDER
        if all(self._budgets[node] < self._need(demand, node) for node in free):
            return Reason.TOO_LARGE
        return Reason.NO_ROOM

    def _give(self, demand: _Demand, nodes: list[NodeId]) -> None:
        places = self._places.setdefault(demand.model.digest, [])
        for node in nodes:
            need_bytes = self._need(demand, node)
            if len(places) < demand.copies and self._room[node] >= need_bytes:
                places.append(node)
                self._room[node] -= need_bytes

    def _holders(self, model: ModelFacts) -> list[NodeId]:
        return [node for node in model.holders if node in self._budgets]

    def _free(self, demand: _Demand) -> list[NodeId]:
        places = self._places[demand.model.digest]
        return [node for node in self._holders(demand.model) if node not in places]

    def _need(self, demand: _Demand, node: NodeId | None) -> int:
        """Return the bytes of a copy on `node`, as that node states them; anywhere, for None."""
        needs = self._own_needs.get(demand.model.digest, {})
        return demand.model.need_bytes if node is None else needs.get(node, demand.model.need_bytes)

    def _rank(self, demand: _Demand, nodes: list[NodeId]) -> list[NodeId]:
        most = WEIGHT_COPIES_MAX * demand.model.need_bytes
        weights = [(node, min(self._budgets[node], most) // MIB) for node in nodes]
        return rank(demand.model.digest, weights)


def explain(assignment: Assignment, name_of: Callable[[NodeId], str] = show_id) -> str:
    """The reason for an assignment as a person reads it.

    Args:
        assignment: Any assignment of a plan.
        name_of: What a node is called.
    """
    a = assignment
    node = "" if a.roomiest is None else name_of(a.roomiest)
    need = _show_bytes(a.need_bytes, up=True)
    offer = _show_bytes(a.room_bytes)
    short = f"only {len(a.nodes)} of {a.copies} copies"
    have = "1 node holds" if a.holders == 1 else f"{a.holders} nodes hold"
    match a.reason:
        case Reason.PLACED:
            return f"{len(a.nodes)} of {a.copies} {'copy' if a.copies == 1 else 'copies'}"
        case Reason.UNWANTED:
            return "nobody wants it"
        case Reason.STANDBY:
            return "served only while no other model that is wanted has a place"
        case Reason.NO_HOLDER:
            return "no live node holds the file"
        case Reason.TOO_LARGE:
            return (
                f"needs {need}, the largest budget of a node that holds it is {offer} on {node}:"
                " it takes more memory, a smaller quantisation or a shorter context"
            )
        case Reason.NO_ROOM:
            return (
                f"needs {need}, the largest free budget of a node that holds it is {offer} on"
                f" {node}: the rest is taken by models that run there or have a higher priority"
            )
        case Reason.FEW_HOLDERS:
            return f"{short}: {have} the file"
        case Reason.LITTLE_ROOM:
            return f"{short}: {have} the file, but {node} has {offer} free and a copy needs {need}"


def _show_bytes(size_bytes: int, *, up: bool = False) -> str:
    """Bytes as GiB, or MiB below one, with one decimal; cut off, or rounded up where asked."""
    unit, name = (GIB, "GiB") if size_bytes >= GIB else (MIB, "MiB")
    tenths = (size_bytes * 10 + (unit - 1 if up else 0)) // unit
    return f"{tenths // 10}.{tenths % 10} {name}"

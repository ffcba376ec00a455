"""The inputs of a plan: the signed records, reduced to what placement may depend on.

Pure. Facts are sets: neither order nor repetition of their parts means anything, and equal facts
have equal bytes. They hold only what owners have signed, never what one node happens to measure
or believe, so that all nodes with the same records have the same facts. All sizes are bytes, none
is negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, TypeVar

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import BYTES_MAX, ModelDigest
from p2pmesh.models.parts import WHOLE, PartId, Shard, ShardQuality, StageRange
from p2pmesh.placement.shape import Shape
from p2pmesh.sharing import DIVERGENCE_MAX, Sharing
from p2pmesh.wire.codec import encode

FORMAT = 8
FACTS_DIGEST_BYTES = 16

ResidentState = Literal["loading", "ready"]
Part = TypeVar("Part", bound="NodeFacts | ModelFacts | PlacementRequest | Resident")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class NodeFacts:
    """A live node, the memory it gives to models, and what it can do in a pipeline.

    Attributes:
        rpc: The build of its engine's RPC, "" for none; only equal ones make a pipeline.
        may_head: Whether it has the right to run stages on all other nodes.
        memory_mib_per_s: How fast it reads memory, coarsely; 0 when it does not say.
        confined: Whether it says that stages reach nothing on it, so that a head needs no right.
        stage_bytes: Of the budget, what stages may take, at most: they compute on the CPU.
        measured: Whether it has looked how far the others are; before, no pipeline is made with it.
        far: The nodes that are not near, with the classes of their links (`distance.py`), sorted.
    """

    node: NodeId
    budget_bytes: int
    rpc: str = ""
    may_head: bool = False
    memory_mib_per_s: int = 0
    confined: bool = False
    stage_bytes: int = BYTES_MAX
    measured: bool = True
    far: tuple[tuple[NodeId, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ModelFacts:
    """A model that some record describes.

    Attributes:
        need_bytes: Memory that one running copy takes, caches included.
        holders: The nodes that have its file, sorted.
        fallback: The embedded model: one copy of it runs while nothing that is wanted can run.
        own_needs: The holders that say of themselves that a copy takes another amount there.
        shapes: What it takes in stages, by the card of each holder; only where stages of it run, or
            it is wanted.
        expert_bytes: Of what a copy takes, the experts, by the card of each holder; as `shapes`,
            and only for models that have experts.
        qualities: How good shards of it are that several holders can make, or all; sorted.
        hearsay: How good others are that only one holder of several says it can make; sorted.
        smaller: Of a model of experts that is wanted, the quantisations of the same model that take
            less, by what holders say of both, the largest first.
        failing: The nodes that say a part of it failed there lately; sorted.
    """

    digest: ModelDigest
    need_bytes: int
    holders: tuple[NodeId, ...]
    fallback: bool = False
    own_needs: tuple[tuple[NodeId, int], ...] = ()
    shapes: tuple[tuple[NodeId, Shape], ...] = ()
    expert_bytes: tuple[tuple[NodeId, int], ...] = ()
    qualities: tuple[ShardQuality, ...] = ()
    hearsay: tuple[ShardQuality, ...] = ()
    smaller: tuple[ModelDigest, ...] = ()
    failing: tuple[NodeId, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "holders", tuple(sorted(set(self.holders))))
        own = {node: need for node, need in sorted(self.own_needs) if need != self.need_bytes}
        object.__setattr__(self, "own_needs", tuple(own.items()))
        if self.failing:
            object.__setattr__(self, "failing", tuple(sorted(set(self.failing))))
        if self.shapes:  # for few models
            object.__setattr__(self, "shapes", tuple(sorted(dict(self.shapes).items())))
        if self.expert_bytes:
            object.__setattr__(self, "expert_bytes", tuple(sorted(dict(self.expert_bytes).items())))
            object.__setattr__(self, "qualities", tuple(sorted(set(self.qualities))))
            object.__setattr__(self, "hearsay", tuple(sorted(set(self.hearsay))))

    def need_on(self, node: NodeId) -> int:
        """Memory in bytes that a copy takes on `node`, by what that node says itself."""
        return next((need for holder, need in self.own_needs if holder == node), self.need_bytes)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PlacementRequest:
    """A model that an owner asked the mesh to serve. It outlives its owner and ends by expiry.

    Attributes:
        replicas: Copies wanted; less than one counts as one.
        priority: The higher one gets memory first.
        split: Nodes that share it as one pipeline; below 2 each copy lies on one node.
        moe: How a model of experts may be shared where it fits on no node.
        divergence_max: The largest divergence of its shards, in millionths of a nat.
    """

    digest: ModelDigest
    owner: NodeId
    replicas: int = 1
    priority: int = 0
    split: int = 0
    moe: Sharing = Sharing.AUTO
    divergence_max: int = DIVERGENCE_MAX


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Resident:
    """A part that a node has signed to be running. A failed one is no resident.

    Attributes:
        stages: Of a stage, all stages of its pipeline.
        shard: Of a shard, what it holds.
    """

    digest: ModelDigest
    node: NodeId
    state: ResidentState
    name: str = WHOLE
    stages: tuple[StageRange, ...] = ()
    shard: Shard | None = None

    @property
    def part(self) -> PartId:
        """Return the part that this replica runs."""
        return PartId(self.digest, self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementInputs:
    """Everything that a plan depends on, in canonical form from the moment it is made.

    Should two parts claim the same thing (two budgets of one node), the larger stands, which for a
    resident is `ready`: any rule would do, as long as all nodes follow the same.
    """

    nodes: tuple[NodeFacts, ...] = ()
    models: tuple[ModelFacts, ...] = ()
    wants: tuple[PlacementRequest, ...] = ()
    residents: tuple[Resident, ...] = ()

    def __post_init__(self) -> None:
        canonical = {
            "nodes": _canonical(self.nodes, lambda part: part.node),
            "models": _canonical(self.models, lambda part: part.digest),
            "wants": _canonical(self.wants, lambda part: (part.digest, part.owner)),
            "residents": _canonical(self.residents, lambda one: (one.digest, one.name, one.node)),
        }
        for name, parts in canonical.items():
            object.__setattr__(self, name, parts)

    @classmethod
    def sorted(
        cls,
        *,
        nodes: tuple[NodeFacts, ...],
        models: tuple[ModelFacts, ...],
        wants: tuple[PlacementRequest, ...],
        residents: tuple[Resident, ...],
    ) -> PlacementInputs:
        """Make facts out of parts that are in the canonical order already, each key once."""
        facts = object.__new__(cls)
        for name, parts in (
            ("nodes", nodes),
            ("models", models),
            ("wants", wants),
            ("residents", residents),
        ):
            object.__setattr__(facts, name, parts)
        return facts

    def encode(self) -> bytes:
        """The canonical bytes: equal for equal facts, different for different ones."""
        return encode(
            [
                FORMAT,
                [
                    [
                        *(one.node, one.budget_bytes, one.rpc, one.may_head),
                        *(one.memory_mib_per_s, one.confined, one.stage_bytes),
                        *(one.measured, one.far),
                    ]
                    for one in self.nodes
                ],
                [
                    [
                        *(m.digest, m.need_bytes, m.holders, m.fallback, m.own_needs),
                        [[node, *shape] for node, shape in m.shapes],
                        [m.expert_bytes, *map(_claims, (m.qualities, m.hearsay))],
                        *(m.smaller, m.failing),
                    ]
                    for m in self.models
                ],
                [
                    [
                        *(w.owner, w.digest, w.replicas, w.priority, w.split),
                        *(w.moe.value, w.divergence_max),
                    ]
                    for w in self.wants
                ],
                [
                    # A shard's name covers what it holds.
                    [one.node, *one.part, one.state, [list(stage) for stage in one.stages]]
                    for one in self.residents
                ],
            ]
        )


def facts_digest(facts: PlacementInputs) -> bytes:
    """BLAKE2b-16 of the canonical bytes, equal for equal facts."""
    return blake2b(facts.encode(), digest_size=FACTS_DIGEST_BYTES).digest()


def _claims(said: Iterable[ShardQuality]) -> list[list[Any]]:
    return [[one.kind.value, *one[1:]] for one in said]


def _canonical(parts: Iterable[Part], key: Callable[[Part], Any]) -> tuple[Part, ...]:
    """Sorted, with one part for each key: the last one in the sorted order, so the largest."""
    return tuple({key(part): part for part in sorted(parts)}.values())

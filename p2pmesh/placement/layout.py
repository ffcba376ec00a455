"""Layouts: how a plan has one model served, and by which parts on which nodes. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import WHOLE, Shard, ShardQuality, StageName, shard_name, unit_id
from p2pmesh.placement.pipeline import Stage


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A model in stages, one on each of several nodes.

    Attributes:
        unit: Its id, which is in the names of its parts.
        stages: The head first.
    """

    unit: str
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, digest: ModelDigest, stages: tuple[Stage, ...]) -> Pipeline:
        """Return the pipeline of these stages."""
        return cls(unit=unit_id(digest, [one.range for one in stages]), stages=stages)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Return its nodes, the head first."""
        return tuple(stage.node for stage in self.stages)

    def part_on(self, node: NodeId) -> str | None:
        """The name of the part that `node` should run; None for none."""
        for number, stage in enumerate(self.stages):
            if stage.node == node:
                return str(StageName(self.unit, number))
        return None

    def decision(self) -> list[Any]:
        """Return the values that nodes have to agree on; the unit covers the ranges."""
        return ["pipeline", self.unit, self.nodes]


class PlacedShard(NamedTuple):
    """A shard on its node, with the memory that it takes there."""

    node: NodeId
    shard: Shard
    need_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A model in expert shards, each of which answers alone.

    Attributes:
        digest: Of the model.
        quality: How good each of them is at least.
        shards: In the order of their nodes.
    """

    digest: ModelDigest
    quality: ShardQuality
    shards: tuple[PlacedShard, ...]

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Return its nodes, sorted by id."""
        return tuple(one.node for one in self.shards)

    def shard_on(self, node: NodeId) -> Shard | None:
        """The shard that `node` should run; None for none."""
        return next((one.shard for one in self.shards if one.node == node), None)

    def part_on(self, node: NodeId) -> str | None:
        """The name of the part that `node` should run; None for none."""
        shard = self.shard_on(node)
        return None if shard is None else shard_name(self.digest, shard)

    def decision(self) -> list[Any]:
        """Return the values that nodes have to agree on; names cover what the shards hold."""
        return ["experts", self.nodes, [self.part_on(node) for node in self.nodes]]


Layout = Whole | Pipeline | Experts

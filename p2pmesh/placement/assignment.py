"""What a plan decides about one model, and the figures behind it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import PartId, ReplicaKey, ShardQuality
from p2pmesh.placement.layout import Layout


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
    FEW_LAYERS = "few-layers"
    NO_ENGINES = "no-engines"
    NO_RIGHT = "no-right"
    NO_STAGE_ROOM = "no-stage-room"
    SMALLER = "smaller"


class Refusal(NamedTuple):
    """Why there is no pipeline of a model.

    Attributes:
        reason: What is in the way.
        node: The node that it fails on, where it is one.
        need_bytes: Of the stage there; without a node, of all stages together.
        room_bytes: What that node, or all that could take part, has for it.
    """

    reason: Reason
    node: NodeId | None = None
    need_bytes: int = 0
    room_bytes: int = 0


class ShardRefusal(NamedTuple):
    """Why there are no expert shards of a model.

    Attributes:
        best: The best that is known of its shards; None when nothing is.
        divergence_max: What they may diverge, in millionths of a nat.
        need_bytes: The memory of a shard with the critical experts alone; 0 when quality is in the
            way.
        room_bytes: What the node with the most of it has for a shard.
        hosts: How many nodes have room for one.
        is_possible: Whether there would be shards, but for the pipeline that runs.
        is_hearsay: Whether only one holder of several says that it can make them.
    """

    best: ShardQuality | None
    divergence_max: int
    need_bytes: int = 0
    room_bytes: int = 0
    hosts: int = 0
    is_possible: bool = False
    is_hearsay: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The places of one model, and the figures behind the reason for them.

    Attributes:
        layout: How the model is served, and where.
        copies: How many copies are wanted; 0 when nobody wants it.
        need_bytes: What a copy takes, on `roomiest` where there is one.
        holders: How many live nodes have the file.
        roomiest: Of the nodes that have the file and no copy, the one that lacks the least memory
            (for TOO_LARGE: of its whole budget); None when there is none. Where a pipeline is
            refused, the node that it fails on, and the figures are those of its stage there.
        room_bytes: What `roomiest` has to offer.
        split: How many nodes should share it; 0 where that was not asked for.
        refusal: Why a model without a place is not split either, where nobody asked for that.
        shard_refusal: Why a model of experts that is not placed whole is not in shards.
        instead: The smaller quantisation of the same model that is served in its place.
    """

    digest: ModelDigest
    layout: Layout
    reason: Reason
    copies: int
    need_bytes: int
    holders: int
    roomiest: NodeId | None = None
    room_bytes: int = 0
    split: int = 0
    refusal: Refusal | None = None
    shard_refusal: ShardRefusal | None = None
    instead: ModelDigest | None = None

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Return the nodes that should serve the model, in the order of its layout."""
        return self.layout.nodes

    def decision(self) -> list[Any]:
        """Return what nodes agree on: the choice, without the figures that explain it."""
        decision = [self.digest, self.layout.decision(), self.reason.value, self.copies]
        return decision if self.instead is None else [*decision, self.instead]

    def replicas(self) -> Iterator[ReplicaKey]:
        """Every part of the layout, with its node."""
        for node in self.nodes:
            name = self.layout.part_on(node)
            assert name is not None, "a layout has a part for each of its nodes"
            yield ReplicaKey(node, PartId(self.digest, name))

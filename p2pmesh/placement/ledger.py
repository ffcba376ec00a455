"""What a plan in the making has given to whom, and the memory that is left. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.placement.layout import Experts
from p2pmesh.placement.pipeline import Stage


class Ledger:
    """The places given so far.

    Args:
        budgets: The memory of each node in bytes.

    Attributes:
        room: What is left of it.
        copies: The nodes of whole copies, each with the memory that the copy has, by model.
        pipelines: The stages of a model, the head first.
        shards: The shards of a model.
        stand_ins: The smaller quantisation that is served in place of a model.
    """

    def __init__(self, budgets: Mapping[NodeId, int]) -> None:
        self.room = dict(budgets)
        self.copies: dict[ModelDigest, dict[NodeId, int]] = {}
        self.pipelines: dict[ModelDigest, tuple[Stage, ...]] = {}
        self.shards: dict[ModelDigest, Experts] = {}
        self.stand_ins: dict[ModelDigest, ModelDigest] = {}

    def copy(self) -> Ledger:
        """Return one that can be changed without this."""
        other = Ledger(self.room)
        other.copies = {digest: dict(nodes) for digest, nodes in self.copies.items()}
        other.pipelines, other.shards = dict(self.pipelines), dict(self.shards)
        other.stand_ins = dict(self.stand_ins)
        return other

    def places(self, digest: ModelDigest) -> dict[NodeId, int]:
        """Return the nodes of whole copies of a model, with their memory."""
        return self.copies.setdefault(digest, {})

    def give_copy(self, digest: ModelDigest, node: NodeId, need_bytes: int) -> None:
        """Give a whole copy its place."""
        self.places(digest)[node] = need_bytes
        self.room[node] -= need_bytes

    def give_stages(self, digest: ModelDigest, stages: tuple[Stage, ...]) -> None:
        """Give the stages of a pipeline their places."""
        self.pipelines[digest] = stages
        for stage in stages:
            self.room[stage.node] -= stage.need_bytes

    def give_shards(self, found: Experts) -> None:
        """Give shards their places."""
        self.shards[found.digest] = found
        for shard in found.shards:
            self.room[shard.node] -= shard.need_bytes

    def held(self, digest: ModelDigest) -> list[tuple[NodeId, int]]:
        """Return the memory of what is there in place of whole copies of a model, by node.

        A stand-in that serves another model too is not counted.
        """
        held = [(stage.node, stage.need_bytes) for stage in self.pipelines.get(digest, ())]
        if digest in self.shards:
            held += [(shard.node, shard.need_bytes) for shard in self.shards[digest].shards]
        stand_in = self.stand_ins.get(digest)
        if stand_in is not None and list(self.stand_ins.values()).count(stand_in) == 1:
            held += self.places(stand_in).items()
        return held

    def take_back(self, digest: ModelDigest) -> None:
        """Take back what is there in place of whole copies of a model."""
        for node, need_bytes in self.held(digest):
            self.room[node] += need_bytes
        self.pipelines.pop(digest, None)
        self.shards.pop(digest, None)
        stand_in = self.stand_ins.pop(digest, None)
        if stand_in is not None and stand_in not in self.stand_ins.values():
            self.copies[stand_in] = {}

    def taken_by_stages(self) -> Counter[NodeId]:
        """Return the memory of each node that stages have."""
        taken: Counter[NodeId] = Counter()
        for stages in self.pipelines.values():
            for stage in stages:
                taken[stage.node] += stage.need_bytes
        return taken

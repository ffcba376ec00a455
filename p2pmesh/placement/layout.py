"""Layouts: how a plan has one model served, and by which parts on which nodes. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import WHOLE, StageName, unit_id
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


Layout = Whole | Pipeline

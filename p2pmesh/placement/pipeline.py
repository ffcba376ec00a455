"""Pipelines: one model over several nodes, each with some of its layers in a row.

Pure.
"""

from __future__ import annotations

from typing import NamedTuple

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import StageRange


class Stage(NamedTuple):
    """One stage of a pipeline.

    Attributes:
        node: Who runs it.
        first_layer: Counted from 0.
        last_layer: Is one of them.
        need_bytes: Memory that it takes: weights, cache and buffers; for the head also the
            embedding, the output and the server.
    """

    node: NodeId
    first_layer: int
    last_layer: int
    need_bytes: int

    @property
    def range(self) -> StageRange:
        """Return what the id of the unit covers."""
        return StageRange(self.node, self.first_layer, self.last_layer)

"""How far this node is from the others, from the round trips of its probes."""

from __future__ import annotations

from typing import Protocol

from p2pmesh.identity.keys import NodeId
from p2pmesh.placement.distance import NEAR, Link
from p2pmesh.state.registers import FAR_MAX

PATIENCE_S = 5.0  # a node that answers no probe holds up no pipelines of others


class RoundTrips(Protocol):
    """What of a mesh the distances come from."""

    @property
    def linked(self) -> frozenset[NodeId]:
        """The nodes with a gossip link."""

    @property
    def catching_up(self) -> bool:
        """Whether this node is new in the mesh, and knows hardly anybody yet."""

    def rtt_s(self, node: NodeId) -> float | None:
        """Return the round trip to a node; None while it is not known."""


class MeasuredDistances:
    """The links of this node in one mesh.

    Attributes:
        are_measured: Whether all its links have been looked at, once.
    """

    def __init__(self, mesh: RoundTrips) -> None:
        """Nothing is looked at yet."""
        self.are_measured = False
        self._mesh = mesh
        self._links: dict[NodeId, Link] = {}
        self._since_s: float | None = None

    @property
    def far(self) -> tuple[tuple[NodeId, int], ...]:
        """The nodes that are not near, with their classes; of very many the furthest, sorted."""
        found = [
            (node, link.link_class)
            for node, link in self._links.items()
            if link.link_class is not None and link.link_class > NEAR
        ]
        found.sort(key=lambda one: (-one[1], one[0]))
        return tuple(sorted(found[:FAR_MAX]))

    def look(self, now_s: float) -> None:
        """Take the present round trips of all links; what is not linked is forgotten.

        Args:
            now_s: Of any clock that goes on evenly.
        """
        linked = self._mesh.linked
        self._links = {node: self._links.get(node) or Link() for node in linked}
        for node, link in self._links.items():
            rtt_s = self._mesh.rtt_s(node)
            if rtt_s is not None:
                link.look(round(rtt_s * 1_000_000))
        since_s = self._since_s = now_s if self._since_s is None else self._since_s
        known = all(link.link_class is not None for link in self._links.values())
        ready = known and not self._mesh.catching_up
        self.are_measured = self.are_measured or ready or now_s - since_s >= PATIENCE_S

"""How each node is for routing, and when that changes. Pure.

A neighbour is what its probes say. Who is not a neighbour is live until two others miss it: with a
thousand members this node watches ten, and one alone could mean ill. Whoever the mesh has removed
is dead for everybody.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from p2pmesh.gossip.events import Health, HealthChanged
from p2pmesh.gossip.members import Members
from p2pmesh.gossip.neighbours import Neighbours
from p2pmesh.gossip.probe import Prober
from p2pmesh.gossip.removal import Removal
from p2pmesh.identity.keys import NodeId


class Healths:
    """The health of everybody, as one node sees it.

    Args:
        members: The members.
        prober: What was measured of neighbours.
        neighbours: Who should be linked.
        removal: Whom others miss.
        links: Who is linked.
    """

    def __init__(
        self,
        members: Members,
        prober: Prober,
        neighbours: Neighbours,
        removal: Removal,
        links: AbstractSet[NodeId],
    ) -> None:
        self._members, self._prober, self._links = members, prober, links
        self._neighbours, self._removal = neighbours, removal
        self._touched: set[NodeId] = set()
        self._told: dict[NodeId, Health] = {}

    def of(self, node: NodeId) -> Health:
        """How `node` is; nodes that nothing is known of are suspect."""
        if node == self._members.me:
            return Health.LIVE
        if node in self._members.document.removed:
            return Health.DEAD
        if node in self._links:
            return Health.LIVE if self._prober.answering(node) else Health.SUSPECT
        lost = node in self._neighbours.wanted or self._prober.heard_at(node) is not None
        missed = lost or node in self._removal.non_voters or node not in self._members.known
        return Health.SUSPECT if missed else Health.LIVE

    def touch(self, nodes: Iterable[NodeId]) -> None:
        """Something happened that may have changed how these are."""
        self._touched.update(nodes)

    def changes(self) -> list[HealthChanged]:
        """Return the changes since the last call."""
        if not self._touched:
            return []
        changed: list[HealthChanged] = []
        for node in sorted(self._touched - {self._members.me}):
            health = self.of(node)
            if self._told.get(node, Health.SUSPECT) is not health:
                changed.append(HealthChanged(node=node, health=health))
            self._told[node] = health
            if node not in self._members.known and node not in self._links:
                del self._told[node]
        self._touched.clear()
        return changed

"""How each node is for routing, and when that changes. Pure.

A neighbour is what its probes say. Who is not a neighbour is live until two others miss it: with a
thousand members this node watches ten, and one alone could mean ill. Whoever the mesh has removed
is dead for everybody.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from p2pmesh.gossip.charges import Charges
from p2pmesh.gossip.events import Health, HealthChanged
from p2pmesh.gossip.neighbourhood import Neighbourhood
from p2pmesh.gossip.probe import Prober
from p2pmesh.gossip.roster import Roster
from p2pmesh.identity.keys import NodeId


class Healths:
    """The health of everybody, as one node sees it.

    Args:
        roster: The members.
        prober: What was measured of neighbours.
        neighbourhood: Who should be linked.
        charges: Whom others miss.
        links: Who is linked.
    """

    def __init__(
        self,
        roster: Roster,
        prober: Prober,
        neighbourhood: Neighbourhood,
        charges: Charges,
        links: AbstractSet[NodeId],
    ) -> None:
        self._roster, self._prober, self._links = roster, prober, links
        self._neighbourhood, self._charges = neighbourhood, charges
        self._touched: set[NodeId] = set()
        self._told: dict[NodeId, Health] = {}

    def of(self, node: NodeId) -> Health:
        """How `node` is; nodes that nothing is known of are suspect."""
        if node == self._roster.me:
            return Health.LIVE
        if node in self._roster.document.removed:
            return Health.DEAD
        if node in self._links:
            return Health.LIVE if self._prober.answering(node) else Health.SUSPECT
        lost = node in self._neighbourhood.wanted or self._prober.heard_at(node) is not None
        missed = lost or node in self._charges.discounted or node not in self._roster.known
        return Health.SUSPECT if missed else Health.LIVE

    def touch(self, nodes: Iterable[NodeId]) -> None:
        """Something happened that may have changed how these are."""
        self._touched.update(nodes)

    def changes(self) -> list[HealthChanged]:
        """Return the changes since the last call."""
        if not self._touched:
            return []
        changed: list[HealthChanged] = []
        for node in sorted(self._touched - {self._roster.me}):
            health = self.of(node)
            if self._told.get(node, Health.SUSPECT) is not health:
                changed.append(HealthChanged(node=node, health=health))
            self._told[node] = health
            if node not in self._roster.known and node not in self._links:
                del self._told[node]
        self._touched.clear()
        return changed

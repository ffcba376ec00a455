"""This node's place on the overlay: links wanted, whom it observes, who observes it. Pure."""

from __future__ import annotations

from p2pmesh.gossip.roster import Roster
from p2pmesh.gossip.shared import Shared
from p2pmesh.identity.keys import NodeId


class Neighbourhood:
    """The neighbours of one node: derived from the members, until `update` is called.

    Attributes:
        wanted: Nodes to be linked with.
        eager: Those that get at once what is new.
        subjects: Whom this node observes.
        observers: Who observes this node.
    """

    def __init__(self, roster: Roster, shared: Shared) -> None:
        self.wanted: frozenset[NodeId] = frozenset()
        self.eager: frozenset[NodeId] = frozenset()
        self.subjects: frozenset[NodeId] = frozenset()
        self.observers: frozenset[NodeId] = frozenset()
        self._roster, self._shared = roster, shared
        self._population = roster.population
        self._overlay = shared.overlay(self._population, None)
        self._skipped: frozenset[NodeId] = frozenset()
        self._unsigned: frozenset[NodeId] = frozenset()

    def update(
        self, skipped: frozenset[NodeId], unsigned: frozenset[NodeId] = frozenset()
    ) -> frozenset[NodeId]:
        """Work it out again if something changed; returns those who are or were wanted, if so.

        Args:
            skipped: Members that do not count as observers, see `Charges.discounted`.
            unsigned: Removed ones that this node observes all the same, see `Charges.unsigned`.
        """
        population, me = self._roster.population, self._roster.me
        moved = population is not self._population and population != self._population
        if not moved and (skipped, unsigned) == (self._skipped, self._unsigned):
            return frozenset()
        if moved:
            self._overlay = self._shared.overlay(population, self._overlay)
            self._population = population
            self.eager = self._overlay.eager(me)
        self._skipped, self._unsigned = skipped, unsigned
        self.subjects = self._overlay.subjects(me, skipped) | unsigned
        self.observers = frozenset(self._overlay.observers(me, skipped))
        # Whoever stands in for an observer that does not count needs a link like that one had.
        before, self.wanted = self.wanted, self._overlay.neighbours(me) | self.subjects
        return before | self.wanted

    def near(self, node: NodeId) -> frozenset[NodeId]:
        """The neighbours of another node."""
        return self._overlay.neighbours(node)

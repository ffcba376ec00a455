"""This node's place on the overlay: links wanted, whom it observes, who observes it. Pure."""

from __future__ import annotations

from p2pmesh.gossip.members import Members
from p2pmesh.gossip.shared import Shared
from p2pmesh.identity.keys import NodeId


class Neighbours:
    """The neighbours of one node: derived from the members, until `update` is called.

    Attributes:
        wanted: Nodes to be linked with.
        eager: Those that get at once what is new.
        subjects: Whom this node observes.
        observers: Who observes this node.
    """

    def __init__(self, members: Members, shared: Shared) -> None:
        self.wanted: frozenset[NodeId] = frozenset()
        self.eager: frozenset[NodeId] = frozenset()
        self.subjects: frozenset[NodeId] = frozenset()
        self.observers: frozenset[NodeId] = frozenset()
        self._members, self._shared = members, shared
        self._population = members.population
        self._overlay = shared.overlay(self._population, None)
        self._skipped: frozenset[NodeId] = frozenset()
        self._weakly_removed: frozenset[NodeId] = frozenset()

    def update(
        self, skipped: frozenset[NodeId], weakly_removed: frozenset[NodeId] = frozenset()
    ) -> frozenset[NodeId]:
        """Work it out again if something changed; returns those who are or were wanted, if so.

        Args:
            skipped: Members that do not count as observers, see `Removal.non_voters`.
            weakly_removed: Removed nodes that this node observes all the same, see
                `Removal.weakly_removed`.
        """
        population, me = self._members.population, self._members.me
        moved = population is not self._population and population != self._population
        if not moved and (skipped, weakly_removed) == (self._skipped, self._weakly_removed):
            return frozenset()
        if moved:
            self._overlay = self._shared.overlay(population, self._overlay)
            self._population = population
            self.eager = self._overlay.eager(me)
        self._skipped, self._weakly_removed = skipped, weakly_removed
        self.subjects = self._overlay.subjects(me, skipped) | weakly_removed
        self.observers = frozenset(self._overlay.observers(me, skipped))
        # Whoever stands in for an observer that does not count needs a link like that one had.
        before, self.wanted = self.wanted, self._overlay.neighbours(me) | self.subjects
        return before | self.wanted

    def near(self, node: NodeId) -> frozenset[NodeId]:
        """The neighbours of another node."""
        return self._overlay.neighbours(node)

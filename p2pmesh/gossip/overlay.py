"""The graph of links and observers: the same on every node. Pure.

Up to `FULL_MESH_MAX` members everybody is linked with everybody. Above that the members stand on
five rings, each in another pseudo-random order. A node is linked with its neighbours on all of
them, passes new records on at once along the first three, and is observed by those who stand
before it. Two nodes that can both not be dialled are never linked, so each ring passes them by as
if the other were not there. All of it follows from the set of members alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b

from p2pmesh.identity.keys import NodeId

RINGS = 5  # observers of each node, and half of the links that a node has
EAGER_RINGS = 3  # six neighbours: about five copies of each record; four neighbours lose some
FULL_MESH_MAX = 11  # so many would have nearly as many links on rings
PLACES_MAX = 32 * 1024  # remembered: twice as many as a document has owners
_PLACE_BYTES = 8


_Place = tuple[int, NodeId]


@lru_cache(PLACES_MAX)
def _places(node: NodeId) -> tuple[_Place, ...]:
    """Return a node's place on each ring; the id decides between two at the same place."""
    return tuple(
        (int.from_bytes(blake2b(bytes([ring]) + node, digest_size=_PLACE_BYTES).digest()), node)
        for ring in range(RINGS)
    )


class Overlay:
    """The rings of one set of members; nobody else is in them, and nothing is said of others.

    Args:
        members: Ids, each with whether the node can be dialled.
        like: An overlay of nearly the same members; this one is then made in a tenth of the time.

    Attributes:
        dialable: The members, each with whether it can be dialled.
        rings: The members in the order in which they stand on each.
    """

    __slots__ = ("_observers", "_ways_in", "dialable", "rings")

    def __init__(self, members: Iterable[tuple[NodeId, bool]], like: Overlay | None = None) -> None:
        self.dialable = dict(members)
        self._observers: dict[NodeId, tuple[NodeId, ...]] = {}  # those found without skipping
        before: dict[NodeId, bool] = {} if like is None else like.dialable
        gone = before.keys() - self.dialable.keys()
        come = [_places(node) for node in self.dialable.keys() - before.keys()]
        self.rings: list[list[_Place]] = []
        for at in range(RINGS):
            ring = [] if like is None else like.rings[at]
            stay = [place for place in ring if place[1] not in gone] if gone else ring
            # Sorting takes microseconds where nearly all is in order already.
            self.rings.append(sorted([*stay, *(places[at] for places in come)]))
        # The same without those that cannot be dialled, who are no way in for each other: however
        # many of them stand beside one, its neighbours are found in a few steps.
        self._ways_in = [
            [place for place in ring if self.dialable[place[1]]] for ring in self.rings
        ]

    def __len__(self) -> int:
        return len(self.dialable)

    def neighbours(self, me: NodeId) -> frozenset[NodeId]:
        """All that `me` is to be linked with; they say the same of `me`.

        Nobody is watched over without a link: who stands beside another on two rings has an
        observer from further off in place of the second one.
        """
        return self._near(me, RINGS).union(self.observers(me), self.subjects(me))

    def eager(self, me: NodeId) -> frozenset[NodeId]:
        """Those neighbours to whom `me` passes what is new at once; this too goes both ways."""
        return self._near(me, EAGER_RINGS)

    def observers(
        self, subject: NodeId, skip: frozenset[NodeId] = frozenset()
    ) -> tuple[NodeId, ...]:
        """Return the observers of `subject`: as many as there are rings, or all who can be.

        Each ring is walked back from the subject to the first node that is not yet chosen.

        Args:
            subject: The node watched over.
            skip: Nodes that do not count as observers.
        """
        if subject not in self.dialable:
            return ()
        if skip:
            return self._find_observers(subject, skip)
        found = self._observers.get(subject)
        if found is None:
            found = self._observers[subject] = self._find_observers(subject, skip)
        return found

    def subjects(self, me: NodeId, skip: frozenset[NodeId] = frozenset()) -> frozenset[NodeId]:
        """Return the subjects of `me`: exactly those whose observers `me` is one of.

        Args:
            me: The observer.
            skip: As for `observers`.
        """
        if me not in self.dialable or me in skip:
            return frozenset()
        candidates = set[NodeId]()
        for ring in range(len(self.rings)):
            candidates.update(self._ahead(me, ring, skip))
        return frozenset(node for node in candidates if me in self.observers(node, skip))

    def _find_observers(self, subject: NodeId, skip: frozenset[NodeId]) -> tuple[NodeId, ...]:
        chosen: list[NodeId] = []
        for ring in range(len(self.rings)):
            for node in self._walk(subject, ring, forward=False):
                if node not in chosen and node not in skip:
                    chosen.append(node)
                    break
        return tuple(chosen)

    def _ahead(self, me: NodeId, ring: int, skip: frozenset[NodeId]) -> Iterator[NodeId]:
        """Those whose walk back on this ring can end at `me`.

        It goes on only past nodes that do not count and those that earlier rings chose, which are
        as many as there are earlier rings. So it cannot come from behind more nodes than those
        that count for everybody, which are the dialable ones.
        """
        between = 0
        for node in self._walk(me, ring, forward=True):
            yield node
            between += self.dialable[node] and node not in skip
            if between > ring:
                return

    def _near(self, me: NodeId, rings: int) -> frozenset[NodeId]:
        if me not in self.dialable:
            return frozenset()
        if len(self.dialable) <= FULL_MESH_MAX:
            return frozenset(self._walk(me, 0, forward=True))
        found = set[NodeId]()
        for ring in range(rings):
            found.update(self._beside(me, ring, forward=True))
            found.update(self._beside(me, ring, forward=False))
        return frozenset(found)

    def _beside(self, me: NodeId, ring: int, *, forward: bool) -> Iterator[NodeId]:
        """The next node that `me` can be linked with, and all to whom `me` is the next."""
        for position, node in enumerate(self._walk(me, ring, forward=forward)):
            if self.dialable[node]:
                if position == 0:
                    yield node
                return
            yield node

    def _walk(self, start: NodeId, ring: int, *, forward: bool) -> Iterator[NodeId]:
        """All that `start` can be linked with once round the ring, from next to it on."""
        order = self.rings[ring] if self.dialable[start] else self._ways_in[ring]
        at = bisect_left(order, _places(start)[ring])
        others = len(order) - self.dialable[start]
        # Indices below zero count from the end, which is where a ring goes on.
        steps = range(at - others, at) if forward else range(at - 1, at - 1 - others, -1)
        return (order[step][1] for step in steps)


Overlays = Callable[[frozenset[tuple[NodeId, bool]], Overlay | None], Overlay]
"""How overlays are made, with one to go by; a simulation of many nodes may remember them."""

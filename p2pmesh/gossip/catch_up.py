"""Whether this node is up to date after its start or a sleep. Pure.

Until then it accuses nobody and nothing destructive may follow from what it knows. It is up to
date once it knows all that three of its neighbours know, or as many as it has. One that nobody
answers for a while has nobody to learn from. One that still differs long after it could have
learned everything has something to say itself: it takes part again, so that they come to agree.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from p2pmesh.identity.keys import NodeId

AGREEING = 3
ALONE_AFTER_S = 10.0
LINKED_AFTER_S = 20.0  # a snapshot of a thousand nodes takes a few
CUTOFF_COUNTS_AFTER_S = 6.0  # before that, what is older than the cutoff is next to nothing


class CatchUp:
    """One node's way back to being up to date.

    Args:
        done: There is nobody to learn from: it is up to date from the start.
    """

    def __init__(self, *, done: bool) -> None:
        self.done = done
        self._since = 0.0
        self._agreeing: set[NodeId] = set()

    def begin(self, now: float) -> None:
        """The node was away, or starts."""
        self._since, self._agreeing = now, set()

    def again(self, now: float) -> None:
        """The node was away, for how long it does not matter."""
        self.done = False
        self.begin(now)

    def agreed(self, node: NodeId, *, complete: bool, now: float) -> None:
        """A neighbour knows the same.

        Args:
            node: The neighbour.
            complete: It was compared whole, and not only up to some seconds ago.
            now: In seconds.
        """
        if complete or now - self._since >= CUTOFF_COUNTS_AFTER_S:
            self._agreeing.add(node)

    def compares_all(self, now: float) -> bool:
        """Whether this node compares everything that it knows, down to the present.

        That it agrees with some who are as new as itself says little, so it goes on for a while.
        """
        return not self.done or now - self._since < CUTOFF_COUNTS_AFTER_S

    def review(
        self, links: AbstractSet[NodeId], exhausted_peers: AbstractSet[NodeId], now: float
    ) -> None:
        """See whether it is up to date now.

        Args:
            links: Who could tell it something.
            exhausted_peers: Who could not: they differ, and have nothing that it would take.
            now: In seconds.
        """
        if self.done:
            return
        if links:
            self.done = len((self._agreeing | exhausted_peers) & links) >= min(AGREEING, len(links))
        self.done |= now - self._since >= (LINKED_AFTER_S if links else ALONE_AFTER_S)

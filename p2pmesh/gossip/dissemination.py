"""Passing on what is new: at once to some neighbours, by name to the others. Pure.

What a node writes itself goes to all its links. What it learns goes on at once along the eager
rings. The ids of what it learned a moment ago ride on its next probes and answers, so that whoever
was left out asks for it within a second; they cost no message of their own (the lazy half of
Plumtree, without its trees, which many origins keep breaking).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from p2pmesh.gossip.events import Send
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import RECENT_MAX, Push, in_chunks

NAMED_AFTER_S = 0.3  # before that it is most likely on its way
NAMED_UNTIL_S = 1.5  # each neighbour is probed or answered once a second
LEARNED_MAX = 1024  # ids remembered; in a storm repair takes over
EAGER_LINKS_MIN = 4  # with fewer of them up, everybody gets what is new


class Dissemination:
    """The facts that this node passes on."""

    def __init__(self) -> None:
        self._learned: deque[tuple[float, bytes]] = deque(maxlen=LEARNED_MAX)  # too young to name
        self._named: deque[tuple[float, bytes]] = deque(maxlen=RECENT_MAX)

    def flood(self, facts: Push, targets: Iterable[NodeId]) -> list[Send]:
        """The same messages to all `targets`."""
        messages = list(in_chunks(facts))
        return [Send(node=node, message=one) for node in sorted(targets) for one in messages]

    def eager_peers(
        self, eager: AbstractSet[NodeId], links: AbstractSet[NodeId], source: NodeId
    ) -> AbstractSet[NodeId]:
        """Return the peers that get at once what came from `source`."""
        linked = eager & links
        return (linked if len(linked) >= EAGER_LINKS_MIN else links) - {source}

    def learned(self, ids: Iterable[bytes], now: float) -> None:
        """These items are new here."""
        self._learned.extend((now, one) for one in ids)

    def recent(self, now: float) -> tuple[bytes, ...]:
        """The ids to name in a probe or answer now, the newest if there are too many."""
        learned, named = self._learned, self._named
        while learned and now - learned[0][0] >= NAMED_AFTER_S:
            named.append(learned.popleft())
        while named and now - named[0][0] > NAMED_UNTIL_S:
            named.popleft()
        return tuple(item for _, item in named) if named else ()

"""Items that this node lacks, and who is asked for them. Pure.

Each item is asked of one neighbour at a time, and each neighbour for one chunk at a time, so that
a probe never waits behind more. What came and did not stand (stale, void, refused) is not asked
for again for a while, whoever names it; who does not deliver is not asked for anything for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from p2pmesh.gossip.events import Send
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from p2pmesh.wire.messages import FetchRequest

TIMEOUT_S = 5.0  # a chunk on a link that loses a fifth of its packets comes well before
PAUSE_S = 5.0  # long enough for another neighbour to be asked for what one withheld
WANT_AT_ONCE = 128  # the smallest records fill a chunk with so many
QUEUE_MAX = 4096  # ids waiting for one neighbour; the rest is found by the next comparison
REFUSED_MAX = 4096  # ids remembered as refused; those of longest ago are forgotten first
REFUSED_S = 60.0  # what was void may stand later: by then a clock or a lease has moved on


@dataclass(slots=True)
class _Pull:
    queue: deque[bytes] = field(default_factory=deque)
    in_flight: tuple[bytes, ...] = ()
    sent_at: float = 0.0


class Fetches:
    """The items that this node has asked for.

    Args:
        document: Says what is lacking.

    Attributes:
        gained: How many items that were asked for stood when they came.
        refused: How many did not.
    """

    def __init__(self, document: Document) -> None:
        self.gained = self.refused = 0
        self._document = document
        self._fetches: dict[NodeId, _Pull] = {}
        self._asked: dict[bytes, NodeId] = {}  # whom each id is, or will be, asked of
        self._refused: dict[bytes, float] = {}  # when, in that order
        self._paused: dict[NodeId, float] = {}  # until when

    @property
    def busy(self) -> bool:
        """Whether anything is still to come."""
        return bool(self._fetches)

    def backlog(self, node: NodeId) -> int:
        """How many items `node` is still to be asked for or to send."""
        pull = self._fetches.get(node)
        return len(pull.queue) + len(pull.in_flight) if pull else 0

    def in_flight(self, node: NodeId) -> frozenset[bytes]:
        """Return the request to `node` that is in flight."""
        pull = self._fetches.get(node)
        return frozenset(pull.in_flight) if pull else frozenset()

    def add(self, node: NodeId, ids: Iterable[bytes], now: float) -> int:
        """`node` has these; returns how many of them are lacking here and may be worth having.

        Args:
            node: A neighbour.
            ids: What it holds.
            now: In seconds.
        """
        is_paused = now < self._paused.get(node, now)
        found = 0
        for item in ids:
            if self._document.item(item) is not None or self._is_refused(item, now):
                continue
            found += 1
            if item not in self._asked and not is_paused and self.backlog(node) < QUEUE_MAX:
                self._asked[item] = node
                self._fetches.setdefault(node, _Pull()).queue.append(item)
        return found

    def ask(self, node: NodeId, now: float) -> list[Send]:
        """The next request to `node`, if there is anything to ask for and nothing under way."""
        pull = self._fetches.get(node)
        if pull is None or pull.in_flight:
            return []
        wanted: list[bytes] = []
        while pull.queue and len(wanted) < WANT_AT_ONCE:
            item = pull.queue.popleft()
            if self._document.item(item) is None:
                wanted.append(item)
            else:  # it came another way
                self._asked.pop(item, None)
        if not wanted:
            del self._fetches[node]
            return []
        pull.in_flight, pull.sent_at = tuple(wanted), now
        return [Send(node=node, message=FetchRequest(ids=pull.in_flight))]

    def arrived(
        self, node: NodeId, seen: AbstractSet[bytes], now: float, *, whole: bool = True
    ) -> bool:
        """Facts came on request; what is left of the request is queued again.

        An empty reply means that `node` has nothing of it.

        Args:
            node: Who was asked.
            seen: The ids of what it sent, as far as that was looked at.
            now: In seconds.
            whole: All of it was looked at; what was not is found by the next session.

        Returns:
            Whether it was this request.
        """
        pull = self._fetches.get(node)
        if pull is None or not pull.in_flight:
            return False
        came = seen & frozenset(pull.in_flight)
        if seen and not came and whole:
            return False
        is_over = not (seen and whole)
        for item in pull.in_flight:
            if item in came or is_over:
                self._asked.pop(item, None)
            if item in came:
                self._judge(item, now, whole=whole)
        if not is_over:
            pull.queue.extendleft(item for item in reversed(pull.in_flight) if item not in came)
        pull.in_flight = ()
        return True

    def tick(self, now: float) -> list[NodeId]:
        """Give up on those who did not deliver; returns them."""
        late = [
            node
            for node, pull in self._fetches.items()
            if pull.in_flight and now - pull.sent_at >= TIMEOUT_S
        ]
        for node in late:
            self.link_down(node)
            self._paused[node] = now + PAUSE_S
        self._paused = {node: until for node, until in self._paused.items() if now < until}
        return late

    def retry(self) -> None:
        """Ask again for what did not stand: it may stand now."""
        self._refused.clear()

    def link_down(self, node: NodeId) -> None:
        """Free the items that `node` was asked for, so that other peers can be asked."""
        self._paused.pop(node, None)
        pull = self._fetches.pop(node, None)
        if pull is not None:
            for item in (*pull.queue, *pull.in_flight):
                self._asked.pop(item, None)

    def _judge(self, item: bytes, now: float, *, whole: bool) -> None:
        if self._document.item(item) is not None:
            self.gained += 1
            return
        if not whole:
            return
        self.refused += 1
        self._refused.pop(item, None)
        self._refused[item] = now
        if len(self._refused) > REFUSED_MAX:
            del self._refused[next(iter(self._refused))]

    def _is_refused(self, item: bytes, now: float) -> bool:
        return now - self._refused.get(item, now - REFUSED_S) < REFUSED_S

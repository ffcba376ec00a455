"""Repair between neighbours: differing items are found by ranges, then fetched. Pure.

Probes carry a fingerprint as of some seconds ago. One that differs twice in a row begins a
session: the asker says ranges (see `ranges`), the other one, which keeps nothing in mind, answers
what differs, and so on until both have named the ids that the other lacks. Each then pulls those in
chunks (see `fetch`). It all goes over the link that probes use, which costs one part less than a
connection of its own, as a probe never waits behind more than a chunk or two. A newcomer's snapshot
is the same with an almost empty side.

A node begins one session at a time. Sessions that lead to nothing are repeated ever more rarely,
and the work that a neighbour can ask for is bounded by a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from p2pmesh.gossip.buckets import Buckets
from p2pmesh.gossip.events import Send
from p2pmesh.gossip.fetch import TIMEOUT_S, Fetches
from p2pmesh.gossip.ranges import (
    ITEMS_AT_ONCE,
    SPLIT,
    Reply,
    ascending,
    differing,
    is_opening,
    split,
    within,
    work_on,
)
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from p2pmesh.wire.messages import (
    FINGERPRINT_BYTES,
    RANGES_MAX,
    FetchRequest,
    Items,
    Message,
    Range,
    Ranges,
    gather,
    in_chunks,
)

# Units of work: an id looked at, less than half a microsecond. A twentieth of a core per neighbour.
WORK_PER_S = 200_000.0
WORK_BURST = 4_000_000.0  # a snapshot of the largest document, at once
WORK_PER_RANGE = 10
WORK_PER_WANTED = 10
WORK_PER_OWN = 40_000  # five such replies in a second, a chunk each
TURN_RANGES_MAX = 64  # taken up in one turn of a session
TURN_SPLITS_MAX = 16  # of them split, so that all parts can be split again in one answer
TODO_MAX = 4096  # ranges known to differ; what is dropped is found by the next session
BACKLOG_MAX = 1024  # items to be pulled beyond which a session waits
BARREN_S = 30.0  # without a fact that stands: whoever goes on keeps this node from asking others
STALLED_TURNS_MAX = 16  # turns in a row that found nothing: three times the depth of a document
TURNS_MAX = 4096
FRUITLESS_FIRST_S = 2.0
FRUITLESS_MAX_S = 300.0
FRUITLESS_DOUBLINGS_MAX = 16

_EVERYTHING = Range(lower=b"", upper=b"", count=RANGES_MAX, fingerprint=bytes(FINGERPRINT_BYTES))


@dataclass(slots=True)
class _Session:
    """The state of the node that began the repair.

    Attributes:
        todo: Ranges known to differ and not yet taken up.
        lacking: How many ids were named that are lacking here.
        gained_at: When a fact last came that stands; at first, when it began.
        awaiting: How many replies are to come.
        opening: What was said first, until it is answered; for openings that cross.
    """

    node: NodeId
    heard_at: float
    gained_before: int
    refused_before: int
    gained_at: float
    lacking: int = 0
    todo: list[Range] = field(default_factory=lambda: [_EVERYTHING])
    awaiting: int = 0
    turns: int = 0
    stalled: int = 0
    opening: tuple[bytes, ...] | None = None

    def answered(self, now: float) -> None:
        self.heard_at, self.opening = now, None
        self.awaiting = max(0, self.awaiting - 1)

    def remind(self, ranges: Sequence[Range]) -> None:
        self.todo += ranges[: max(0, TODO_MAX - len(self.todo))]


@dataclass(slots=True)
class _Backoff:
    """How long not to begin again with a neighbour, after sessions that led to nothing."""

    failures: int = 0
    until: float = 0.0


class AntiEntropy:
    """One node's part in repair.

    Attributes:
        exhausted_peers: Peers with which the last session ran to its end and brought nothing that
            would stand here.

    Args:
        document: What it holds. Facts that come are merged by the caller.
    """

    def __init__(self, document: Document) -> None:
        self.exhausted_peers: set[NodeId] = set()
        self._document = document
        self._fetches = Fetches(document)
        self._work = Buckets[NodeId](WORK_PER_S, WORK_BURST)
        self._session: _Session | None = None
        self._differed: dict[NodeId, int] = {}  # at which cutoff
        self._patience: dict[NodeId, _Backoff] = {}

    @property
    def busy(self) -> bool:
        """Whether this node is about to learn more."""
        return self._session is not None or self._fetches.busy

    # --- when -------------------------------------------------------------------------------------

    def compare(
        self,
        node: NodeId,
        cutoff: int,
        fingerprint: bytes,
        now: float,
        *,
        first: bool,
        asker: bool,
    ) -> list[Send]:
        """A neighbour said what it knew at `cutoff`; begin a session if it is time to.

        Args:
            node: The neighbour.
            cutoff: Mesh time in seconds.
            fingerprint: Of its items as of then.
            now: In seconds.
            first: One difference is enough: this node or the other was away.
            asker: Whether this node asked; only one of two begins.
        """
        mine = self._document.fingerprint_at(cutoff)
        if mine is None:
            return []
        if mine == fingerprint:
            self._differed.pop(node, None)
            self._patience.pop(node, None)
            return []
        if not asker:
            return []
        if not first and cutoff <= self._differed.setdefault(node, cutoff):
            return []
        if node in self._patience and now < self._patience[node].until:
            return []
        return self.begin(node, now)

    def begin(self, node: NodeId, now: float) -> list[Send]:
        """Begin a session with `node`, unless one is under way with anybody."""
        if self._session is not None:
            return []
        self._differed.pop(node, None)
        gained, refused = self._fetches.gained, self._fetches.refused
        self._session = _Session(
            node, now, gained_before=gained, refused_before=refused, gained_at=now
        )
        return self._go_on(now)

    # --- what differs -----------------------------------------------------------------------------

    def ranges(self, node: NodeId, message: Ranges, now: float) -> list[Send]:
        """`node` says what it holds: compare, answer what differs."""
        ranges, ids = ascending(message.ranges), self._document.ids()
        work = work_on(ids, ranges) + WORK_PER_RANGE * len(ranges)
        if not self._work.take(node, now, work):
            return []
        crossing = tuple(one.fingerprint for one in ranges) if is_opening(ranges) else None
        if self._goes_first(node, crossing):
            return []
        theirs = differing(ids, ranges)
        session = self._session_with(node)
        if session is not None:
            session.remind(theirs)
            session.answered(now)
            return self._go_on(now)
        if not ranges:
            return []
        self._differed.pop(node, None)  # it is looking after it
        reply = Reply(ids, theirs, splits_max=(RANGES_MAX - len(theirs)) // (SPLIT - 1))
        return _sends(node, [*reply.items, reply.with_rest()])

    def items(self, node: NodeId, message: Items, now: float) -> list[Send]:
        """`node` says all that it holds in a range: pull what is lacking, say what it lacks."""
        ids = self._document.ids()
        start, stop = within(ids, message.lower, message.upper)
        mine = ids[start:stop]
        if not self._work.take(node, now, WORK_PER_RANGE + len(mine) + len(message.ids)):
            return []
        is_whole = not message.lower and not message.upper
        if self._goes_first(node, () if is_whole and message.answer else None):
            return []
        lacking = self._fetches.add(node, message.ids, now)
        found = lacking > 0
        out = self._fetches.ask(node, now)
        session = self._session_with(node)
        if message.answer:
            theirs = frozenset(message.ids)
            extra = tuple(item for item in mine if item not in theirs)
            found = found or bool(extra)
            out += self._say_extra(node, message, extra, session)
        if session is None:
            return out
        session.lacking += lacking
        if found:
            session.stalled = 0
        if not message.answer:
            session.answered(now)
        return [*out, *self._go_on(now)]

    def _say_extra(
        self, node: NodeId, message: Items, extra: tuple[bytes, ...], session: _Session | None
    ) -> list[Send]:
        """The answer to items: what the other side lacks, in parts if it is much."""
        lower, upper = message.lower, message.upper
        if len(extra) <= ITEMS_AT_ONCE:
            # Within its own session this node is not waited for.
            if not extra and session is not None:
                return []
            return _sends(node, [Items(lower=lower, upper=upper, ids=extra, answer=False)])
        if session is None:
            return _sends(node, [Ranges(ranges=tuple(split(self._document.ids(), lower, upper)))])
        fingerprint = bytes(FINGERPRINT_BYTES)
        count = len(message.ids)
        session.remind([Range(lower=lower, upper=upper, count=count, fingerprint=fingerprint)])
        return []

    # --- items ------------------------------------------------------------------------------------

    def lacking(self, node: NodeId, ids: tuple[bytes, ...], now: float) -> list[Send]:
        """Pull those of `ids`, which `node` holds, that are not held here."""
        self._fetches.add(node, ids, now)
        return self._fetches.ask(node, now)

    def want(self, node: NodeId, message: FetchRequest, now: float) -> list[Send]:
        """The items that `node` asked for: as many as fit a chunk, and at least an empty reply."""
        if not self._work.take(node, now, WORK_PER_WANTED * len(message.ids)):
            return []
        found = [self._document.item(item) for item in dict.fromkeys(message.ids)]
        facts = gather((item for item in found if item is not None), asked=True)
        if any(found):
            self._patience.pop(node, None)  # sessions do lead to something, if on its side
            if (session := self._session_with(node)) is not None:
                session.stalled = 0
        return _sends(node, [next(in_chunks(facts))])

    def own(self, node: NodeId, now: float) -> list[Send]:
        """Return the held records of `node`, for a node that may have lost its disk."""
        records = self._document.registers(node)
        if not self._work.take(node, now, WORK_PER_OWN):
            return []
        return _sends(node, [next(in_chunks(gather(records, asked=True)))])

    def asked(self, node: NodeId) -> frozenset[bytes]:
        """The ids that `node` is asked for just now."""
        return self._fetches.in_flight(node)

    def pulled(
        self, node: NodeId, seen: AbstractSet[bytes], now: float, *, whole: bool = True
    ) -> list[Send]:
        """Facts came on request and were merged: ask for the next ones.

        Facts that were not asked for by `want` do no harm, except that an empty reply to `Own`
        looks like an empty reply to `FetchRequest`.

        Args:
            node: Who sent them.
            seen: The ids of what it sent, as far as that was looked at.
            now: In seconds.
            whole: They were all looked at; a neighbour may send more than is taken at once.
        """
        gained = self._fetches.gained
        if not self._fetches.arrived(node, seen, now, whole=whole):
            return []
        out = self._fetches.ask(node, now)
        if (session := self._session_with(node)) is not None:
            session.heard_at = now
            session.gained_at = now if self._fetches.gained > gained else session.gained_at
            out += self._go_on(now)
        return out

    # --- time and links ---------------------------------------------------------------------------

    def tick(self, now: float) -> list[Send]:
        """Give up on what takes too long; call it about once a second."""
        late = self._fetches.tick(now)
        session = self._session
        if session and (
            session.node in late
            or now - session.heard_at >= TIMEOUT_S
            or now - session.gained_at >= BARREN_S
        ):
            self._end(session, now)
        return []

    def retry(self) -> None:
        """Ask for what was refused and repair with those who had nothing, without further delay."""
        self._fetches.retry()
        self._patience.clear()

    def link_down(self, node: NodeId) -> None:
        """The link is gone, and all that was under way on it."""
        self._fetches.link_down(node)
        self.exhausted_peers.discard(node)
        self._differed.pop(node, None)
        self._patience.pop(node, None)
        if self._session_with(node) is not None:
            self._session = None

    # --- a session --------------------------------------------------------------------------------

    def _session_with(self, node: NodeId) -> _Session | None:
        return self._session if self._session and self._session.node == node else None

    def _goes_first(self, node: NodeId, theirs: tuple[bytes, ...] | None) -> bool:
        """Whether two openings crossed and this node's stands; the smaller one does.

        The answer to an opening of items looks like an opening of ranges, and is taken as one.
        """
        session = self._session_with(node)
        if theirs is None or session is None or session.opening is None:
            return False
        if theirs and not session.opening:
            return False
        if session.opening < theirs:
            return True
        self._session = None
        return False

    def _go_on(self, now: float) -> list[Send]:
        """The next turn of the session, if nothing is awaited; or its end."""
        session = self._session
        assert session is not None
        node = session.node
        if session.awaiting or self._fetches.backlog(node) > BACKLOG_MAX:
            return []
        if not session.todo:
            if not self._fetches.backlog(node):
                self._end(session, now, whole=True)
            return []
        session.turns += 1
        session.stalled += 1
        if session.stalled > STALLED_TURNS_MAX or session.turns > TURNS_MAX:
            self._end(session, now)
            return []
        # The last first: so there is soon something to pull, and little to keep in mind.
        taken = session.todo[-TURN_RANGES_MAX:]
        del session.todo[-TURN_RANGES_MAX:]
        reply = Reply(self._document.ids(), taken, splits_max=TURN_SPLITS_MAX)
        session.todo += reply.rest
        session.awaiting = len(reply.items) + bool(reply.ranges)
        if session.turns == 1:
            session.opening = tuple(one.fingerprint for one in reply.ranges)
        ranges = [Ranges(ranges=tuple(reply.ranges))] if reply.ranges else []
        return _sends(node, [*reply.items, *ranges])

    def _end(self, session: _Session, now: float, *, whole: bool = False) -> None:
        """It is over; what differs from now on has to be seen anew."""
        self._session = None
        self._differed.clear()
        self.exhausted_peers.discard(session.node)
        if self._fetches.gained > session.gained_before:
            self._patience.pop(session.node, None)
            return
        if whole and self._fetches.refused - session.refused_before >= session.lacking:
            self.exhausted_peers.add(session.node)
        patience = self._patience.setdefault(session.node, _Backoff())
        pause_s = FRUITLESS_FIRST_S * 2 ** min(patience.failures, FRUITLESS_DOUBLINGS_MAX)
        patience.until = now + min(FRUITLESS_MAX_S, pause_s)
        patience.failures += 1


def _sends(node: NodeId, messages: Sequence[Message]) -> list[Send]:
    return [Send(node=node, message=message) for message in messages]

"""Which nodes to dial, and when again. Pure.

Wanted is a link to everybody. Of two nodes the one with the smaller id dials at once and the
other a little later, so that they rarely meet half-way. What fails is tried again with growing
pauses, for as long as anything is known of the node: a partition of any length heals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from p2pmesh.config import Address
from p2pmesh.errors import PeerError
from p2pmesh.gossip.events import Dial
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.bodies import MEMBER, Member
from p2pmesh.state.document import Document

POLITENESS_S = 1.0  # how long the larger id waits for the smaller one's call
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
STABLE_S = 2.0  # a link that broke sooner counts as an attempt that failed
UNDER_WAY_S = 10.0  # after that an attempt that was not reported back is taken for lost


@dataclass(slots=True)
class _Attempts:
    next_at: float
    failures: int = 0
    linked_at: float | None = None


class Dialling:
    """The attempts of one node; arguments as for `Gossip`."""

    def __init__(
        self,
        me: NodeId,
        seeds: tuple[Address, ...],
        book: Mapping[NodeId, tuple[Address, ...]],
    ) -> None:
        self._me = me
        self._seeds = seeds
        self._book = dict(book)
        self._attempts: dict[NodeId | None, _Attempts] = {}

    def linked(self, node: NodeId, now: float) -> None:
        """There is a link now."""
        self._attempts.setdefault(node, _Attempts(next_at=now)).linked_at = now
        self._attempts.pop(None, None)

    def lost(self, node: NodeId, now: float) -> None:
        """The link broke.

        After a long one both sides dial at once, whoever is smaller, to see what became of the
        other. Links that do not last are tried with growing pauses, like failures.
        """
        attempts = self._attempts.get(node)
        linked_at = attempts.linked_at if attempts else None
        if linked_at is not None and now - linked_at < STABLE_S:
            self.failed(node, now)
        else:
            self._attempts[node] = _Attempts(next_at=now)

    def failed(self, node: NodeId | None, now: float) -> None:
        """An attempt came to nothing."""
        attempts = self._attempts.setdefault(node, _Attempts(next_at=now))
        attempts.next_at = now + min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**attempts.failures)
        attempts.failures = min(attempts.failures + 1, 16)
        attempts.linked_at = None

    def due(self, document: Document, links: AbstractSet[NodeId], now: float) -> Iterator[Dial]:
        """What to dial now; each is under way until it is linked or reported failed."""
        if not links and self._seeds and self._is_due(None, now, first_after_s=0):
            for seed in self._seeds:
                yield Dial(node=None, addresses=(seed,))
        for node, addresses in sorted(self._known(document).items()):
            if node in links or node == self._me or not addresses:
                continue
            first_after_s = 0.0 if self._me < node else POLITENESS_S
            if self._is_due(node, now, first_after_s=first_after_s):
                yield Dial(node=node, addresses=addresses)

    def _is_due(self, node: NodeId | None, now: float, *, first_after_s: float) -> bool:
        attempts = self._attempts.setdefault(node, _Attempts(next_at=now + first_after_s))
        if now < attempts.next_at:
            return False
        attempts.next_at = now + UNDER_WAY_S
        return True

    def _known(self, document: Document) -> dict[NodeId, tuple[Address, ...]]:
        known = dict(self._book)
        for owner in document.owners:
            record = document.get(owner, MEMBER)
            if record is None:
                continue
            try:
                member = Member.from_wire(record.body)
            except PeerError:
                continue  # signed nonsense: there is no address in it to dial
            known[owner] = () if member.left else member.addresses
        return known

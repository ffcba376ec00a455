"""Which nodes to dial, and when again; which links to give up. Pure.

Wanted is a link to every neighbour on the overlay. Of two nodes the one with the smaller id dials
at once and the other a little later, so that they rarely meet half-way. Beside that one absent
member is dialled each second, whatever is known of it: all in turn and, every other time, one of
those that went last. So a partition of any length heals, and soon although many are gone for good.
A link stays while either end wants it, and a while longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from p2pmesh.config import Address
from p2pmesh.gossip.events import Dial
from p2pmesh.gossip.members import Members
from p2pmesh.identity.keys import NodeId

POLITENESS_S = 1.0  # how long the larger id waits for the smaller one's call
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 4.0  # neighbours are few, and after a cut all of them are wanted back at once
SEED_BACKOFF_MAX_S = 30.0
STABLE_S = 2.0  # a link that broke sooner counts as an attempt that failed
UNDER_WAY_S = 10.0  # after that an attempt that was not reported back is taken for lost
UNWANTED_S = 30.0  # a link that neither end wants stays that long: views may still differ
ABSENT_INTERVAL_S = 1.0
GONE_LAST = 8


@dataclass(slots=True)
class _Attempts:
    next_at: float
    failures: int = 0
    open: bool = False  # one is under way, or led to a link that is still up
    linked_at: float | None = None


class Dialer:
    """The attempts of one node.

    Args:
        members: Where everybody is.
        seeds: Addresses that the user named; dialled while there is no link at all.
    """

    def __init__(self, members: Members, seeds: tuple[Address, ...]) -> None:
        self._members, self._me, self._seeds = members, members.me, seeds
        self._attempts: dict[NodeId | None, _Attempts] = {}
        self._kept_at: dict[NodeId, float] = {}
        self._absent_at = 0.0
        self._turns: dict[bool, NodeId] = {}  # who was dialled last: of all, of those gone last
        self._of_last = False

    # --- links ------------------------------------------------------------------------------------

    def linked(self, node: NodeId, now: float) -> None:
        """There is a link now."""
        attempts = self._attempts.setdefault(node, _Attempts(next_at=now))
        attempts.open, attempts.linked_at = True, now
        self._attempts.pop(None, None)
        self._kept_at[node] = now

    def lost(self, node: NodeId, now: float) -> None:
        """The link broke.

        After a long one both sides dial at once, whoever is smaller, to see what became of the
        other. Links that do not last are tried with growing pauses, like failures.
        """
        self._kept_at.pop(node, None)
        attempts = self._attempts.get(node)
        linked_at = attempts.linked_at if attempts else None
        if linked_at is not None and now - linked_at < STABLE_S:
            self.failed(node, now)
        else:
            self._attempts[node] = _Attempts(next_at=now)

    def failed(self, node: NodeId | None, now: float) -> None:
        """An attempt came to nothing; when all seeds fail that is one attempt."""
        attempts = self._attempts.get(node)
        if attempts is None or not attempts.open:
            return
        longest_s = SEED_BACKOFF_MAX_S if node is None else BACKOFF_MAX_S
        attempts.next_at = now + min(longest_s, BACKOFF_FIRST_S * 2**attempts.failures)
        attempts.failures = min(attempts.failures + 1, 16)
        attempts.open, attempts.linked_at = False, None

    def keep(self, node: NodeId, now: float) -> None:
        """This end or the other wants the link to `node`."""
        if node in self._kept_at:
            self._kept_at[node] = now

    def unwanted(self, now: float) -> list[NodeId]:
        """Links that nobody has wanted for long."""
        return sorted(node for node, at in self._kept_at.items() if now - at > UNWANTED_S)

    # --- dialling ---------------------------------------------------------------------------------

    def due(
        self, wanted: AbstractSet[NodeId], links: AbstractSet[NodeId], now: float
    ) -> Iterator[Dial]:
        """Return nodes to dial now; each is in flight until it is linked or reported failed."""
        if not links and self._seeds and self._is_due(None, now, first_after_s=0):
            for seed in self._seeds:
                yield Dial(node=None, addresses=(seed,))
        for node in sorted(wanted - links):
            addresses = self._members.addresses(node)
            patient = self._me > node and self._members.dialable(self._me)
            first_after_s = POLITENESS_S if patient else 0.0
            if addresses and self._is_due(node, now, first_after_s=first_after_s):
                yield Dial(node=node, addresses=addresses)
        if now - self._absent_at >= ABSENT_INTERVAL_S and (departed := self._next_absent(links)):
            self._absent_at = now
            yield departed

    def try_once(self, node: NodeId) -> Dial | None:
        """Dial `node` for somebody who asks whether it can be reached."""
        addresses = self._members.addresses(node)
        return Dial(node=node, addresses=addresses) if addresses else None

    def forget_except(self, nodes: AbstractSet[NodeId]) -> None:
        """Drop the attempts at all others."""
        for node in [n for n in self._attempts if n is not None and n not in nodes]:
            if node not in self._kept_at:
                del self._attempts[node]

    def _next_absent(self, links: AbstractSet[NodeId]) -> Dial | None:
        departed = [node for node in self._members.departed() if node not in links]
        if not departed:
            return None
        self._of_last = not self._of_last
        among = sorted(departed[-GONE_LAST:] if self._of_last else departed)
        last = self._turns.get(self._of_last)
        later = (node for node in among if last is None or node > last)
        node = self._turns[self._of_last] = next(later, among[0])
        return self.try_once(node)

    def _is_due(self, node: NodeId | None, now: float, *, first_after_s: float) -> bool:
        attempts = self._attempts.setdefault(node, _Attempts(next_at=now + first_after_s))
        if now < attempts.next_at:
            return False
        attempts.open, attempts.next_at = True, now + UNDER_WAY_S
        return True

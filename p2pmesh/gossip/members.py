"""The members by their `member` records, and each node's last known addresses. Pure.

Live is who has a lease, has not said goodbye and has not been removed. The address book keeps
whoever was ever seen, beyond leases, so that the halves of a mesh that was cut in two find each
other again however long it took.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from p2pmesh.config import Address
from p2pmesh.gossip.shared import MemberInfo, Shared
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from p2pmesh.wire.registers import MEMBER

BOOK_MAX = 4096  # who was seen longest ago is forgotten first; some 200 kB on disk


class Members:
    """The members of a document, kept up to date by `refresh`.

    Args:
        me: This node.
        document: What is known.
        book: Where nodes were seen in earlier lives of this one.
        shared: How records are read.
    """

    def __init__(
        self,
        me: NodeId,
        document: Document,
        book: Mapping[NodeId, tuple[Address, ...]],
        shared: Shared,
    ) -> None:
        self.me = me
        self.known: dict[NodeId, MemberInfo] = {}
        self._departed = dict(book)  # where those were seen that no record stands of
        self.document = document
        self._shared = shared
        self._live = {me}
        self._removed = document.removed
        self._population = frozenset({(me, True)})
        self._moved: set[NodeId] = set()  # since the population was last asked for

    @property
    def live(self) -> AbstractSet[NodeId]:
        """Members with a lease that neither left nor were removed; this node is one of them."""
        self._follow()
        return self._live

    @property
    def moved(self) -> bool:
        """Whether the population may be another one since it was last asked for."""
        self._follow()
        return bool(self._moved)

    @property
    def population(self) -> frozenset[tuple[NodeId, bool]]:
        """The live members, each with whether it can be dialled: what overlays are made of."""
        live = self.live
        if self._moved:
            before = {(node, dialable) for node in self._moved for dialable in (False, True)}
            now = {(node, self.dialable(node)) for node in self._moved & live}
            self._population = (self._population - before) | now
            self._moved.clear()
        return self._population

    def refresh(self, owners: Iterable[NodeId]) -> None:
        """Read the records of these owners again."""
        for owner in sorted(owners):  # the book is kept in this order
            before = self.known.get(owner)
            record = self.document.get(owner, MEMBER)
            after = self._shared.member(record) if record and record.body else None
            if after is not None:
                self.known[owner] = after
                self._departed.pop(owner, None)
            elif before is not None:
                del self.known[owner]
                if not before.left and not any(self.document.trust.revoking(owner)):
                    self._note(owner, before)
            if _standing(before) != _standing(after):
                self._judge(owner)

    @property
    def book(self) -> dict[NodeId, tuple[Address, ...]]:
        """Return the addresses of other nodes, or the last known ones."""
        here = {node: known.addresses for node, known in self.known.items()}
        return {n: at for n, at in (self._departed | here).items() if at and n != self.me}

    def addresses(self, node: NodeId) -> tuple[Address, ...]:
        """Return the addresses of `node`, or the last known ones."""
        known = self.known.get(node)
        return known.addresses if known else self._departed.get(node, ())

    def departed(self) -> list[NodeId]:
        """Return nodes that vanished without goodbye and are not live, latest last."""
        removed = [n for n in self.document.removed if n in self.known and not self.known[n].left]
        return [node for node in (*self._departed, *sorted(removed)) if node != self.me]

    def dialable(self, node: NodeId) -> bool:
        """Whether `node` listens anywhere, as far as is known."""
        known = self.known.get(node)
        return known is None or bool(known.addresses)

    def _follow(self) -> None:
        """Count out who was removed meanwhile, and in who is not any more."""
        removed = self.document.removed
        if removed is not self._removed:
            changed, self._removed = removed ^ self._removed, removed
            for node in changed:
                self._judge(node)

    def _judge(self, node: NodeId) -> None:
        """Work out anew whether `node` is live; sets of a thousand take long to make anew."""
        known = self.known.get(node)
        self._moved.add(node)
        if node == self.me or (known and not known.left and node not in self._removed):
            self._live.add(node)
        else:
            self._live.discard(node)

    def _note(self, node: NodeId, known: MemberInfo) -> None:
        self._departed[node] = known.addresses
        if len(self._departed) > BOOK_MAX:
            del self._departed[next(iter(self._departed))]


def _standing(known: MemberInfo | None) -> tuple[bool, bool] | None:
    """Return the fields that decide who is live and who is linked with whom."""
    return None if known is None else (known.left, bool(known.addresses))

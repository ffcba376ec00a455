"""Members, accusations, certificates and forks for tests of the gossip core."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from p2pmesh.config import Address
from p2pmesh.gossip.members import Members
from p2pmesh.gossip.removal import Removal
from p2pmesh.gossip.shared import Shared
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from p2pmesh.state.trust import Authorised, everybody
from p2pmesh.wire.evidence import (
    Accusation,
    Certificate,
    Fork,
    accused_to_wire,
    make_certificate,
    make_fork,
)
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import Record
from p2pmesh.wire.registers import ACCUSED, MEMBER
from tests.state.builders import MESH, NODES, NOW, member, record

HERE = Address("127.0.0.1", 9338)
THERE = Address("10.0.0.7", 9338)
STARTED = NOW - 600  # the epoch of everybody, long before anything happens


@lru_cache(None)
def member_of(
    owner: int,
    seq: int = 1,
    *,
    addresses: tuple[Address, ...] = (HERE,),
    left: bool = False,
    epoch: int = STARTED,
    issued_at: int = NOW,
    ttl_s: int = 240,
) -> Record:
    """The `member` record of a node, by its number."""
    body = member(f"node-{owner}", addresses=addresses, left=left).to_wire()
    return record(owner, MEMBER, seq=seq, epoch=epoch, issued_at=issued_at, ttl_s=ttl_s, body=body)


@lru_cache(None)
def accused_by(
    owner: int,
    *subjects: int | tuple[int, int],
    seq: int = 1,
    epoch: int = STARTED,
    issued_at: int = NOW,
) -> Record:
    """The `accused` record of a node; subjects by number, or number and `seq` accused."""
    rows = [accusation(*((one,) if isinstance(one, int) else one)) for one in subjects]
    body = accused_to_wire(rows) if rows else {}
    return record(owner, ACCUSED, seq=seq, epoch=epoch, issued_at=issued_at, ttl_s=3600, body=body)


def accusation(subject: int, seq: int = 1, epoch: int = STARTED) -> Accusation:
    return Accusation(NODES[subject], epoch, seq)


def certificate_by(accusers: Iterable[int], subject: int, seq: int = 1) -> Certificate:
    evidence = [accused_by(accuser, (subject, seq)) for accuser in accusers]
    return make_certificate(accusation(subject, seq), evidence)


def fork_of(owner: int, seq: int = 1, *, register: str = "load", **changes: Any) -> Fork:
    one, other = (
        record(owner, register, seq=seq, epoch=STARTED, body={"value": value}, **changes)
        for value in (1, 2)
    )
    return make_fork(one, other)


def facts(*records: Record, **changes: Any) -> Push:
    return Push(records=tuple(one.raw for one in records), **changes)


class View:
    """What a node knows, with the parts that read it kept in step as the core does it."""

    def __init__(
        self,
        me: NodeId = NODES[0],
        book: dict[NodeId, tuple[Address, ...]] | None = None,
        authorised: Authorised = everybody,
    ) -> None:
        self.shared = Shared()
        self.document = Document(MESH, authorised=authorised)
        self.members = Members(me, self.document, book or {}, self.shared)
        self.removal = Removal(self.document, self.members, self.shared)

    def learn(self, *facts: Record | Certificate | Fork, now: float = NOW) -> None:
        """Take in facts that were checked, in this order."""
        for fact in facts:
            self.refresh(self.document.merge(fact, now).owners)

    def expire(self, now: float) -> None:
        self.refresh(self.document.expire(now))

    def refresh(self, owners: Iterable[NodeId]) -> None:
        owners = frozenset(owners)
        self.members.refresh(owners)
        self.removal.refresh(owners)


def mesh_of(count: int, me: NodeId = NODES[0]) -> View:
    """A view of so many members; number 0 is the first."""
    view = View(me)
    view.learn(*(member_of(number) for number in range(count)))
    return view

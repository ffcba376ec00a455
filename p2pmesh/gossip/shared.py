"""The functions of the core whose answers depend on their arguments alone. Pure.

A node calls them as they are. A simulation of a thousand nodes in one process hands in versions
that remember, since a thousand nodes ask the same questions of the same records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from p2pmesh.config import Address
from p2pmesh.errors import PeerError
from p2pmesh.gossip.overlay import Overlay, Overlays
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.owner_records import OwnerRecords
from p2pmesh.state.registers import Member
from p2pmesh.wire.evidence import Accusation, accused_from_wire
from p2pmesh.wire.records import Record, RecordCheck


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """The fields of a standing `member` record that matter to gossip.

    Attributes:
        epoch: Of the record; at least the unix time at which its owner started.
        seq: Of the record.
        issued_at: Mesh time in seconds.
        addresses: None: it cannot be dialled.
        left: It said goodbye.
    """

    epoch: int
    seq: int
    issued_at: int
    addresses: tuple[Address, ...]
    left: bool

    @property
    def version(self) -> tuple[int, int]:
        """Return the version that accusations and certificates name."""
        return self.epoch, self.seq


def read_member(record: Record) -> MemberInfo | None:
    """Read a `member` record; None for signed nonsense, which is only its owner's loss."""
    try:
        member = Member.from_wire(record.body)
    except PeerError:
        return None
    return MemberInfo(record.epoch, record.seq, record.issued_at, member.addresses, member.left)


def read_accused(record: Record) -> tuple[Accusation, ...]:
    """Read the subjects of an `accused` record; none for a withdrawn one or for nonsense."""
    if not record.body:
        return ()
    try:
        return accused_from_wire(record.body)
    except PeerError:
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The caches that simulated nodes of one process may share.

    Attributes:
        check: How records are read and their signatures checked.
        overlay: The overlay of a population.
        member: See `read_member`.
        accused: See `read_accused`.
        held: Returns the one copy of equal values that a document keeps per owner.
        grown: What stands of an owner once another record does.
        homes: Whose each item of a document is, by id; None: each document keeps its own.
    """

    check: RecordCheck = field(default_factory=RecordCheck)
    overlay: Overlays = Overlay
    member: Callable[[Record], MemberInfo | None] = read_member
    accused: Callable[[Record], tuple[Accusation, ...]] = read_accused
    held: Callable[[OwnerRecords], OwnerRecords] | None = None
    grown: Callable[[OwnerRecords, Record], OwnerRecords] = OwnerRecords.with_record
    homes: dict[bytes, NodeId] | None = None

"""The merged facts of the mesh: for each register of each owner, the record that stands.

Pure, and a CRDT: merging keeps the largest version, so it is idempotent, commutative and
associative, and nodes that hold the same records hold the same document, whatever order they
came in. What has run out is void everywhere, so nothing that was dropped can come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from hashlib import blake2b

from p2pmesh.identity.keys import MeshId, NodeId
from p2pmesh.state.bodies import MEMBER, WANTS
from p2pmesh.wire.messages import FINGERPRINT_BYTES, SUMMARY_ENTRIES_MAX, Version
from p2pmesh.wire.records import Record

OWNERS_MAX = 256  # with their registers, what one summary can name
REGISTERS_PER_OWNER_MAX = 64
OWNER_BYTES_MAX = 256 * 1024
EXPIRY_GRACE_S = 60  # clocks differ by at most that much, or are told so in the hello
AHEAD_S_MAX = 60  # a record from further in the future is not believed yet
EPOCH_AHEAD_S_MAX = 86400  # an epoch is at least the start's unix time; this much more is forged

assert OWNERS_MAX * REGISTERS_PER_OWNER_MAX <= SUMMARY_ENTRIES_MAX

_FINGERPRINT_MODULUS = 1 << (8 * FINGERPRINT_BYTES)


class Verdict(Enum):
    """What a record that arrives is to this document, before its signature is looked at."""

    NEWS = "news"
    STALE = "stale"  # this version or a newer one is known
    VOID = "void"  # of another mesh, run out, or from the future
    REFUSED = "refused"  # its owner has more than anybody may


class Document:
    """All records that stand.

    Args:
        mesh: Records of other meshes mean nothing here.
    """

    def __init__(self, mesh: MeshId) -> None:
        self._mesh = mesh
        self._owners: dict[NodeId, dict[str, Record]] = {}
        self._fingerprint = 0

    @property
    def fingerprint(self) -> bytes:
        """Equal for equal documents; additive, so keeping it up to date costs one hash."""
        return self._fingerprint.to_bytes(FINGERPRINT_BYTES, "big")

    @property
    def owners(self) -> tuple[NodeId, ...]:
        """Everybody with at least one record, sorted."""
        return tuple(sorted(self._owners))

    def get(self, owner: NodeId, register: str) -> Record | None:
        """The record that stands, if any."""
        return self._owners.get(owner, {}).get(register)

    def registers(self, owner: NodeId) -> tuple[Record, ...]:
        """All records of `owner`, sorted by register."""
        held = self._owners.get(owner, {})
        return tuple(held[register] for register in sorted(held))

    def records(self) -> Iterator[Record]:
        """All records, sorted by owner and register."""
        for owner in self.owners:
            yield from self.registers(owner)

    def versions(self) -> tuple[Version, ...]:
        """What this document holds, without the values."""
        return tuple(
            Version(
                owner=record.owner,
                register=record.register,
                epoch=record.epoch,
                seq=record.seq,
                digest=record.digest,
            )
            for record in self.records()
        )

    def lacking(self, versions: tuple[Version, ...]) -> Iterator[Record]:
        """The records that somebody who holds just `versions` lacks or holds older ones of."""
        theirs = {(version.owner, version.register): version.order for version in versions}
        for record in self.records():
            if (order := theirs.get(record.key)) is None or order < record.version:
                yield record

    def judge(self, record: Record, now: float) -> Verdict:
        """What merging `record` would mean; costs a microsecond, a signature a hundred.

        Args:
            record: Parsed, not yet verified.
            now: Mesh time in seconds.
        """
        if (
            record.mesh != self._mesh
            or record.expires_at + EXPIRY_GRACE_S <= now
            or record.issued_at > now + AHEAD_S_MAX
            or record.epoch > now + EPOCH_AHEAD_S_MAX
        ):
            return Verdict.VOID
        held = self._owners.get(record.owner, {})
        mine = held.get(record.register)
        if mine is not None and record.version <= mine.version:
            return Verdict.STALE
        if record.register != WANTS and record.epoch < self._epoch(record.owner):
            return Verdict.STALE
        size = sum(len(other.raw) for other in held.values() if other is not mine)
        if (
            (not held and len(self._owners) >= OWNERS_MAX)
            or (mine is None and len(held) >= REGISTERS_PER_OWNER_MAX)
            or size + len(record.raw) > OWNER_BYTES_MAX
        ):
            return Verdict.REFUSED
        return Verdict.NEWS

    def merge(self, record: Record, now: float) -> bool:
        """Let `record` stand if it is news; returns whether it was. Its signature was checked."""
        if self.judge(record, now) is not Verdict.NEWS:
            return False
        if record.epoch > self._epoch(record.owner) and record.register != WANTS:
            for old in self.registers(record.owner):
                if old.register != WANTS:
                    self._drop(old)
        if (mine := self.get(record.owner, record.register)) is not None:
            self._drop(mine)
        self._owners.setdefault(record.owner, {})[record.register] = record
        self._fingerprint = (self._fingerprint + _term(record)) % _FINGERPRINT_MODULUS
        return True

    def expire(self, now: float) -> frozenset[NodeId]:
        """Drop what has run out; returns the owners concerned.

        Everything but an owner's wants lives as long as its `member` lease.
        """
        touched: set[NodeId] = set()
        for owner in self.owners:
            member = self.get(owner, MEMBER)
            lease_over = member is None or member.expires_at + EXPIRY_GRACE_S <= now
            for record in self.registers(owner):
                # A register may arrive a moment before the lease that it lives on.
                orphan = lease_over and record.issued_at + EXPIRY_GRACE_S <= now
                if record.expires_at + EXPIRY_GRACE_S <= now or (
                    orphan and record.register != WANTS
                ):
                    self._drop(record)
                    touched.add(owner)
        return frozenset(touched)

    def _epoch(self, owner: NodeId) -> int:
        held = self._owners.get(owner, {})
        return max((r.epoch for r in held.values() if r.register != WANTS), default=0)

    def _drop(self, record: Record) -> None:
        held = self._owners[record.owner]
        del held[record.register]
        if not held:
            del self._owners[record.owner]
        self._fingerprint = (self._fingerprint - _term(record)) % _FINGERPRINT_MODULUS


def _term(record: Record) -> int:
    # The digest covers owner, register, epoch and seq: they are in the signed part.
    return int.from_bytes(
        blake2b(record.digest, digest_size=FINGERPRINT_BYTES, person=b"p2pmesh state").digest(),
        "big",
    )

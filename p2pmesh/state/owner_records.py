"""All that stands of one owner, as one value that is never changed.

Pure. Which records may stand side by side, and until when, is decided here, by the records alone.
One per register. All but the wants live on the owner's `member` record: they are of its epoch and
end with its lease, and without it they are nothing. So a register that is played back after its
owner's lease finds nothing to live on, and a new epoch begins for all registers at once. Bounds
let `member` through and then registers in the order of their names, so that even owners that go
beyond their bounds come out alike on every node, whatever arrived first there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from p2pmesh.wire.records import Record
from p2pmesh.wire.registers import MEMBER, Life, register_of

REGISTERS_PER_OWNER_MAX = 64
OWNER_BYTES_MAX = 256 * 1024
EXPIRY_GRACE_S = 60  # clocks differ by at most that much, or are told so in the hello
NEVER = 1 << 64  # mesh time in seconds, after everything else


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class OwnerRecords:
    """The records of one owner; made by `hold`.

    Equal values hold the same records, so that one copy may serve any number of documents.

    Attributes:
        records: By register, in the order of their names.
        digests: Of the records, in that order.
        epoch: Of the `member` record; 0 without one.
        lease_until: Mesh time in seconds when the lease is over, grace included; 0 without one.
        ends_at: Mesh time in seconds when the first of the records runs out.
        size_bytes: Of all records.
    """

    records: Mapping[str, Record]
    digests: tuple[bytes, ...]
    epoch: int
    lease_until: int
    ends_at: int
    size_bytes: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OwnerRecords) and self.digests == other.digests

    def __hash__(self) -> int:
        return hash(self.digests)

    def end_of(self, record: Record) -> int:
        """Mesh time in seconds when a record is void, if it stands beside these or is one of them.

        0: it has no lease to live on.
        """
        end = record.expires_at + EXPIRY_GRACE_S
        if register_of(record.register).life is not Life.LEASED:
            return end
        return min(end, self.lease_until) if record.epoch == self.epoch else 0

    def is_past(self, register: str, epoch: int, seq: int) -> bool:
        """Whether a record with this head is certainly older than what stands."""
        if epoch < self.epoch and register_of(register).life is not Life.OWN:
            return True
        mine = self.records.get(register)
        return mine is not None and (epoch < mine.epoch or (epoch == mine.epoch and seq < mine.seq))

    def has_room(self, record: Record) -> bool:
        """Whether `record` would be within the bounds of its owner."""
        if (
            record.register in self.records or len(self.records) < REGISTERS_PER_OWNER_MAX
        ) and self.size_bytes + len(record.raw) <= OWNER_BYTES_MAX:
            return True
        return record.register in _bounded(self._merged(record))

    def with_record(self, record: Record) -> OwnerRecords:
        """Return the records with `record`, for which there is room."""
        after = hold(self._merged(record))
        if after.size_bytes > OWNER_BYTES_MAX or len(after.records) > REGISTERS_PER_OWNER_MAX:
            return hold(_bounded(after.records))
        return after

    def at(self, now: float) -> OwnerRecords:
        """Return the records that have not run out by then."""
        return hold({r.register: r for r in self.records.values() if self.end_of(r) > now})

    def lost(self, after: OwnerRecords) -> Iterator[Record]:
        """The records that are not in `after`."""
        kept = after.records
        for register, record in self.records.items():
            other = kept.get(register)
            if other is not record and (other is None or other.digest != record.digest):
                yield record

    def _merged(self, record: Record) -> dict[str, Record]:
        standing = self.records
        if record.register == MEMBER and record.epoch != self.epoch:
            standing = {
                name: one for name, one in standing.items() if register_of(name).life is Life.OWN
            }
        merged = {**standing, record.register: record}
        return merged if record.register in standing else dict(sorted(merged.items()))


def hold(records: Mapping[str, Record]) -> OwnerRecords:
    """The value for these records, which are in the order of their names."""
    member = records.get(MEMBER)
    size_bytes = 0
    digests, ends = [], [NEVER]
    for record in records.values():
        digests.append(record.digest)
        size_bytes += len(record.raw)
        ends.append(record.issued_at + record.ttl_s)
    return OwnerRecords(
        records=records,
        digests=tuple(digests),
        epoch=0 if member is None else member.epoch,
        lease_until=0 if member is None else member.expires_at + EXPIRY_GRACE_S,
        ends_at=min(ends) + EXPIRY_GRACE_S,
        size_bytes=size_bytes,
    )


NOTHING = hold({})


def _bounded(records: Mapping[str, Record]) -> dict[str, Record]:
    """Return the records within the bounds, in the order of their names."""
    within: dict[str, Record] = {}
    size_bytes = 0
    for register in sorted(records, key=lambda name: (name != MEMBER, name)):
        size_bytes += len(records[register].raw)
        if size_bytes > OWNER_BYTES_MAX or len(within) == REGISTERS_PER_OWNER_MAX:
            break
        within[register] = records[register]
    return dict(sorted(within.items()))

"""Registers that came before the `member` record that they live on.

Pure. Repair moves items in the order of their ids, so that registers may arrive before the lease
without which they are void. They wait here for a moment, unseen, instead of being fetched again.
Nothing here counts: what finds no room is merely offered again later.
"""

from __future__ import annotations

from p2pmesh.identity.keys import NodeId
from p2pmesh.state.outcome import MergeOutcome
from p2pmesh.state.owner_records import OWNER_BYTES_MAX
from p2pmesh.wire.records import Record

PENDING_S = 60.0  # the snapshot of 10,000 nodes takes about that long
PENDING_BYTES_MAX = 8 * 1024 * 1024  # half of that snapshot's registers


class Pending:
    """The records that wait for a lease."""

    def __init__(self) -> None:
        self._records: dict[NodeId, dict[bytes, Record]] = {}
        self._until: dict[NodeId, float] = {}
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Of all that waits."""
        return self._size_bytes

    def judge(self, record: Record) -> MergeOutcome:
        """Judge a record that would have to wait.

        An owner has as much room here as in the document, so that none takes that of the others.
        """
        waiting = self._records.get(record.owner, {})
        if record.digest in waiting:
            return MergeOutcome.STALE
        size_bytes = len(record.raw)
        of_owner_bytes = size_bytes + sum(len(one.raw) for one in waiting.values())
        has_room = (
            of_owner_bytes <= OWNER_BYTES_MAX and self._size_bytes + size_bytes <= PENDING_BYTES_MAX
        )
        return MergeOutcome.PENDING if has_room else MergeOutcome.VOID

    def add(self, record: Record, now: float) -> None:
        """Let `record` wait for the `member` record of its owner, if there is room."""
        if self.judge(record) is MergeOutcome.PENDING:
            self._records.setdefault(record.owner, {})[record.digest] = record
            self._until[record.owner] = now + PENDING_S
            self._size_bytes += len(record.raw)

    def take(self, owner: NodeId) -> tuple[Record, ...]:
        """All that waited for `owner`."""
        taken = tuple(self._records.pop(owner, {}).values())
        self._until.pop(owner, None)
        self._size_bytes -= sum(len(record.raw) for record in taken)
        return taken

    def lapse(self, now: float) -> None:
        """Let go of what waited in vain."""
        for owner in [owner for owner, until in self._until.items() if until <= now]:
            self.take(owner)

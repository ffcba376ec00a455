"""The outcome of merging a fact: judged before its signatures are checked.

Pure. A judgement costs microseconds where a signature costs a hundred, so it comes first.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from p2pmesh.identity.keys import MeshId, NodeId
from p2pmesh.state.owner_records import EXPIRY_GRACE_S, OwnerRecords
from p2pmesh.wire.facts import Fact
from p2pmesh.wire.records import Record

AHEAD_S_MAX = 60  # what comes from further in the future is not believed yet
EPOCH_AHEAD_S_MAX = 86400  # an epoch is at least the start's unix time; this much more is forged


class MergeOutcome(Enum):
    """The outcome of merging a fact."""

    NEWS = "news"
    STALE = "stale"  # this version or a newer one is known
    VOID = "void"  # of another mesh, run out, or from the future
    REFUSED = "refused"  # there is no room for more of its owner, or for more owners
    EQUIVOCATION = "equivocation"  # another value stands under the same number
    PENDING = "pending"  # the `member` record that it needs is not here yet

    @property
    def may_count(self) -> bool:
        """Whether the fact's signatures are worth checking."""
        return self in (MergeOutcome.NEWS, MergeOutcome.EQUIVOCATION, MergeOutcome.PENDING)


class MergeResult(NamedTuple):
    """The changes that merging a fact made; true if it changed the document.

    Attributes:
        outcome: The judgement on the fact.
        owners: The owners whose facts changed.
        ids: The ids of all that stands now and did not before.
    """

    outcome: MergeOutcome
    owners: frozenset[NodeId] = frozenset()
    ids: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ids)


def judge(record: Record, held: OwnerRecords, mesh: MeshId, now: float) -> MergeOutcome:
    """Judge `record` beside the other records of its owner."""
    if record.expires_at + EXPIRY_GRACE_S <= now or not is_credible(record, mesh, now):
        return MergeOutcome.VOID
    mine = held.records.get(record.register)
    if mine is not None and record.seq == mine.seq and record.epoch == mine.epoch:
        return MergeOutcome.STALE if record.digest == mine.digest else MergeOutcome.EQUIVOCATION
    if held.is_past(record.register, record.epoch, record.seq):
        return MergeOutcome.STALE
    return MergeOutcome.NEWS if held.has_room(record) else MergeOutcome.REFUSED


def is_credible(fact: Fact, mesh: MeshId, now: float) -> bool:
    """Whether a fact is of this mesh and not from the future."""
    return (
        fact.mesh == mesh
        and fact.issued_at <= now + AHEAD_S_MAX
        and fact.epoch <= now + EPOCH_AHEAD_S_MAX
    )

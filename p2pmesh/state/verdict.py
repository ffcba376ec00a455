"""What a record is to a document that it reaches, told before its signature is looked at.

Pure. It costs microseconds where a signature costs a hundred, so it is asked first.
"""

from __future__ import annotations

from enum import Enum

from p2pmesh.identity.keys import MeshId
from p2pmesh.state.held import EXPIRY_GRACE_S, Held
from p2pmesh.wire.evidence import Certificate, Fork
from p2pmesh.wire.records import Record

AHEAD_S_MAX = 60  # what comes from further in the future is not believed yet
EPOCH_AHEAD_S_MAX = 86400  # an epoch is at least the start's unix time; this much more is forged


class Verdict(Enum):
    """What merging a record would mean."""

    NEWS = "news"
    STALE = "stale"  # this version or a newer one is known
    VOID = "void"  # of another mesh, run out, or from the future
    REFUSED = "refused"  # its owner has more than anybody may
    FORK = "fork"  # another value stands under the same number


def judge(record: Record, held: Held, mesh: MeshId, now: float) -> Verdict:
    """The verdict on `record` beside what is held of its owner."""
    if record.expires_at + EXPIRY_GRACE_S <= now or not is_credible(record, mesh, now):
        return Verdict.VOID
    mine = held.records.get(record.register)
    if mine is not None and record.seq == mine.seq and record.epoch == mine.epoch:
        return Verdict.STALE if record.digest == mine.digest else Verdict.FORK
    if held.is_past(record.register, record.epoch, record.seq):
        return Verdict.STALE
    return Verdict.NEWS if held.has_room(record) else Verdict.REFUSED


def is_credible(fact: Record | Certificate | Fork, mesh: MeshId, now: float) -> bool:
    """Whether a fact is of this mesh and not from the future."""
    return (
        fact.mesh == mesh
        and fact.issued_at <= now + AHEAD_S_MAX
        and fact.epoch <= now + EPOCH_AHEAD_S_MAX
    )

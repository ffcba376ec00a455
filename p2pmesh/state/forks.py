"""The forks of each owner, and until when they keep it out of placement.

Pure. Of each owner the newest few forks stand, each for as long as the longest hold there is, so
that what stands follows from what was signed and from the time. An owner that forked again within
that time stays out for longer.
"""

from __future__ import annotations

from collections.abc import Iterator

from p2pmesh.identity.keys import NodeId
from p2pmesh.state.outcome import MergeOutcome
from p2pmesh.wire.evidence import Fork

FORKS_MAX = 7  # per owner: with that many the hold is as long as it gets
HOLD_S = 30  # for the first fork; each further one doubles it
HOLD_S_MAX = 30 * 60
FORKED_OWNERS_MAX = 16384  # as many owners as a document has


class Forks:
    """All forks that stand."""

    def __init__(self) -> None:
        self._of: dict[NodeId, tuple[Fork, ...]] = {}
        self._held_until: dict[NodeId, int] = {}

    def __iter__(self) -> Iterator[Fork]:
        for forks in self._of.values():
            yield from forks

    def of(self, owner: NodeId) -> tuple[Fork, ...]:
        """The forks of `owner`, the oldest first."""
        return self._of.get(owner, ())

    def judge(self, fork: Fork) -> MergeOutcome:
        """Judge `fork`, but for its mesh and its time."""
        standing = self.of(fork.owner)
        if any(other.id == fork.id for other in standing):
            return MergeOutcome.STALE
        if len(standing) == FORKS_MAX and _order(fork) < _order(standing[0]):
            return MergeOutcome.STALE
        is_full = not standing and len(self._of) >= FORKED_OWNERS_MAX
        return MergeOutcome.REFUSED if is_full else MergeOutcome.NEWS

    def add(self, fork: Fork) -> tuple[Fork, ...]:
        """Let `fork`, which is news, stand; returns those that make way for it."""
        ordered = sorted((*self.of(fork.owner), fork), key=_order)
        self._set(fork.owner, tuple(ordered[-FORKS_MAX:]))
        return tuple(ordered[:-FORKS_MAX])

    def drop(self, owner: NodeId) -> tuple[Fork, ...]:
        """Drop the forks of `owner`; return them."""
        gone = self.of(owner)
        if gone:
            self._set(owner, ())
        return gone

    def expire(self, now: float) -> list[Fork]:
        """Drop what has stood for long enough; returns it."""
        over = [fork for fork in self if fork_ends_at(fork) <= now]
        for owner in {fork.owner for fork in over}:
            self._set(owner, tuple(f for f in self._of[owner] if fork_ends_at(f) > now))
        return over

    def held(self, now: float) -> frozenset[NodeId]:
        """Owners that placement does without."""
        return frozenset(owner for owner, until in self._held_until.items() if until > now)

    def _set(self, owner: NodeId, forks: tuple[Fork, ...]) -> None:
        if forks:
            self._of[owner] = forks
            hold_s = min(HOLD_S << (len(forks) - 1), HOLD_S_MAX)
            self._held_until[owner] = max(fork.issued_at for fork in forks) + hold_s
        else:
            del self._of[owner], self._held_until[owner]


def fork_ends_at(fork: Fork) -> int:
    """Mesh time in seconds when a fork has had its effect."""
    return fork.issued_at + HOLD_S_MAX


def _order(fork: Fork) -> tuple[int, int, bytes]:
    return fork.epoch, fork.seq, fork.id

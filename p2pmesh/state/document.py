"""The merged facts of the mesh: which records, certificates and forks stand.

Pure, and a CRDT. Of each register of each owner the largest version stands, of each subject the
certificate that names its `member` record as it stands, of each owner the newest forks, of each
signer its statements of trust: merging is idempotent, commutative and associative, and nodes that
were told the same hold the same, whatever order it came in, while there are no more than
`OWNERS_MAX` owners. What has run out is void everywhere, at a moment that follows from the item
and from the lease it lives on. So nothing that was dropped can come back, as long as an owner never
signs a lease that ends before the one that it replaces.

`judge` is cheap and says what merging a fact would mean; the caller checks the signatures of what
may count, and whether a certificate has enough accusers; then `merge` takes the fact together with
the judgement. Memory: per owner one `OwnerRecords`, which documents simulated in one process may
share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from p2pmesh.identity.keys import MeshId, NodeId
from p2pmesh.state.fingerprint import Fingerprint, term_of
from p2pmesh.state.forks import Forks, fork_ends_at
from p2pmesh.state.item_index import ItemIndex
from p2pmesh.state.outcome import (
    AHEAD_S_MAX,
    EPOCH_AHEAD_S_MAX,
    MergeOutcome,
    MergeResult,
    is_credible,
    judge,
)
from p2pmesh.state.owner_records import (
    EXPIRY_GRACE_S,
    NEVER,
    NOTHING,
    OWNER_BYTES_MAX,
    REGISTERS_PER_OWNER_MAX,
    OwnerRecords,
    hold,
)
from p2pmesh.state.pending import Pending
from p2pmesh.state.trust import Authorised, Statements, Trust, ends_at, everybody
from p2pmesh.wire.evidence import Certificate, Fork
from p2pmesh.wire.facts import Fact
from p2pmesh.wire.records import Record
from p2pmesh.wire.registers import MEMBER
from p2pmesh.wire.statements import Policy, Revocation, Statement

__all__ = [
    "AHEAD_S_MAX",
    "EPOCH_AHEAD_S_MAX",
    "EXPIRY_GRACE_S",
    "OWNERS_MAX",
    "OWNER_BYTES_MAX",
    "REGISTERS_PER_OWNER_MAX",
    "Document",
    "MergeOutcome",
    "MergeResult",
    "term_of",
]

OWNERS_MAX = 16384  # somewhat above the largest mesh that was ever simulated


class Document:
    """All that stands.

    Facts that are not authorised are void, except the keeper's own. The document asks when a fact
    is judged, and anew of all that stands when a statement of trust changes the answer.

    Args:
        mesh: Records of other meshes mean nothing here.
        keeper: Whose document it is: what that node says itself always has room and counts.
        authorised: Whether a fact counts in a mesh with the trust that stands. Nodes that answer
            differently do not come to hold the same.
        share: Returns the one copy of equal values, in a simulation.
        grow: What stands of an owner once a record does, as `OwnerRecords.with_record`.
        homes: Whose each item is, by id; one map for all documents of a simulation.
    """

    def __init__(
        self,
        mesh: MeshId,
        *,
        keeper: NodeId | None = None,
        authorised: Authorised = everybody,
        share: Callable[[OwnerRecords], OwnerRecords] | None = None,
        grow: Callable[[OwnerRecords, Record], OwnerRecords] = OwnerRecords.with_record,
        homes: dict[bytes, NodeId] | None = None,
    ) -> None:
        self._mesh, self._keeper, self._authorised = mesh, keeper, authorised
        self._share, self._grow = share, grow
        self._held: dict[NodeId, OwnerRecords] = {}
        self._certificates: dict[NodeId, Certificate] = {}
        self._forks = Forks()
        self._statements = Statements()
        self._pending = Pending()
        self._fingerprint = Fingerprint()
        self._index = ItemIndex(homes)
        self._ends_at = NEVER  # nothing runs out before
        self._owners: tuple[NodeId, ...] | None = None
        self._removed: frozenset[NodeId] | None = None

    # --- what stands ------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> bytes:
        """Equal for equal documents."""
        return self._fingerprint.value

    def fingerprint_at(self, cutoff_s: int) -> bytes | None:
        """Equal for documents that differ by no more than what was issued later.

        Args:
            cutoff_s: Mesh time in seconds.

        Returns:
            None when that is longer ago than changes are kept.
        """
        return self._fingerprint.at(cutoff_s)

    @property
    def owners(self) -> tuple[NodeId, ...]:
        """Everybody with at least one record, sorted."""
        if self._owners is None:
            self._owners = tuple(sorted(self._held))
        return self._owners

    def __contains__(self, owner: NodeId) -> bool:
        return owner in self._held

    def __len__(self) -> int:
        return len(self._held)

    def get(self, owner: NodeId, register: str) -> Record | None:
        """The record that stands, if any."""
        held = self._held.get(owner)
        return None if held is None else held.records.get(register)

    def registers(self, owner: NodeId) -> tuple[Record, ...]:
        """All records of `owner`, sorted by register."""
        return tuple(self._held.get(owner, NOTHING).records.values())

    def records(self) -> Iterator[Record]:
        """All records, sorted by owner and register."""
        for owner in self.owners:
            yield from self._held[owner].records.values()

    # --- merging ----------------------------------------------------------------------------------

    def stale(self, owner: NodeId, register: str, epoch: int, seq: int) -> bool:
        """Whether a record with this head is certainly not news; with an equal one it may be."""
        held = self._held.get(owner)
        return held is not None and held.is_past(register, epoch, seq)

    def judge(self, fact: Fact, now: float) -> MergeOutcome:
        """Judge what merging `fact` would change.

        Args:
            fact: Parsed, not yet verified.
            now: Mesh time in seconds.
        """
        if not self._counts(fact, now):
            return MergeOutcome.VOID
        if isinstance(fact, Record):
            return self._judge_record(fact, now)
        if not is_credible(fact, self._mesh, now):
            return MergeOutcome.VOID
        if isinstance(fact, Certificate):
            return self._judge_certificate(fact)
        if isinstance(fact, Statement):
            return self._statements.judge(fact, now)
        return self._forks.judge(fact) if fork_ends_at(fact) > now else MergeOutcome.VOID

    def merge(self, fact: Fact, now: float, outcome: MergeOutcome | None = None) -> MergeResult:
        """Let `fact` stand if it may. The caller has checked its signatures.

        Args:
            fact: Of a certificate, the caller has checked that it is proof enough.
            now: Mesh time in seconds.
            outcome: What `judge` said of it; None: it was not asked, or its owner's facts have
                changed since.
        """
        outcome = self.judge(fact, now) if outcome is None else outcome
        if not outcome.may_count:
            return MergeResult(outcome)
        if isinstance(fact, Statement):
            return self.declare([fact], now)
        if isinstance(fact, Record):
            ids = self._merge_record(fact, now, outcome)
        elif isinstance(fact, Certificate):
            ids = self._merge_certificate(fact, now, outcome)
        else:
            ids = self._merge_fork(fact, now)
        return MergeResult(outcome, frozenset((fact.owner,)), ids) if ids else MergeResult(outcome)

    def declare(self, statements: Iterable[Statement], now: float) -> MergeResult:
        """Let those statements stand that may, and what they void fall, all at once.

        What they come to is worked out once for all of them. The caller has checked their
        signatures; the owners in the result are those whose facts do not count any more.
        """
        self._fingerprint.advance(now)
        fresh: list[Statement] = []
        for statement in statements:
            if self.judge(statement, now).may_count:
                for old in self._statements.add(statement):
                    self._remove(old.id, old.issued_at, statement.issued_at)
                self._add(statement.id, statement.owner, statement.issued_at)
                self._ends_at = min(self._ends_at, ends_at(statement))
                fresh.append(statement)
        if not fresh:
            return MergeResult(MergeOutcome.STALE)
        # Nothing else can void a record.
        voids = any(isinstance(one.body, Policy | Revocation) for one in fresh)
        owners = self.reauthorise(self._held, now) if voids else frozenset[NodeId]()
        return MergeResult(MergeOutcome.NEWS, owners, tuple(one.id for one in fresh))

    def _judge_record(self, record: Record, now: float) -> MergeOutcome:
        held = self._held.get(record.owner, NOTHING)
        outcome = judge(record, held, self._mesh, now)
        if outcome is not MergeOutcome.NEWS:
            return outcome
        if self._is_full_for(record.owner):
            return MergeOutcome.REFUSED
        return MergeOutcome.NEWS if held.end_of(record) > now else self._pending.judge(record)

    def _merge_record(self, record: Record, now: float, outcome: MergeOutcome) -> tuple[bytes, ...]:
        """Let a record stand, or wait for the `member` record that it lives on."""
        held = self._held.get(record.owner, NOTHING)
        if outcome is MergeOutcome.EQUIVOCATION:
            rival = held.records[record.register]
            if record.digest < rival.digest or not held.has_room(record):
                return ()
        if held.end_of(record) <= now:
            self._pending.add(record, now)
            return ()
        self._fingerprint.advance(now)
        self._set(record.owner, held, self._grow(held, record), record.issued_at)
        self._add(record.digest, record.owner, record.issued_at)
        early = self._pending.take(record.owner) if record.register == MEMBER else ()
        return (record.digest, *(item for one in early for item in self.merge(one, now).ids))

    def _judge_certificate(self, certificate: Certificate) -> MergeOutcome:
        """It names the version of its subject's `member` record that has to stand.

        With other evidence it is still the same certificate, and the first one is kept.
        """
        member = self.get(certificate.subject, MEMBER)
        named = certificate.epoch, certificate.seq
        if member is None or (member.epoch, member.seq) < named:
            return MergeOutcome.PENDING
        if (member.epoch, member.seq) > named or certificate.subject in self._certificates:
            return MergeOutcome.STALE
        return MergeOutcome.NEWS

    def _merge_certificate(
        self, certificate: Certificate, now: float, outcome: MergeOutcome
    ) -> tuple[bytes, ...]:
        """Let a certificate stand; one that came too early has to be offered again."""
        if outcome is MergeOutcome.PENDING:
            return ()
        self._fingerprint.advance(now)
        self._certificates[certificate.subject], self._removed = certificate, None
        self._add(certificate.id, certificate.subject, certificate.issued_at)
        return (certificate.id,)

    def _merge_fork(self, fork: Fork, now: float) -> tuple[bytes, ...]:
        self._fingerprint.advance(now)
        for old in self._forks.add(fork):
            self._remove(old.id, old.issued_at, fork.issued_at)
        self._add(fork.id, fork.owner, fork.issued_at)
        self._ends_at = min(self._ends_at, fork_ends_at(fork))
        return (fork.id,)

    # --- time -------------------------------------------------------------------------------------

    def expire(self, now: float) -> frozenset[NodeId]:
        """Drop what has run out; returns the owners concerned.

        Everything of an owner but its wants and its forks goes with its `member` lease. Call it
        often: it looks no further before something can have run out.
        """
        self._fingerprint.advance(now)
        self._pending.lapse(now)
        self._index.rest(now)
        if now < self._ends_at:
            return frozenset()
        over = [(owner, held) for owner, held in self._held.items() if held.ends_at <= now]
        for owner, held in over:
            self._set(owner, held, held.at(now), None)
        forks = self._forks.expire(now)
        for fork in forks:
            self._remove(fork.id, fork.issued_at, fork_ends_at(fork))
        for statement in self._statements.expire(now):
            self._remove(statement.id, statement.issued_at, ends_at(statement))
        ends = [held.ends_at for held in self._held.values()]
        ends += [self._statements.ends_at, *map(fork_ends_at, self._forks)]
        self._ends_at = min(ends)
        return frozenset([owner for owner, _ in over] + [fork.owner for fork in forks])

    def reauthorise(self, owners: Iterable[NodeId], now: float) -> frozenset[NodeId]:
        """Drop those facts of `owners` that are not authorised any more; return whose they were.

        Facts that are authorised again are no longer void when they are offered.
        """
        self._fingerprint.advance(now)
        over: set[NodeId] = set()
        for owner in list(owners):
            held = self._held.get(owner, NOTHING)
            counting = {name: one for name, one in held.records.items() if self._counts(one, now)}
            if len(counting) < len(held.records):
                self._set(owner, held, hold(counting).at(now), int(now))
                over.add(owner)
            if not all(self._counts(fork, now) for fork in self._forks.of(owner)):
                for fork in self._forks.drop(owner):
                    self._remove(fork.id, fork.issued_at, int(now))
                over.add(owner)
        return frozenset(over)

    # --- trust ------------------------------------------------------------------------------------

    @property
    def trust(self) -> Trust:
        """What the statements come to; the same object until one of them changes."""
        return self._statements.trust

    @property
    def statements(self) -> tuple[Statement, ...]:
        """All statements of trust, sorted by id."""
        return tuple(sorted(self._statements, key=lambda one: one.id))

    # --- certificates -----------------------------------------------------------------------------

    def certificate(self, subject: NodeId) -> Certificate | None:
        """The certificate that removes `subject`, if it is removed."""
        return self._certificates.get(subject)

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """All certificates, sorted by subject."""
        return tuple(self._certificates[subject] for subject in sorted(self._certificates))

    @property
    def removed(self) -> frozenset[NodeId]:
        """Return the nodes that certificates remove."""
        if self._removed is None:
            self._removed = frozenset(self._certificates)
        return self._removed

    # --- forks ------------------------------------------------------------------------------------

    def forks(self, owner: NodeId) -> tuple[Fork, ...]:
        """The forks of `owner` that stand, the oldest first."""
        return self._forks.of(owner)

    def held(self, now: float) -> frozenset[NodeId]:
        """Owners that their forks keep out of placement."""
        return self._forks.held(now)

    # --- items ------------------------------------------------------------------------------------

    def ids(self) -> list[bytes]:
        """The ids of all that stands, sorted. The list is nobody's to change."""
        return self._index.ids(self._ids)

    def item(self, item: bytes) -> Fact | None:
        """Return the item with that id, if it stands."""
        owner = self._index.home(item)
        if owner is None:
            return None
        for record in self._held.get(owner, NOTHING).records.values():
            if record.digest == item:
                return record
        certificate = self._certificates.get(owner)
        if certificate is not None and certificate.id == item:
            return certificate
        forks = (fork for fork in self._forks.of(owner) if fork.id == item)
        return next(forks, None) or self._statements.find(item)

    # --- inside -----------------------------------------------------------------------------------

    def _ids(self) -> Iterator[bytes]:
        for held in self._held.values():
            yield from held.digests
        yield from (certificate.id for certificate in self._certificates.values())
        yield from (fork.id for fork in self._forks)
        yield from (statement.id for statement in self._statements)

    def _counts(self, fact: Fact, now: float) -> bool:
        if fact.owner == self._keeper or isinstance(fact, Statement):
            return True  # which statements count is for the trust that they come to
        return self._authorised(self.trust, fact, now)

    def _is_full_for(self, owner: NodeId) -> bool:
        if owner in self._held or owner == self._keeper:
            return False
        return len(self._held) >= OWNERS_MAX

    def _set(
        self, owner: NodeId, before: OwnerRecords, after: OwnerRecords, at_s: int | None
    ) -> None:
        """Let `after` stand; what is lost died at `at_s`, or else when it ran out."""
        for lost in before.lost(after):
            self._remove(lost.digest, lost.issued_at, before.end_of(lost) if at_s is None else at_s)
        if before is NOTHING or not after.records:
            self._owners = None
        if after.records:
            self._held[owner] = after if self._share is None else self._share(after)
            self._ends_at = min(self._ends_at, after.ends_at)
        else:
            del self._held[owner]
        certificate = self._certificates.get(owner)
        if certificate is not None and not _names(certificate, after.records.get(MEMBER)):
            del self._certificates[owner]
            self._removed = None
            died_s = before.lease_until if at_s is None else at_s
            self._remove(certificate.id, certificate.issued_at, died_s)

    def _add(self, item: bytes, owner: NodeId, at_s: int) -> None:
        self._fingerprint.add(item, at_s)
        self._index.add(item, owner)

    def _remove(self, item: bytes, born_s: int, at_s: int) -> None:
        self._fingerprint.remove(item, born_s, at_s)
        self._index.drop(item)


def _names(certificate: Certificate, member: Record | None) -> bool:
    return member is not None and (member.epoch, member.seq) == (
        certificate.epoch,
        certificate.seq,
    )

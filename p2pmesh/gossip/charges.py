"""Who accuses whom in the document, and when that is enough to remove somebody. Pure.

An accusation is a row in the accuser's `accused` register and names the version of the subject's
`member` record, so that any later version refutes it. When enough members accuse the same version
for `EFFECT_DELAY_S`, in which a living subject would have refuted them, every node makes the same
removal certificate out of the records at hand. Only counts decide, over what is in the document:
nodes with equal documents decide alike, whatever they saw on their own links. (Rapid, ATC 2018,
cuts by observers' reports in the same way; here each report is signed and can be refuted.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

from p2pmesh.gossip.overlay import RINGS
from p2pmesh.gossip.roster import Roster
from p2pmesh.gossip.shared import Shared
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from p2pmesh.wire.evidence import ACCUSED, Accusation, Certificate, make_certificate
from p2pmesh.wire.records import Record

EFFECT_DELAY_S = 0.5  # a refutation needs at most two spread times, 0.2 s each for 1000 nodes
STRIKES_MAX = 3  # accusers refuted so often do not count for a while
STRIKES_S = 600.0


def needed(voters: int) -> int:
    """How many of so many possible accusers must accuse: all of up to three, else all but one."""
    return max(1, voters if voters <= 3 else voters - 1)


class Charge(NamedTuple):
    """One row of one accuser: which version of the subject's `member` record it is about."""

    record: Record
    epoch: int
    seq: int


class Charges:
    """The accusations of a document.

    Args:
        document: Where they are.
        roster: Its members.
        shared: How records are read.
    """

    def __init__(self, document: Document, roster: Roster, shared: Shared) -> None:
        self._document, self._roster, self._shared = document, roster, shared
        self._by_accuser: dict[NodeId, Record] = {}
        self._by_subject: dict[NodeId, dict[NodeId, Charge]] = {}
        self._accused: frozenset[NodeId] | None = None
        self._strikes: dict[NodeId, deque[float]] = {}
        self._struck: dict[NodeId, Record] = {}
        self._complete_since: dict[NodeId, float] = {}

    # --- what stands ------------------------------------------------------------------------------

    def refresh(self, owners: Iterable[NodeId], now: float) -> None:
        """Records of these owners changed; call after the roster was refreshed."""
        for owner in owners:
            if owner in self._by_subject:
                self._accused = None  # as it stands now it may be accused, or no longer
            self._note_refutation(owner, now)
            record = self._document.get(owner, ACCUSED)
            before = self._by_accuser.get(owner)
            if record is before:
                continue
            if before is not None:
                self._forget(owner, before)
            if record is not None:
                self._by_accuser[owner] = record
                self._note(owner, record)
            self._accused = None

    def accusers(self, subject: NodeId, now: float) -> dict[NodeId, Record]:
        """Who credibly accuses `subject` as it stands now, each with the record that says so."""
        known = self._roster.known.get(subject)
        if known is None:
            return {}
        return {
            accuser: charge.record
            for accuser, charge in self._by_subject.get(subject, {}).items()
            if (charge.epoch, charge.seq) == known.version and not self.discredited(accuser, now)
        }

    def accused(self, now: float) -> frozenset[NodeId]:
        """Everybody whom somebody credible accuses, as they stand now."""
        if self._accused is None:
            self._accused = frozenset(s for s in self._by_subject if self.accusers(s, now))
        return self._accused

    def discredited(self, accuser: NodeId, now: float) -> bool:
        """Whether `accuser` was wrong too often lately."""
        strikes = self._strikes.get(accuser)
        if not strikes:
            return False
        while strikes and now - strikes[0] > STRIKES_S:
            strikes.popleft()
        return len(strikes) >= STRIKES_MAX

    def wrong(self, now: float) -> frozenset[NodeId]:
        """Everybody who was wrong too often lately."""
        return frozenset(a for a in self._strikes if self.discredited(a, now))

    # --- removing ---------------------------------------------------------------------------------

    def ripe(self, now: float) -> list[Certificate]:
        """Certificates of whom enough members accused for long enough."""
        self._accused = None  # somebody may be credible again
        accused = self.accused(now)
        ripe: list[Certificate] = []
        complete: dict[NodeId, float] = {}
        for subject in sorted(accused - self._document.removed - {self._roster.me}):
            votes = {
                accuser: record
                for accuser, record in self.accusers(subject, now).items()
                if accuser in self._roster.live and accuser not in accused
            }
            if not self._enough(subject, votes, accused):
                continue
            since = self._complete_since.get(subject, now)
            complete[subject] = since
            if now - since >= EFFECT_DELAY_S:
                ripe.append(self._certificate(subject, votes))
        self._complete_since = complete
        return ripe

    def next_ripe_s(self, now: float) -> float | None:
        """How long until a certificate may be ripe; None: nothing is under way."""
        if not self._complete_since:
            return None
        return max(0.0, min(self._complete_since.values()) + EFFECT_DELAY_S - now)

    def convincing(self, certificate: Certificate) -> bool:
        """Whether a certificate that others made is to be believed, its signatures apart.

        Its evidence may be older than what the accusers say now, and some of them may be gone.
        Whom this node alone holds to be wrong too often counts here: nodes must not differ in
        what they believe for longer than it takes to tell each other.
        """
        votes = {
            record.owner: record
            for record in certificate.evidence
            if record.owner in self._document
        }
        rows = (row for record in certificate.evidence for row in self._shared.accused(record))
        standing = {s for s, charges in self._by_subject.items() if charges}
        accused = standing | {row.subject for row in rows} - set(votes)
        return self._enough(certificate.subject, votes, accused)

    def _enough(
        self, subject: NodeId, votes: dict[NodeId, Record], accused: Collection[NodeId]
    ) -> bool:
        if not votes:
            return False
        at = max(record.issued_at for record in votes.values())
        return len(votes) >= needed(self._voters(subject, at, accused))

    def _voters(self, subject: NodeId, at: int, accused: Collection[NodeId]) -> int:
        """How many observers `subject` had then: as many as there are, up to one per ring."""
        count, dialable = 0, self._roster.dialable(subject)
        for node in self._roster.live - {subject}:
            known = self._roster.known.get(node)
            if known is None or node in accused:
                continue
            # Who started later cannot have noticed anything yet; two of whom neither can be
            # dialled are never linked.
            if known.epoch <= at and (dialable or known.addresses):
                count += 1
                if count == RINGS:
                    break
        return count

    def _certificate(self, subject: NodeId, votes: dict[NodeId, Record]) -> Certificate:
        accusation = Accusation(subject, *self._roster.known[subject].version)
        return make_certificate(accusation, votes.values())

    # --- keeping count ----------------------------------------------------------------------------

    def _note(self, accuser: NodeId, record: Record) -> None:
        # Sorted, so that of two rows about one subject the later version counts.
        for row in sorted(self._shared.accused(record)):
            known = self._roster.known.get(row.subject)
            refuted = known is not None and (row.epoch, row.seq) < known.version
            if row.subject != accuser and not refuted:
                charges = self._by_subject.setdefault(row.subject, {})
                charges[accuser] = Charge(record, row.epoch, row.seq)

    def _note_refutation(self, subject: NodeId, now: float) -> None:
        """Drop what is about an earlier version; strike who was wrong about a living node."""
        known = self._roster.known.get(subject)
        charges = self._by_subject.get(subject)
        if known is None or charges is None:
            return
        for accuser, charge in list(charges.items()):
            if (charge.epoch, charge.seq) >= known.version:
                continue
            del charges[accuser]
            if charge.epoch == known.epoch and known.issued_at >= charge.record.issued_at:
                self._strike(accuser, charge.record, now)
        if not charges:
            del self._by_subject[subject]

    def _strike(self, accuser: NodeId, record: Record, now: float) -> None:
        # One strike for one record: a machine whose network was gone is wrong about many at once.
        if self._struck.get(accuser) is not record:
            self._struck[accuser] = record
            self._strikes.setdefault(accuser, deque(maxlen=STRIKES_MAX)).append(now)

    def _forget(self, accuser: NodeId, record: Record) -> None:
        del self._by_accuser[accuser]
        for row in self._shared.accused(record):
            charges = self._by_subject.get(row.subject)
            if charges is not None and accuser in charges:
                del charges[accuser]
                if not charges:
                    del self._by_subject[row.subject]

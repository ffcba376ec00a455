"""The accusations in the document, and the quorum that removes their subject. Pure.

An accusation is a row in the accuser's `accused` register and names the version of the subject's
`member` record, so that any later version refutes it. When enough members accuse the same version
for `EFFECT_DELAY_S`, in which a living subject would have refuted them, every node makes the same
removal certificate out of the records at hand. Only counts decide, over what is in the document
and over what this node itself accuses. (Rapid, ATC 2018, cuts by observers' reports in the same
way; here each report is signed and can be refuted.)

One member alone, whatever it says, removes nobody where four are left: its word is one voice, and
only whom two accuse, or this node itself, is no longer counted among those who could have spoken.
Nor can it make everybody speak all the time: whoever it keeps accusing answers it ever more rarely,
until somebody joins in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

from p2pmesh.gossip.buckets import Buckets
from p2pmesh.gossip.members import Members
from p2pmesh.gossip.overlay import RINGS
from p2pmesh.gossip.shared import Shared
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from p2pmesh.wire.evidence import Accusation, Certificate, make_certificate
from p2pmesh.wire.records import Record
from p2pmesh.wire.registers import ACCUSED

EFFECT_DELAY_S = 0.5  # a refutation needs at most two spread times, 0.2 s each for 1000 nodes
WEAKLY_REMOVED_MAX = 32  # looked for at a time
REFUTED_BURST, REFUTED_PER_S = 3, 3 / 600  # answers to one lone accuser


def quorum(voters: int) -> int:
    """How many of so many possible accusers must accuse: all of up to three, else all but one."""
    return max(1, voters if voters <= 3 else voters - 1)


class AccusationRow(NamedTuple):
    """One row of one accuser: which version of the subject's `member` record it is about."""

    record: Record
    epoch: int
    seq: int


class Removal:
    """The accusations of a document.

    Args:
        document: Where they are.
        members: Its members.
        shared: How records are read.
    """

    def __init__(self, document: Document, members: Members, shared: Shared) -> None:
        self._document, self._members, self._shared = document, members, shared
        self._by_accuser: dict[NodeId, Record] = {}
        self._by_subject: dict[NodeId, dict[NodeId, AccusationRow]] = {}
        self._accused: frozenset[NodeId] | None = None
        self._non_voters: frozenset[NodeId] = frozenset()
        self._weakly_removed: frozenset[NodeId] = frozenset()
        self._removed: frozenset[NodeId] | None = None
        self._answers: Buckets[NodeId] = Buckets(REFUTED_PER_S, REFUTED_BURST)
        self._complete_since: dict[NodeId, float] = {}

    # --- what stands ------------------------------------------------------------------------------

    def refresh(self, owners: Iterable[NodeId]) -> None:
        """Records of these owners changed; call after `Members.refresh`."""
        for owner in owners:
            if owner in self._by_subject:
                self._accused = None  # as it stands now it may be accused, or no longer
            self._drop_refuted(owner)
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

    def accusers(self, subject: NodeId) -> dict[NodeId, Record]:
        """Return the accusers of `subject`'s present version, each with the record that says so."""
        known = self._members.known.get(subject)
        if known is None:
            return {}
        return {
            accuser: charge.record
            for accuser, charge in self._by_subject.get(subject, {}).items()
            if (charge.epoch, charge.seq) == known.version
        }

    @property
    def accused(self) -> frozenset[NodeId]:
        """Everybody whom somebody accuses, as they stand now."""
        self._count()
        return self._accused or frozenset()

    @property
    def non_voters(self) -> frozenset[NodeId]:
        """Return subjects that two members or this node accuse: neither observers nor voters."""
        self._count()
        return self._non_voters

    @property
    def weakly_removed(self) -> frozenset[NodeId]:
        """Return some nodes removed by few accusers, none of which is this node.

        Another part of the mesh may count this node among those who have to speak, so it looks for
        itself, and says what it finds.
        """
        self._count()
        return self._weakly_removed

    def must_refute(self, mesh_now: float) -> bool:
        """Whether this node is accused and has to speak up, this very time.

        Args:
            mesh_now: Mesh time in seconds.
        """
        me = self._members.me
        accusers = self.accusers(me)
        if len(accusers) > 1 or self._has_quorum(me, accusers, self.non_voters - {me}):
            return True
        return self._answers_one_of(accusers, mesh_now)

    def must_answer(self, certificate: Certificate, mesh_now: float) -> bool:
        """Whether this node has to speak up against a certificate that removes it.

        In another part of the mesh, with fewer members, it may have been proof enough.

        Args:
            certificate: About this node as it stands.
            mesh_now: Mesh time in seconds.
        """
        known = sorted(one for one in certificate.accusers if one in self._document)
        return self.is_sufficient(certificate) or self._answers_one_of(known, mesh_now)

    def _answers_one_of(self, accusers: Iterable[NodeId], mesh_now: float) -> bool:
        # Whoever goes on without others joining in could make everybody speak up all the time.
        return any(self._answers.take(one, mesh_now) for one in accusers)

    def _needs_my_word(self, subject: NodeId) -> bool:
        certificate, known = self._document.certificate(subject), self._members.known.get(subject)
        if certificate is None or known is None or known.left:
            return False
        names = certificate.accusers | self.accusers(subject).keys()
        return len(names) < quorum(RINGS) and self._members.me not in names

    def _count(self) -> None:
        removed = self._document.removed
        if self._accused is None or self._removed is not removed:
            accusers = {subject: self.accusers(subject) for subject in self._by_subject}
            me = self._members.me
            self._accused = frozenset(s for s, by in accusers.items() if by)
            self._non_voters = frozenset(s for s, by in accusers.items() if len(by) > 1 or me in by)
            self._removed = removed
            weak = sorted(one for one in removed if self._needs_my_word(one))
            self._weakly_removed = frozenset(weak[:WEAKLY_REMOVED_MAX])

    # --- removing ---------------------------------------------------------------------------------

    def ripe(self, now: float) -> list[Certificate]:
        """Return certificates for subjects whose quorum has stood for `EFFECT_DELAY_S`."""
        non_voters = self.non_voters
        ripe: list[Certificate] = []
        complete: dict[NodeId, float] = {}
        for subject in sorted(self.accused - self._document.removed - {self._members.me}):
            votes = {
                accuser: record
                for accuser, record in self.accusers(subject).items()
                if accuser in self._members.live and accuser not in non_voters
            }
            if not self._has_quorum(subject, votes, non_voters):
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

    def is_sufficient(self, certificate: Certificate) -> bool:
        """Whether a certificate that others made is to be believed, its signatures apart.

        Its evidence may be older than what the accusers say now, and some of them may be gone. It
        may also come from a part of the mesh where fewer were left: whoever accuses the subject
        here joins in.
        """
        records = [one for one in certificate.evidence if one.owner in self._document]
        votes = self.accusers(certificate.subject) | {one.owner: one for one in records}
        named = Counter(subject for record in records for subject in self._named(record))
        non_voters = self.non_voters | {subject for subject, times in named.items() if times > 1}
        return self._has_quorum(certificate.subject, votes, non_voters - votes.keys())

    def _has_quorum(
        self, subject: NodeId, votes: dict[NodeId, Record], non_voters: Collection[NodeId]
    ) -> bool:
        if not votes or subject not in self._members.known:
            return False
        # What is accused was written before: an accuser that says otherwise gains nothing by it.
        written_at = self._members.known[subject].issued_at
        at = max(written_at, *(record.issued_at for record in votes.values()))
        return len(votes) >= quorum(self._voters(subject, at, non_voters))

    def _voters(self, subject: NodeId, at: int, non_voters: Collection[NodeId]) -> int:
        """How many observers `subject` had then: as many as there are, up to one per ring."""
        count, dialable = 0, self._members.dialable(subject)
        for node in self._members.live - {subject}:
            known = self._members.known.get(node)
            if known is None or node in non_voters:
                continue
            # Who started later cannot have noticed anything yet; two of whom neither can be
            # dialled are never linked.
            if known.epoch <= at and (dialable or known.addresses):
                count += 1
                if count == RINGS:
                    break
        return count

    def _certificate(self, subject: NodeId, votes: dict[NodeId, Record]) -> Certificate:
        accusation = Accusation(subject, *self._members.known[subject].version)
        return make_certificate(accusation, votes.values())

    # --- keeping count ----------------------------------------------------------------------------

    def _note(self, accuser: NodeId, record: Record) -> None:
        # Sorted, so that of two rows about one subject the later version counts.
        for row in sorted(self._shared.accused(record)):
            known = self._members.known.get(row.subject)
            refuted = known is not None and (row.epoch, row.seq) < known.version
            if row.subject != accuser and not refuted:
                removal = self._by_subject.setdefault(row.subject, {})
                removal[accuser] = AccusationRow(record, row.epoch, row.seq)

    def _drop_refuted(self, subject: NodeId) -> None:
        """Forget what is about earlier versions of a member that has spoken up."""
        known, removal = self._members.known.get(subject), self._by_subject.get(subject)
        if known is None or removal is None:
            return
        for accuser, charge in list(removal.items()):
            if (charge.epoch, charge.seq) < known.version:
                del removal[accuser]
        if not removal:
            del self._by_subject[subject]

    def _named(self, record: Record) -> set[NodeId]:
        """Return the subjects of one accuser, each once."""
        return {row.subject for row in self._shared.accused(record)}

    def _forget(self, accuser: NodeId, record: Record) -> None:
        del self._by_accuser[accuser]
        for row in self._shared.accused(record):
            removal = self._by_subject.get(row.subject)
            if removal is not None and accuser in removal:
                del removal[accuser]
                if not removal:
                    del self._by_subject[row.subject]

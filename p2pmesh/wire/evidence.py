"""Evidence of one node against another: accusations, certificates of removal, forks.

Pure. An accusation is a row in the accuser's own `accused` register and says that the subject,
as of one version of its `member` record, does not answer. Enough of those registers, each exactly
as its owner signed it, make a certificate, and two versions of one register that carry the same
number make a fork. Anybody can check both without knowing who put them together: the order of the
parts is fixed, so that equal evidence has equal bytes.

How many accusers are enough depends on who is a member, which is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, NoReturn

from p2pmesh.errors import PeerError
from p2pmesh.identity.keys import ID_BYTES, MeshId, NodeId
from p2pmesh.wire.codec import decode, encode
from p2pmesh.wire.fields import take_rows
from p2pmesh.wire.records import (
    DIGEST_BYTES,
    RECORD_BYTES_MAX,
    Record,
    RecordCheck,
)
from p2pmesh.wire.registers import ACCUSED

ACCUSED_MAX = 256  # rows in it; they fit one record, and no node observes more
EVIDENCE_MAX = 8  # records in a certificate; five observers are the most that are ever asked for
CERTIFICATE_BYTES_MAX = EVIDENCE_MAX * RECORD_BYTES_MAX + 1024
FORK_BYTES_MAX = 2 * RECORD_BYTES_MAX + 1024

_CERTIFICATE_TAG = "cert"
_FORK_TAG = "fork"


class Accusation(NamedTuple):
    """The claim that `subject` does not answer, as of this version of its `member` record.

    A later version of that record refutes it.
    """

    subject: NodeId
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The accusations that remove a node from placement; made by `make_certificate`.

    Attributes:
        subject: Who is removed, together with `epoch` and `seq` of its `member` record.
        evidence: The `accused` records, one per accuser, in the order of their owners.
        raw: The bytes on the wire.
        id: The same for all certificates of one accusation, whatever their evidence.
    """

    subject: NodeId
    epoch: int
    seq: int
    evidence: tuple[Record, ...]
    raw: bytes
    id: bytes

    @property
    def owner(self) -> NodeId:
        """The subject: the certificate is one of the facts about it."""
        return self.subject

    @property
    def signed(self) -> tuple[Record, ...]:
        """All the evidence."""
        return self.evidence

    @property
    def accusation(self) -> Accusation:
        """Return the accusation that all the evidence makes."""
        return Accusation(self.subject, self.epoch, self.seq)

    @property
    def accusers(self) -> frozenset[NodeId]:
        """Return the owners that signed the evidence."""
        return frozenset(record.owner for record in self.evidence)

    @property
    def issued_at(self) -> int:
        """Mesh time in seconds of the newest piece of evidence."""
        return max(record.issued_at for record in self.evidence)

    @property
    def mesh(self) -> MeshId:
        """The mesh that all of it is for."""
        return self.evidence[0].mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """Two values that one key signed under the same number; made by `make_fork`.

    Attributes:
        first: The record with the smaller digest.
        second: The other one.
        raw: The bytes on the wire.
        id: Of this pair, whichever way round it was found.
    """

    first: Record
    second: Record
    raw: bytes
    id: bytes

    @property
    def signed(self) -> tuple[Record, ...]:
        """Both records."""
        return self.first, self.second

    @property
    def owner(self) -> NodeId:
        """Return the owner whose key was used twice."""
        return self.first.owner

    @property
    def register(self) -> str:
        """Which of the owner's registers."""
        return self.first.register

    @property
    def epoch(self) -> int:
        """The epoch of both records."""
        return self.first.epoch

    @property
    def seq(self) -> int:
        """The number that both records carry."""
        return self.first.seq

    @property
    def issued_at(self) -> int:
        """Mesh time in seconds of the later one."""
        return max(self.first.issued_at, self.second.issued_at)

    @property
    def mesh(self) -> MeshId:
        """The mesh that both are for."""
        return self.first.mesh


def accused_to_wire(rows: Iterable[Accusation]) -> dict[str, Any]:
    """The body of an `accused` record.

    Raises:
        ValueError: More rows than one register may have: our own bug.
    """
    ordered = sorted(set(rows))
    if len(ordered) > ACCUSED_MAX:
        raise ValueError(f"{len(ordered)} accusations, at most {ACCUSED_MAX} are allowed")
    return {"s": [list(row) for row in ordered]}


def accused_from_wire(body: dict[str, Any]) -> tuple[Accusation, ...]:
    """The rows of an `accused` record that can be read, of the first `ACCUSED_MAX`.

    Raises:
        PeerError: The body is not of that form.
    """
    return tuple(take_rows(body, "s", _row, count_max=ACCUSED_MAX))


def make_certificate(accusation: Accusation, evidence: Iterable[Record]) -> Certificate:
    """Put `accused` records together; of more than EVIDENCE_MAX those with the smallest owners.

    Raises:
        PeerError: A record does not say it, or speaks for an accuser who has spoken.
    """
    ordered = tuple(sorted(evidence, key=lambda record: record.owner))[:EVIDENCE_MAX]
    _check_evidence(accusation, ordered)
    named = [_CERTIFICATE_TAG, *accusation]
    return Certificate(
        subject=accusation.subject,
        epoch=accusation.epoch,
        seq=accusation.seq,
        evidence=ordered,
        raw=encode([*named, [record.raw for record in ordered]]),
        id=blake2b(encode(named), digest_size=DIGEST_BYTES).digest(),
    )


def parse_certificate(raw: bytes, check: RecordCheck) -> Certificate:
    """Decode a certificate and check its form, but not yet its signatures.

    Raises:
        PeerError: The bytes are not a certificate.
    """
    match decode(raw, bytes_max=CERTIFICATE_BYTES_MAX):
        case [str(tag), subject, epoch, seq, [*raws]] if (
            tag == _CERTIFICATE_TAG and len(raws) <= EVIDENCE_MAX
        ):
            accusation = _accusation(subject, epoch, seq)
            certificate = make_certificate(accusation, [_record(one, check) for one in raws])
        case _:
            _unknown("a certificate")
    if certificate.raw != raw:
        raise PeerError("a certificate whose evidence is out of order")
    return certificate


def make_fork(one: Record, other: Record) -> Fork:
    """Put two records of one number together, in either order.

    Raises:
        PeerError: They are no fork.
    """
    first, second = sorted((one, other), key=lambda record: record.digest)
    if (first.mesh, first.key, first.epoch, first.seq) != (
        second.mesh,
        second.key,
        second.epoch,
        second.seq,
    ):
        raise PeerError("a fork of two records that may stand side by side")
    if first.digest == second.digest:
        raise PeerError("a fork of a record with itself")
    digests = encode([_FORK_TAG, first.digest, second.digest])
    return Fork(
        first=first,
        second=second,
        raw=encode([_FORK_TAG, first.raw, second.raw]),
        id=blake2b(digests, digest_size=DIGEST_BYTES).digest(),
    )


def parse_fork(raw: bytes, check: RecordCheck) -> Fork:
    """Decode a fork and check its form, but not yet its signatures.

    Raises:
        PeerError: The bytes are not a fork.
    """
    match decode(raw, bytes_max=FORK_BYTES_MAX):
        case [str(tag), one, other] if tag == _FORK_TAG:
            fork = make_fork(_record(one, check), _record(other, check))
        case _:
            _unknown("a fork")
    if fork.raw != raw:
        raise PeerError("a fork whose records are out of order")
    return fork


def _check_evidence(accusation: Accusation, evidence: tuple[Record, ...]) -> None:
    if not evidence:
        raise PeerError("a certificate without evidence")
    accusers = {record.owner for record in evidence}
    if len(accusers) < len(evidence):
        raise PeerError("a certificate in which an accuser speaks twice")
    if accusation.subject in accusers:
        raise PeerError("a certificate in which a node accuses itself")
    for record in evidence:
        if record.mesh != evidence[0].mesh or record.register != ACCUSED:
            raise PeerError("a certificate with a record that accuses nobody")
        if accusation not in accused_from_wire(record.body):
            raise PeerError("a certificate with a record that accuses somebody else")


def _row(row: object) -> Accusation:
    if type(row) is not list or len(row) != len(Accusation._fields):
        _unknown("an accusation")
    return _accusation(*row)


def _accusation(subject: object, epoch: object, seq: object) -> Accusation:
    if type(subject) is not bytes or type(epoch) is not int or type(seq) is not int:
        _unknown("an accusation")
    if len(subject) != ID_BYTES or epoch < 0 or seq < 0:
        raise PeerError("an accusation with a field out of bounds")
    return Accusation(NodeId(subject), epoch, seq)


def _record(raw: object, check: RecordCheck) -> Record:
    if type(raw) is not bytes:
        _unknown("a record in evidence")
    return check.parse(raw)


def _unknown(what: str) -> NoReturn:
    raise PeerError(f"{what} of an unknown form")

"""What two nodes say to each other on a gossip link.

Pure. A message is a canonical map whose `t` names its kind; unknown kinds are skipped and unknown
fields ignored, so that a newer peer can say more. Everything is bounded before it is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from p2pmesh.errors import PeerError
from p2pmesh.identity.keys import ID_BYTES, NodeId
from p2pmesh.wire.codec import decode, encode
from p2pmesh.wire.fields import as_map, take, take_list
from p2pmesh.wire.records import DIGEST_BYTES, RECORD_BYTES_MAX

MESSAGE_BYTES_MAX = 1 << 20  # also what a link's websocket accepts
RECORDS_BYTES_MAX = 256 * 1024  # per message: probes behind it wait some milliseconds at most
SUMMARY_ENTRIES_MAX = 16384  # versions named in one message; they fit its bound
FINGERPRINT_BYTES = 16
PLAN_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Records, each as its owner signed it."""

    records: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """Which version of a register somebody holds."""

    owner: NodeId
    register: str
    epoch: int
    seq: int
    digest: bytes

    @property
    def order(self) -> tuple[int, int, bytes]:
        """As `Record.version`."""
        return self.epoch, self.seq, self.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All versions that the sender holds.

    Attributes:
        answer: Whether the receiver should say in turn what it holds.
    """

    versions: tuple[Version, ...]
    answer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Are you there, and do we know the same?

    Attributes:
        token: Repeated in the answer.
        fingerprint: Of the sender's records.
        plan: Digest of the sender's plan; in no record, so it never feeds back into the plan.
        sent_at_ms: Mesh time of the sender in milliseconds.
    """

    token: int
    fingerprint: bytes
    plan: bytes
    sent_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The reply to a probe; fields as there."""

    token: int
    fingerprint: bytes
    plan: bytes
    sent_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """A message of a kind that this version does not know; it is skipped."""

    kind: str


Message = Records | Summary | Probe | Answer | Unknown


def encode_message(message: Message) -> bytes:
    """The bytes of a message.

    Raises:
        TypeError: `message` is of a kind that is never sent.
    """
    match message:
        case Records(records=records):
            return encode({"t": "records", "r": records})
        case Summary(versions=versions, answer=answer):
            rows = [[v.owner, v.register, v.epoch, v.seq, v.digest] for v in versions]
            return encode({"t": "summary", "v": rows, "a": answer})
        case Probe() | Answer():
            return encode(
                {
                    "t": "probe" if isinstance(message, Probe) else "answer",
                    "n": message.token,
                    "f": message.fingerprint,
                    "p": message.plan,
                    "at": message.sent_at_ms,
                }
            )
        case Unknown():
            raise TypeError("a message of an unknown kind is never sent")


def decode_message(data: bytes) -> Message:
    """The message behind bytes from a peer.

    Raises:
        PeerError: The bytes break the protocol; the link should be closed.
    """
    fields = as_map(decode(data, bytes_max=MESSAGE_BYTES_MAX), "a message")
    kind = take(fields, "t", str, size_max=32)
    reader = _READERS.get(kind)
    return reader(fields) if reader else Unknown(kind=kind)


def in_messages(records: Iterable[bytes]) -> Iterator[Records]:
    """Pack records into as few messages as the bound on their size allows."""
    batch: list[bytes] = []
    size = 0
    for raw in records:
        if batch and size + len(raw) > RECORDS_BYTES_MAX:
            yield Records(records=tuple(batch))
            batch, size = [], 0
        batch.append(raw)
        size += len(raw)
    if batch:
        yield Records(records=tuple(batch))


def _read_records(fields: dict[str, Any]) -> Message:
    records = take_list(fields, "r", bytes, size_max=SUMMARY_ENTRIES_MAX)
    if any(len(raw) > RECORD_BYTES_MAX for raw in records):
        raise PeerError("a record that is too long")
    return Records(records=records)


def _read_summary(fields: dict[str, Any]) -> Message:
    versions: list[Version] = []
    for row in take_list(fields, "v", list, size_max=SUMMARY_ENTRIES_MAX):
        match row:
            case [bytes(owner), str(register), int(epoch), int(seq), bytes(digest)] if (
                len(owner) == ID_BYTES and len(digest) == DIGEST_BYTES
            ):
                versions.append(
                    Version(
                        owner=NodeId(owner),
                        register=register,
                        epoch=epoch,
                        seq=seq,
                        digest=digest,
                    )
                )
            case _:
                raise PeerError("a summary with a row of an unknown form")
    return Summary(versions=tuple(versions), answer=take(fields, "a", bool))


def _read_probe(fields: dict[str, Any]) -> Message:
    return Probe(**_probe_fields(fields))


def _read_answer(fields: dict[str, Any]) -> Message:
    return Answer(**_probe_fields(fields))


def _probe_fields(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "token": take(fields, "n", int),
        "fingerprint": take(fields, "f", bytes, size_max=FINGERPRINT_BYTES),
        "plan": take(fields, "p", bytes, size_max=PLAN_DIGEST_BYTES),
        "sent_at_ms": take(fields, "at", int),
    }


_READERS: dict[str, Callable[[dict[str, Any]], Message]] = {
    "records": _read_records,
    "summary": _read_summary,
    "probe": _read_probe,
    "answer": _read_answer,
}

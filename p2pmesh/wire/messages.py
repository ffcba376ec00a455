"""The messages of a gossip link.

Pure. A message is a canonical map whose `t` names its kind; unknown kinds are skipped and unknown
fields ignored, so that a newer peer can say more. Everything is bounded before it is believed.
Whole facts travel as bytes in here and are read by those who need them.
`PROTOCOL.md` beside this file describes every kind for other implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from p2pmesh.errors import PeerError
from p2pmesh.identity.keys import ID_BYTES, NodeId
from p2pmesh.wire.codec import decode, encode
from p2pmesh.wire.facts import FACT_KINDS, Fact, FactKind
from p2pmesh.wire.fields import as_map, take, take_bytes, take_exactly, take_list
from p2pmesh.wire.records import DIGEST_BYTES

MESSAGE_BYTES_MAX = 512 * 1024  # what a link's websocket accepts: the fullest message, twice over
RECORDS_BYTES_MAX = 256 * 1024  # of facts per message: probes behind it wait milliseconds
CHUNK_BYTES_MAX = 32 * 1024  # of facts that were asked for: repair goes in small steps
PIECES_MAX = 2048  # of each kind of fact in a message; the smallest records fill its bound first
RANGES_MAX = 1024  # per message; four times what two 16-way splits need
IDS_MAX = 2048  # in one list of items; somewhat more than a chunk of bytes
WANT_MAX = 256  # items asked for at once; the smallest records fill a chunk with fewer
RECENT_MAX = 32  # ids that ride on a probe: some 600 bytes
FINGERPRINT_BYTES = 16  # a sum of ids, as long as they are
PLAN_DIGEST_BYTES = 16
KIND_CHARS_MAX = 32  # of a name that nobody may know yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Facts, each exactly as it was signed.

    Attributes:
        asked: Whether this replies to a `FetchRequest` or `Own`, even with nothing to send.
    """

    statements: tuple[bytes, ...] = ()
    records: tuple[bytes, ...] = ()
    certificates: tuple[bytes, ...] = ()
    forks: tuple[bytes, ...] = ()
    asked: bool = False

    def of(self, kind: FactKind) -> tuple[bytes, ...]:
        """The facts of one kind."""
        pieces: tuple[bytes, ...] = getattr(self, kind.name)
        return pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sign:
    """A sign of life that says what its sender knows.

    Attributes:
        token: Of the probe, repeated in its answer.
        at_ms: The sender's own clock in milliseconds; mesh time is made of many of those.
        cutoff: Mesh time in seconds up to which `fingerprint` counts.
        fingerprint: Of all items that the sender holds and that were issued up to then.
        plan: Digest of the sender's plan; in no record, so it never feeds back into the plan.
        keep: Whether the sender wants this link to stay.
        recent: Ids of what the sender has learned in the last moments.
    """

    token: int
    at_ms: int
    cutoff: int
    fingerprint: bytes
    plan: bytes
    keep: bool
    recent: tuple[bytes, ...] = ()


class Ping(_Sign):
    """Are you there, and do we know the same?"""

    __slots__ = ()


class Ack(_Sign):
    """The reply to a probe."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """Probe `subject` on my behalf and tell me."""

    subject: NodeId
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """The result of a `ProbeRequest`.

    Attributes:
        alive: Whether the subject answered the sender within the time-out.
    """

    subject: NodeId
    token: int
    alive: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The items that the sender holds between two ids, as count and fingerprint.

    Attributes:
        lower: The first id that counts; any prefix of an id will do, and nothing means the start.
        upper: The first id that does not; nothing means no end.
        count: How many items.
        fingerprint: Of them.
    """

    lower: bytes
    upper: bytes
    count: int
    fingerprint: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """Compare these ranges with yours."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """All ids that the sender holds in a range; bounds as in `Range`.

    Attributes:
        answer: Whether the receiver should say in turn what it holds there.
    """

    lower: bytes
    upper: bytes
    ids: tuple[bytes, ...]
    answer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequest:
    """Send me these items, as many of the first ones as fit one chunk."""

    ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """Send me what you hold of my own records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """A message of a kind that this version does not know; it is skipped."""

    kind: str


Message = (
    Push | Ping | Ack | ProbeRequest | ProbeReport | Ranges | Items | FetchRequest | Own | Unknown
)


def encode_message(message: Message) -> bytes:
    """The bytes of a message.

    Raises:
        TypeError: `message` is of a kind that is never sent.
    """
    return encode(_to_wire(message))


def decode_message(data: bytes) -> Message:
    """The message behind bytes from a peer.

    Raises:
        PeerError: The bytes break the protocol; the link should be closed.
    """
    fields = as_map(decode(data, bytes_max=MESSAGE_BYTES_MAX), "a message")
    kind = take(fields, "t", str, size_max=KIND_CHARS_MAX)
    reader = _READERS.get(kind)
    return reader(fields) if reader else Unknown(kind=kind)


def gather(facts: Iterable[Fact], *, asked: bool = False) -> Push:
    """Return the message that holds `facts`, of whatever size."""
    pieces: dict[str, list[bytes]] = {}
    for fact in facts:
        pieces.setdefault(FACT_KINDS[type(fact)].name, []).append(fact.raw)
    return _facts(pieces, asked=asked)


def in_chunks(facts: Push) -> Iterator[Push]:
    """Pack facts into as few messages as the bound on their size allows.

    A piece that is larger than the bound goes alone. If somebody asked for them the messages are
    small, and there is at least one.
    """
    bytes_max = CHUNK_BYTES_MAX if facts.asked else RECORDS_BYTES_MAX
    batch: dict[str, list[bytes]] = {}
    size = count = sent = 0
    for kind in FACT_KINDS.values():
        for piece in facts.of(kind):
            if count and (size + len(piece) > bytes_max or count == PIECES_MAX):
                yield _facts(batch, asked=facts.asked)
                batch, size, count, sent = {}, 0, 0, sent + 1
            batch.setdefault(kind.name, []).append(piece)
            size, count = size + len(piece), count + 1
    if count or (facts.asked and not sent):
        yield _facts(batch, asked=facts.asked)


def _facts(pieces: dict[str, list[bytes]], *, asked: bool) -> Push:
    return Push(**{name: tuple(some) for name, some in pieces.items()}, asked=asked)


def _to_wire(message: Message) -> dict[str, Any]:
    match message:
        case Push():
            pieces = {kind.key: message.of(kind) for kind in FACT_KINDS.values()}
            return {"t": "facts", **pieces, "a": message.asked}
        case Ping() | Ack():
            return {
                "t": "probe" if isinstance(message, Ping) else "answer",
                "n": message.token,
                "at": message.at_ms,
                "c": message.cutoff,
                "f": message.fingerprint,
                "p": message.plan,
                "k": message.keep,
                "r": message.recent,
            }
        case ProbeRequest(subject=subject, token=token):
            return {"t": "ask", "s": subject, "n": token}
        case ProbeReport(subject=subject, token=token, alive=alive):
            return {"t": "told", "s": subject, "n": token, "a": alive}
        case Ranges(ranges=ranges):
            rows = [[one.lower, one.upper, one.count, one.fingerprint] for one in ranges]
            return {"t": "ranges", "r": rows}
        case Items(lower=lower, upper=upper, ids=ids, answer=answer):
            return {"t": "items", "l": lower, "u": upper, "i": ids, "a": answer}
        case FetchRequest(ids=ids):
            return {"t": "want", "i": ids}
        case Own():
            return {"t": "own"}
        case Unknown():
            raise TypeError("a message of an unknown kind is never sent")


def _read_facts(fields: dict[str, Any]) -> Message:
    pieces = {
        kind.name: take_bytes(fields, kind.key, count_max=PIECES_MAX, size_max=kind.bytes_max)
        for kind in FACT_KINDS.values()
    }
    return Push(**pieces, asked=take(fields, "a", bool))


def _sign_fields(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "token": take(fields, "n", int),
        "at_ms": take(fields, "at", int),
        "cutoff": take(fields, "c", int),
        "fingerprint": take_exactly(fields, "f", FINGERPRINT_BYTES),
        "plan": take_exactly(fields, "p", PLAN_DIGEST_BYTES),
        "keep": take(fields, "k", bool),
        "recent": _ids(fields, "r", RECENT_MAX),
    }


def _read_ask(fields: dict[str, Any]) -> Message:
    return ProbeRequest(
        subject=NodeId(take_exactly(fields, "s", ID_BYTES)), token=take(fields, "n", int)
    )


def _read_told(fields: dict[str, Any]) -> Message:
    subject = NodeId(take_exactly(fields, "s", ID_BYTES))
    return ProbeReport(subject=subject, token=take(fields, "n", int), alive=take(fields, "a", bool))


def _read_ranges(fields: dict[str, Any]) -> Message:
    return Ranges(ranges=tuple(map(_range, take_list(fields, "r", list, size_max=RANGES_MAX))))


def _range(row: list[Any]) -> Range:
    match row:
        case [bytes(lower), bytes(upper), int(count), bytes(fingerprint)] if (
            type(count) is int and count >= 0 and len(fingerprint) == FINGERPRINT_BYTES
        ):
            _check_bounds(lower, upper)
            return Range(lower=lower, upper=upper, count=count, fingerprint=fingerprint)
    raise PeerError("a range of an unknown form")


def _read_items(fields: dict[str, Any]) -> Message:
    lower, upper = (take(fields, name, bytes, size_max=DIGEST_BYTES) for name in "lu")
    _check_bounds(lower, upper)
    ids = _ids(fields, "i", IDS_MAX)
    return Items(lower=lower, upper=upper, ids=ids, answer=take(fields, "a", bool))


def _check_bounds(lower: bytes, upper: bytes) -> None:
    if max(len(lower), len(upper)) > DIGEST_BYTES or (upper and lower >= upper):
        raise PeerError("a range whose bounds are none")


def _ids(fields: dict[str, Any], name: str, count_max: int) -> tuple[bytes, ...]:
    size = DIGEST_BYTES
    return take_bytes(fields, name, count_max=count_max, size_max=size, size_min=size)


_READERS: dict[str, Callable[[dict[str, Any]], Message]] = {
    "facts": _read_facts,
    "probe": lambda fields: Ping(**_sign_fields(fields)),
    "answer": lambda fields: Ack(**_sign_fields(fields)),
    "ask": _read_ask,
    "told": _read_told,
    "ranges": _read_ranges,
    "items": _read_items,
    "want": lambda fields: FetchRequest(ids=_ids(fields, "i", WANT_MAX)),
    "own": lambda _fields: Own(),
}

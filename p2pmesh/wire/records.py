"""Records: signed whole values of one register of one owner.

Pure. On the wire a record is `signature (64) ‖ public key (32) ‖ signed`, where `signed` is the
canonical list [tag, mesh, owner, register, epoch, seq, instance, issued_at, ttl, body]. The exact
bytes are kept and forwarded, never encoded again. Of two records of one register the one with
the larger (epoch, seq, digest) stands, on every node alike, whatever order they arrive in.

Most records that arrive are known already, so there are three depths of reading: `peek` finds
owner, register and version at fixed places in the bytes (a microsecond, believed only as far as
dropping what is old), `parse` decodes and checks all of the form (ten), `verify_record` checks the
signature (a hundred).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from p2pmesh.errors import PeerError
from p2pmesh.identity.credentials import Credential, read_credential
from p2pmesh.identity.keys import (
    ID_BYTES,
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    MeshId,
    NodeId,
    SigningKey,
    key_id,
    verify,
)
from p2pmesh.wire.codec import decode, encode
from p2pmesh.wire.registers import register_of

TAG = "p2pmesh record 1"
RECORD_BYTES_MAX = 16 * 1024  # what does not fit is split into numbered pages
CREDENTIAL = "credential"  # in the bodies of records that stand by themselves: their owner's
REGISTER = re.compile(r"[a-z]{1,16}(/(0|[1-9][0-9]?))?", re.ASCII)
DIGEST_BYTES = 16  # collisions could only be made by owners, of their own records
_SIGNED_FROM = SIGNATURE_BYTES + PUBLIC_KEY_BYTES
_FORM = (str, bytes, bytes, str, int, int, int, int, int, dict)

# Where canonical msgpack puts the fields that `peek` reads.
_BYTES_16 = b"\xc4\x10"
_HEAD = bytes([0x90 + len(_FORM), 0xA0 + len(TAG)]) + TAG.encode() + _BYTES_16
_OWNER_HEAD_AT = _SIGNED_FROM + len(_HEAD) + ID_BYTES
_OWNER_AT = _OWNER_HEAD_AT + len(_BYTES_16)
_REGISTER_AT = _OWNER_AT + ID_BYTES
_UINT_BYTES = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record as parsed; `verify_record` says whether its owner really signed it.

    Attributes:
        raw: The exact bytes on the wire.
        mesh: The mesh that it is for; a record of another mesh means nothing here.
        owner: The node that wrote it.
        register: Which of the owner's values it is, like `member` or `models/0`.
        epoch: Grows with each start of the owner; a higher one voids all older registers.
        seq: Grows with each version within an epoch.
        instance: Random per start; two at once mean that a key is used twice.
        issued_at: Mesh time in seconds.
        ttl_s: After issued_at + ttl_s the record is void everywhere.
        body: The value.
        digest: BLAKE2b-16 of the signed part.
    """

    raw: bytes
    mesh: MeshId
    owner: NodeId
    register: str
    epoch: int
    seq: int
    instance: int
    issued_at: int
    ttl_s: int
    body: dict[str, Any]
    digest: bytes

    @property
    def id(self) -> bytes:
        """The digest, which names the record among the facts."""
        return self.digest

    @property
    def signed(self) -> tuple[Record, ...]:
        """The record alone."""
        return (self,)

    @property
    def key(self) -> tuple[NodeId, str]:
        """Return the owner and register of the record."""
        return self.owner, self.register

    @property
    def version(self) -> tuple[int, int, bytes]:
        """The total order in which the largest stands."""
        return self.epoch, self.seq, self.digest

    @property
    def expires_at(self) -> int:
        """Mesh time in seconds after which it is void."""
        return self.issued_at + self.ttl_s


class Head(NamedTuple):
    """The claims at the beginning of a record."""

    owner: NodeId
    register: str
    epoch: int
    seq: int


def seal(
    key: SigningKey,
    *,
    mesh: MeshId,
    register: str,
    epoch: int,
    seq: int,
    instance: int,
    issued_at: int,
    ttl_s: int,
    body: dict[str, Any],
) -> Record:
    """Sign one version of one of the key's own registers.

    Raises:
        ValueError: The record would break a bound that every receiver checks: our own bug.
    """
    signed = encode([TAG, mesh, key.id, register, epoch, seq, instance, issued_at, ttl_s, body])
    raw = key.sign(signed) + key.public + signed
    try:
        return parse(raw)
    except PeerError as exc:
        raise ValueError(f"register {register!r}: {exc}") from exc


def peek(raw: bytes) -> Head | None:
    """Return the key and version of a record without decoding it; only a hint.

    Whatever `parse` accepts has exactly this head. Of other bytes it says something or nothing.
    """
    if not raw.startswith(_HEAD, _SIGNED_FROM) or raw[_OWNER_HEAD_AT:_OWNER_AT] != _BYTES_16:
        return None
    try:
        epoch_at = _REGISTER_AT + 1 + (raw[_REGISTER_AT] ^ 0xA0)  # a register is short text
        register = raw[_REGISTER_AT + 1 : epoch_at].decode()
        epoch, seq_at = _peek_uint(raw, epoch_at)
        seq, _ = _peek_uint(raw, seq_at)
    except (IndexError, KeyError, UnicodeDecodeError):
        return None
    return Head(NodeId(raw[_OWNER_AT:_REGISTER_AT]), register, epoch, seq)


def digest_of(raw: bytes) -> bytes:
    """The digest of a record's signed part: its id, whatever stands in front of it."""
    return blake2b(raw[_SIGNED_FROM:], digest_size=DIGEST_BYTES).digest()


def parse(raw: bytes) -> Record:
    """Decode a record and check its form and bounds, but not yet its signature.

    Checking the signature takes fifty times longer than all of this, so callers first ask
    whether the version is news at all.

    Raises:
        PeerError: The bytes are not a record.
    """
    signed = raw[_SIGNED_FROM:]
    value = decode(signed, bytes_max=RECORD_BYTES_MAX - _SIGNED_FROM)
    if type(value) is not list or tuple(map(type, value)) != _FORM:
        raise PeerError("a record of an unknown form")
    tag, mesh, owner, register, epoch, seq, instance, issued_at, ttl_s, body = value
    if tag != TAG or len(mesh) != ID_BYTES or len(owner) != ID_BYTES:
        raise PeerError("a record of an unknown form")
    if not REGISTER.fullmatch(register):
        raise PeerError("a record with a register name that is not allowed")
    if min(epoch, seq, instance, issued_at, ttl_s) < 0 or ttl_s > register_of(register).ttl_s_max:
        raise PeerError("a record with a number out of bounds")
    if key_id(raw[SIGNATURE_BYTES:_SIGNED_FROM]) != owner:
        raise PeerError("a record whose key is not its owner's")
    return Record(
        raw=raw,
        mesh=MeshId(mesh),
        owner=NodeId(owner),
        register=register,
        epoch=epoch,
        seq=seq,
        instance=instance,
        issued_at=issued_at,
        ttl_s=ttl_s,
        body=body,
        digest=digest_of(raw),
    )


def verify_record(record: Record) -> bool:
    """Whether the owner's key signed exactly these bytes."""
    raw = record.raw
    return verify(raw[SIGNATURE_BYTES:_SIGNED_FROM], raw[:SIGNATURE_BYTES], raw[_SIGNED_FROM:])


def credential_of(record: Record) -> Credential | None:
    """Return the credential that a record carries for its owner; None without one that reads.

    Its signatures are not checked here.
    """
    raw = record.body.get(CREDENTIAL)
    if type(raw) is not bytes:
        return None
    try:
        found = read_credential(raw)
    except PeerError:
        return None
    return found if (found.node, found.mesh) == (record.owner, record.mesh) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordCheck:
    """How records are read and their signatures checked.

    All answers depend on the bytes alone: a simulation of many nodes may remember them.
    """

    peek: Callable[[bytes], Head | None] = peek
    digest: Callable[[bytes], bytes] = digest_of
    parse: Callable[[bytes], Record] = parse
    verify: Callable[[Record], bool] = verify_record


def _peek_uint(raw: bytes, at: int) -> tuple[int, int]:
    first = raw[at]
    if first < 0x80:
        return first, at + 1
    end = at + 1 + _UINT_BYTES[first]
    return int.from_bytes(raw[at + 1 : end], "big"), end

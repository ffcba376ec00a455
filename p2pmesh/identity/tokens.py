"""Invitation tokens: what a person sends to another to let their machine in.

Pure. A token is `p2pmesh1-` and base32 of

    version (1) ‖ mesh id (16) ‖ seed (16) ‖ count (1) ‖ addresses ‖ checksum (4)

The private key of the invitation follows from the seed, and everybody in the mesh knows its public
key. The newcomer proves that it has the key by a signature over its own node's key and a digest of
the very connection on which it asks, so the token itself is never sent, and what is recorded is
worth nothing on any other connection or for any other node.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from hashlib import blake2b

from p2pmesh.config import Address, parse_address
from p2pmesh.errors import ConfigError
from p2pmesh.identity.keys import ID_BYTES, SEED_BYTES, MeshId, SigningKey, verify
from p2pmesh.identity.recovery import RECOVERY_PREFIX
from p2pmesh.identity.spelling import read_spelling, spell
from p2pmesh.wire.codec import encode

PREFIX = "p2pmesh1-"
VERSION = 1
TOKEN_SEED_BYTES = 16
ADDRESSES_MAX = 2  # of the node that invites; each makes the token 11 characters longer
TOKEN_CHARS_MAX = 1024  # two of the longest host names, base32
_PROOF_TAG = "p2pmesh invitation 1"
_V4, _V6, _NAME = 4, 6, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """An invitation as it is handed on.

    Attributes:
        mesh: The mesh that it leads into.
        seed: The secret.
        addresses: Where members of it were when the token was made.
    """

    mesh: MeshId
    seed: bytes
    addresses: tuple[Address, ...]

    @property
    def key(self) -> SigningKey:
        """Return the private key of the invitation."""
        seed = blake2b(self.seed, digest_size=SEED_BYTES, person=b"p2pmesh invite")
        return SigningKey(seed.digest())

    def __str__(self) -> str:
        shown = b"".join(map(_pack, self.addresses[:ADDRESSES_MAX]))
        count = bytes([VERSION]), bytes([min(len(self.addresses), ADDRESSES_MAX)])
        body = count[0] + self.mesh + self.seed + count[1] + shown
        return PREFIX + spell(body)


def is_token(text: str) -> bool:
    """Whether `text` is meant to be a token."""
    return text.strip().lower().startswith("p2pmesh")


def parse_token(text: str) -> Token:
    """Read a token, however it was broken into lines or spelt.

    Raises:
        ConfigError: It is cut short, misspelt, or of another version.
    """
    plain = "".join(text.split()).lower()
    if plain.startswith(RECOVERY_PREFIX):
        raise ConfigError("this is a recovery code, no invitation: p2pmesh recover, on a member")
    if not plain.startswith(PREFIX):
        raise ConfigError(
            f"this invitation is of another version of p2pmesh: it should begin with {PREFIX}"
        )
    if len(plain) > TOKEN_CHARS_MAX:
        raise ConfigError("this invitation is too long to be one; copy it again")
    try:
        return _read(read_spelling(plain.removeprefix(PREFIX)))
    except (ValueError, IndexError) as exc:
        raise ConfigError(
            "this invitation is incomplete or misspelt; copy the whole of it again"
        ) from exc


def prove(token: Token, *, node: bytes, binding: bytes) -> bytes:
    """Sign with the key of an invitation that `node` asks on the connection of `binding`.

    Args:
        token: The invitation.
        node: The public key of the node that asks.
        binding: See `identity.hello.Peer`.
    """
    return token.key.sign(_claim(token.mesh, node, binding))


def is_proof(key: bytes, proof: bytes, *, mesh: MeshId, node: bytes, binding: bytes) -> bool:
    """Whether `prove` made `proof` with the invitation whose public key is `key`."""
    return verify(key, proof, _claim(mesh, node, binding))


def _claim(mesh: MeshId, node: bytes, binding: bytes) -> bytes:
    return encode([_PROOF_TAG, mesh, node, binding])


def _pack(address: Address) -> bytes:
    port = address.port.to_bytes(2, "big")
    try:
        ip = ipaddress.ip_address(address.host)
    except ValueError:
        name = address.host.encode("ascii")
        return bytes([_NAME, len(name)]) + name + port
    return bytes([ip.version]) + ip.packed + port


def _read(body: bytes) -> Token:
    if body[0] != VERSION:
        raise ValueError("version")
    seed_at, count_at = 1 + ID_BYTES, 1 + ID_BYTES + TOKEN_SEED_BYTES
    count, at = body[count_at], count_at + 1
    addresses = []
    for _ in range(count):
        kind, at = body[at], at + 1
        if kind == _NAME:
            size, at = body[at], at + 1
        else:
            size = {_V4: 4, _V6: 16}[kind] if kind in (_V4, _V6) else -1
        if size < 0 or at + size + 2 > len(body) or body[at + size : at + size + 2] == bytes(2):
            raise ValueError("address")
        host = body[at : at + size]
        name = host.decode("ascii") if kind == _NAME else str(ipaddress.ip_address(host))
        port = int.from_bytes(body[at + size : at + size + 2], "big")
        addresses.append(parse_address(f"[{name}]:{port}" if ":" in name else f"{name}:{port}"))
        at += size + 2
    if at != len(body) or not 0 < count <= ADDRESSES_MAX:
        raise ValueError("length")
    return Token(
        mesh=MeshId(body[1:seed_at]), seed=body[seed_at:count_at], addresses=tuple(addresses)
    )

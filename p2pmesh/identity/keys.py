"""Ed25519 keys and the ids made from them.

Pure: no files, no clock, no randomness of its own. An id is the BLAKE2b-16 digest of the public
key, so that anybody who holds the key can check the id and ids stay short on the wire.
"""

from __future__ import annotations

import base64
import binascii
from hashlib import blake2b
from typing import NewType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2pmesh.errors import ConfigError

NodeId = NewType("NodeId", bytes)
MeshId = NewType("MeshId", bytes)

ID_BYTES = 16
PUBLIC_KEY_BYTES = 32
SEED_BYTES = 32
SIGNATURE_BYTES = 64


class SigningKey:
    """An Ed25519 private key with its public key and id at hand.

    Args:
        seed: The 32 secret bytes; equal seeds make equal keys.
    """

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public: bytes = self._key.public_key().public_bytes_raw()
        self.id: bytes = key_id(self.public)

    def sign(self, message: bytes) -> bytes:
        """The 64 byte signature of `message` (deterministic, RFC 8032)."""
        return self._key.sign(message)


def key_id(public: bytes) -> bytes:
    """BLAKE2b-16 of a public key: a `NodeId` for a node's key, a `MeshId` for a mesh's."""
    return blake2b(public, digest_size=ID_BYTES).digest()


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` over `message` was made with the key behind `public`."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def show_id(value: bytes) -> str:
    """An id as people see it: 26 characters of lower-case base32, without padding."""
    return base64.b32encode(value).decode("ascii").rstrip("=").lower()


def parse_id(text: str) -> bytes:
    """The id that `show_id` showed.

    Raises:
        ConfigError: `text` is not a whole id.
    """
    padded = text.strip().upper() + "=" * (-len(text.strip()) % 8)
    try:
        value = base64.b32decode(padded)
    except (binascii.Error, ValueError) as exc:
        raise ConfigError(f"{text!r} is not an id: an id has 26 letters and digits") from exc
    if len(value) != ID_BYTES or show_id(value) != text.strip().lower():
        raise ConfigError(f"{text!r} is not an id: an id has 26 letters and digits")
    return value

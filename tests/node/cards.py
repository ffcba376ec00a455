"""Meshes as a node remembers them, for tests."""

from __future__ import annotations

from p2pmesh.identity.credentials import Credential, found
from p2pmesh.identity.keys import SigningKey
from p2pmesh.node.keystore import MeshInfo
from tests.identity.builders import FOUNDED_AT, FOUNDERS


def card_of(credential: Credential = FOUNDERS, name: str = "quiet-otter") -> MeshInfo:
    """A mesh in which a node has that credential."""
    return MeshInfo(
        id=credential.mesh,
        name=name,
        founded_at=int(FOUNDED_AT),
        credential=credential,
        joined_at=int(FOUNDED_AT),
    )


def founded(key: SigningKey, *, mesh: bytes = b"a", name: str = "quiet-lynx") -> MeshInfo:
    """Another mesh that the node with that key founded."""
    return card_of(found(SigningKey(mesh * 32), key.public, FOUNDED_AT), name)

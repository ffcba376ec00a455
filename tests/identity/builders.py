"""A mesh whose key is known, and credentials in it, for tests."""

from __future__ import annotations

from p2pmesh.identity.credentials import Basis, Credential, Role, found, issue
from p2pmesh.identity.keys import MeshId, SigningKey

MESH_KEY = SigningKey(b"m" * 32)
MESH = MeshId(MESH_KEY.id)
FOUNDER = SigningKey(b"F" * 32)
FOUNDED_AT = 1_000.0  # long before anything that a test says happens
FOUNDERS = found(MESH_KEY, FOUNDER.public, FOUNDED_AT)
FOREVER_S = 90 * 365 * 86400


def credential(
    key: SigningKey,
    role: Role = Role.SERVE,
    *,
    stage: bool = False,
    signer: SigningKey = FOUNDER,
    own: Credential = FOUNDERS,
    now: float = FOUNDED_AT,
    ttl_s: int = FOREVER_S,
    basis: Basis = "grant",
    via: bytes = b"",
) -> Credential:
    """A credential of the founder's, or of another member's, for `key`."""
    return issue(
        own, signer, key.public,
        role=role, stage=stage, basis=basis, now=now, ttl_s=ttl_s, via=via,
    )  # fmt: skip

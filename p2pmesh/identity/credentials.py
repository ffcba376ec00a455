"""Credentials: chains of signed delegations from the key of a mesh to the key of a node.

Pure. Each delegation names its holder, a role, rights and an end, and is signed by the holder of
the one before it, the first by the mesh's own key. So anybody can check offline what a node may do
in a mesh, and no delegation gives more than its signer has. (The idea is SPKI's, RFC 2693.)

    credential = [public key of the mesh, [delegation, …]]
    delegation = signature (64) ‖ [tag, mesh, holder, role, rights, issued_at, expires_at, basis,
                                   via]

Whether a credential was revoked is not known here: see `state/trust.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from hashlib import blake2b
from typing import Literal, cast, get_args

from p2pmesh.errors import PeerError
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

TAG = "p2pmesh delegation 1"
CHAIN_MAX = 4  # delegations; each is a signature to check and 180 bytes in every lease
CREDENTIAL_BYTES_MAX = 2048  # twice what a chain of that length takes today
RIGHTS_MAX = 16  # rights in one delegation; there is one today
KEPT = 4096  # credentials that were read and checked before: as many as four large meshes have
DAY_S = 86400
LAN_TTL_S = 30 * DAY_S  # who came in without a token is let in anew more often
TTL_S = 90 * DAY_S
FOUNDER_TTL_S = 100 * 365 * DAY_S  # nobody stands above the founder who could renew it
EARLY_S_MAX = 60  # clocks differ by at most that much, or are told so in the hello
RENEW_SHARE = 0.5  # of its life, after which a credential is renewed

STAGE = "stage"  # the right to run stages of pipelines: whoever has it may run code there

Basis = Literal["founder", "invite", "lan", "grant", "recovery"]


class Role(IntEnum):
    """What a node may do in its mesh; each role includes those below it."""

    USE = 1  # send requests
    SERVE = 2  # take part in the gossip and run models
    INVITE = 3  # issue invitations
    ADMIN = 4  # revoke, grant, open and close the mesh

    @property
    def word(self) -> str:
        """The name of the role, on the wire and to people."""
        return self.name.lower()


ROLES = {role.word: role for role in Role}


class CredentialError(PeerError):
    """A credential that does not say what it should; the sentence says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """One signed statement of a chain.

    Attributes:
        signer: The public key that signed it.
        holder: The public key that it is for.
        stage: Whether the right `stage` comes with it.
        issued_at: Unix time in seconds by the signer's clock.
        expires_at: Likewise; void from then on.
        basis: How the holder came in.
        via: The id of the invitation; empty for every other basis.
        raw: The bytes on the wire.
        id: BLAKE2b-16 of the signed part.
        node: The id of the holder.
    """

    signer: bytes
    holder: bytes
    role: Role
    stage: bool
    issued_at: int
    expires_at: int
    basis: Basis
    via: bytes
    raw: bytes
    id: bytes
    node: NodeId

    @property
    def issuer(self) -> NodeId:
        """Return the id of the signer: of a node, or of the mesh itself."""
        return NodeId(key_id(self.signer))


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A chain whose form and rights are in order; `is_signed` checks its signatures.

    Attributes:
        mesh_key: The public key of the mesh.
        chain: From the mesh to the holder, 1 to `CHAIN_MAX` delegations.
        raw: The bytes on the wire.
        begins_at: Unix time in seconds at which the last delegation of the chain was made.
        expires_at: Likewise, at which the first of them ends.
        mesh: The id of the mesh.
    """

    mesh_key: bytes
    chain: tuple[Delegation, ...]
    raw: bytes
    begins_at: int
    expires_at: int
    mesh: MeshId

    @property
    def last(self) -> Delegation:
        """Return the delegation to the holder."""
        return self.chain[-1]

    @property
    def node(self) -> NodeId:
        """Return the id of the holder."""
        return self.last.node

    @property
    def role(self) -> Role:
        """Return the holder's role."""
        return self.last.role

    @property
    def stage(self) -> bool:
        """Whether the holder may run stages on machines of others."""
        return self.last.stage

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Return the order in which of two credentials of one node the larger is worth more."""
        return self.role, self.stage, self.expires_at

    def renews_at(self) -> int:
        """Return the unix time in seconds from which on it should be renewed."""
        issued_at = self.last.issued_at
        return issued_at + int((self.expires_at - issued_at) * RENEW_SHARE)


def found(
    mesh: SigningKey, holder: bytes, now: float, basis: Literal["founder", "recovery"] = "founder"
) -> Credential:
    """Make the credential of a node that founds a mesh or recovers it; the mesh's key signs it."""
    return _signed(
        mesh,
        MeshId(mesh.id),
        mesh.public,
        (),
        holder=holder,
        role=Role.ADMIN,
        stage=True,
        issued_at=int(now),
        expires_at=int(now) + FOUNDER_TTL_S,
        basis=basis,
        via=b"",
    )


def issue(
    own: Credential,
    key: SigningKey,
    holder: bytes,
    *,
    role: Role,
    stage: bool,
    basis: Basis,
    now: float,
    ttl_s: int,
    via: bytes = b"",
) -> Credential:
    """Make a credential for `holder` that rests on `own`, the credential of `key`.

    It lasts `ttl_s` seconds, and no longer than the chain that it rests on.

    Raises:
        CredentialError: `own` does not allow it.
    """
    return _signed(
        key,
        own.mesh,
        own.mesh_key,
        own.chain,
        holder=holder,
        role=role,
        stage=stage,
        issued_at=int(now),
        expires_at=min(int(now) + ttl_s, own.expires_at),
        basis=basis,
        via=via,
    )


def may_issue(own: Credential, *, role: Role, stage: bool, basis: Basis) -> bool:
    """Whether the holder of `own` may give such a delegation to somebody."""
    return len(own.chain) < CHAIN_MAX and not _excess(own.last, role, stage, basis)


def read_credential(raw: bytes) -> Credential:
    """Decode a credential and check its form and rights, but not yet its signatures.

    Raises:
        CredentialError: The bytes are no credential, or a delegation gives what it may not give.
        PeerError: The bytes are no canonical value.
    """
    if len(raw) > CREDENTIAL_BYTES_MAX:
        raise CredentialError("a credential that is too long")
    return _read(raw)


def is_signed(credential: Credential) -> bool:
    """Whether all signatures of a credential are right."""
    return _is_signed(credential.raw)


@lru_cache(maxsize=KEPT)
def _read(raw: bytes) -> Credential:
    match decode(raw, bytes_max=CREDENTIAL_BYTES_MAX):
        case [bytes(mesh_key), [*raws]] if (
            len(mesh_key) == PUBLIC_KEY_BYTES and 0 < len(raws) <= CHAIN_MAX
        ):
            return _chain(raw, mesh_key, raws)
        case _:
            raise CredentialError("a credential of an unknown form")


@lru_cache(maxsize=KEPT)
def _is_signed(raw: bytes) -> bool:
    # From the mesh downwards: what an outsider made up fails at the first signature.
    return all(
        verify(one.signer, one.raw[:SIGNATURE_BYTES], one.raw[SIGNATURE_BYTES:])
        for one in _read(raw).chain
    )


def _signed(
    key: SigningKey,
    mesh: MeshId,
    mesh_key: bytes,
    chain: Sequence[Delegation],
    *,
    holder: bytes,
    role: Role,
    stage: bool,
    issued_at: int,
    expires_at: int,
    basis: Basis,
    via: bytes,
) -> Credential:
    rights = [STAGE] if stage else []
    signed = encode([TAG, mesh, holder, role.word, rights, issued_at, expires_at, basis, via])
    raws = [*(one.raw for one in chain), key.sign(signed) + signed]
    return read_credential(encode([mesh_key, raws]))


def _chain(raw: bytes, mesh_key: bytes, raws: Sequence[object]) -> Credential:
    chain: list[Delegation] = []
    mesh = key_id(mesh_key)
    for one in raws:
        delegation = _delegation(one, mesh, chain[-1].holder if chain else mesh_key)
        if chain:
            role, stage, basis = delegation.role, delegation.stage, delegation.basis
            if excess := _excess(chain[-1], role, stage, basis):
                raise CredentialError(excess)
            life_s = delegation.expires_at - delegation.issued_at
            if chain[-1].role < Role.INVITE and life_s > LAN_TTL_S:
                # It may be backdated to when the mesh was open, and ends soon after that.
                raise CredentialError("a credential that lasts longer than its signer may give")
        chain.append(delegation)
    if len({mesh_key, *(one.holder for one in chain)}) <= len(chain):
        raise CredentialError("a credential whose chain comes back to one of its keys")
    return Credential(
        mesh_key=mesh_key,
        chain=tuple(chain),
        raw=raw,
        begins_at=max(one.issued_at for one in chain),
        expires_at=min(one.expires_at for one in chain),
        mesh=MeshId(mesh),
    )


def _delegation(raw: object, mesh: bytes, signer: bytes) -> Delegation:
    if type(raw) is not bytes:
        raise CredentialError("a credential of an unknown form")
    signed = raw[SIGNATURE_BYTES:]
    match decode(signed, bytes_max=CREDENTIAL_BYTES_MAX):
        case [
            str(tag), bytes(of), bytes(holder), str(role), [*rights],
            int(issued_at), int(expires_at), str(basis), bytes(via),
        ] if (
            tag == TAG
            and len(holder) == PUBLIC_KEY_BYTES
            and type(issued_at) is type(expires_at) is int
            and role in ROLES
            and len(rights) <= RIGHTS_MAX
            and all(type(right) is str for right in rights)
            and basis in get_args(Basis)
            and len(via) == (ID_BYTES if basis == "invite" else 0)
        ):  # fmt: skip
            if of != mesh:
                raise CredentialError("a credential of another mesh")
            if not 0 <= issued_at <= expires_at:
                raise CredentialError("a credential that ends before it begins")
            return Delegation(
                signer=signer,
                holder=holder,
                role=ROLES[role],
                stage=STAGE in rights,
                issued_at=issued_at,
                expires_at=expires_at,
                basis=cast("Basis", basis),
                via=via,
                raw=raw,
                id=blake2b(signed, digest_size=ID_BYTES).digest(),
                node=NodeId(key_id(holder)),
            )
        case _:
            raise CredentialError("a credential of an unknown form")


def _excess(signer: Delegation, role: Role, stage: bool, basis: Basis) -> str:  # noqa: FBT001
    """Say in what a delegation goes beyond its signer's own; "" when it does not."""
    if basis in ("founder", "recovery"):
        return "a credential in which another key than the mesh's founds or recovers it"
    if role > signer.role or (stage and not signer.stage):
        return "a credential that gives more than its signer has"
    if signer.role >= Role.INVITE:
        return ""
    # Any member of an open mesh lets in those of its own network: they may serve, and no more.
    if signer.role is Role.SERVE and basis == "lan" and not stage:
        return ""
    return "a credential whose signer may not let anybody in"

"""Statements of trust: what members with the right to it lay down for the whole mesh.

Pure. A statement is one fact, `signature (64) ‖ public key (32) ‖ signed`, where `signed` is the
canonical list [tag, mesh, kind, issued_at, body, credential]. It carries the credential of its
signer, so that anybody can check it long after the signer has gone; the credential is empty where
the mesh's own key signed. There are four kinds:

    policy      whether the mesh is open, and its name; the largest number stands
    invitation  somebody who proves to have its key may become a member
    revocation  what a node or an invitation was given is void from now on
    grant       a credential for a node that is a member already
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NoReturn

from p2pmesh.errors import PeerError
from p2pmesh.identity.credentials import (
    CREDENTIAL_BYTES_MAX,
    EARLY_S_MAX,
    ROLES,
    Credential,
    Role,
    is_signed,
    read_credential,
)
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
from p2pmesh.wire.fields import as_map, take, take_bytes, take_exactly
from p2pmesh.wire.text import plain_text

TAG = "p2pmesh statement 1"
STATEMENT_BYTES_MAX = 8192  # a revocation that keeps as many as it may, twice over
STATEMENT_SIGNATURES_MAX = 10  # its own, those of its signer's chain and of a granted one
KEEPS_MAX = 192  # ids in a revocation: a node lets in 64 an hour at most
POLICY_NUMBER_MAX = 1 << 32  # of two with that number the newer stands
USES_MAX = 1024  # of one invitation; 0 stands for no limit
MESH_NAME_CHARS_MAX = 64
POLICY, INVITATION, REVOCATION, GRANT = "policy", "invitation", "revocation", "grant"
_OFFER_TAG = "p2pmesh offer 1"
_SIGNED_FROM = SIGNATURE_BYTES + PUBLIC_KEY_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The rules of the mesh as of one version.

    Attributes:
        number: Of two policies the larger number stands.
        open: Whether who is on the network of a member may join without a token.
        name: What people call the mesh.
        founded_at: Unix time in seconds.
    """

    number: int
    open: bool
    name: str
    founded_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """An offer of membership to whoever has the private key of it.

    Attributes:
        key: Its public key.
        role: What the newcomer becomes.
        stage: Whether the right `stage` comes with it.
        until: Unix time in seconds at which it ends.
        uses: How many may come in with it; 0: no limit.
        proof: A signature with its private key for the signer of the statement, see `offer_proof`:
            anybody can read the key, and nobody else can lay the invitation down as its own.
    """

    key: bytes
    role: Role
    stage: bool
    until: int
    uses: int
    proof: bytes = field(default=b"", compare=False)

    @property
    def id(self) -> bytes:
        """Return the id of the invitation."""
        return key_id(self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """The end of what a node, or an invitation, was given.

    Attributes:
        target: The id of the node or of the invitation.
        keeps: Ids of delegations and statements that the target signed and that stay good.
    """

    target: bytes
    keeps: frozenset[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A credential for a node, which takes it up when it hears of it."""

    credential: Credential


Body = Policy | Invitation | Revocation | Grant


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A statement as parsed; `verify_statement` says whether its signatures are right.

    Attributes:
        raw: The bytes on the wire.
        id: BLAKE2b-16 of the signed part.
        mesh: The mesh that it is for.
        owner: The id of its signer: a node's, or the mesh's own.
        issued_at: Unix time in seconds.
        credential: The signer's, None where the mesh's own key signed.
        body: What it says.
    """

    raw: bytes
    id: bytes
    mesh: MeshId
    owner: NodeId
    issued_at: int
    credential: Credential | None
    body: Body

    @property
    def epoch(self) -> int:
        """0: statements outlive the epochs of their signers."""
        return 0

    @property
    def is_admins(self) -> bool:
        """Whether an admin made it, or the mesh's own key."""
        return self.credential is None or self.credential.role is Role.ADMIN


def state(
    key: SigningKey, own: Credential | None, body: Body, *, mesh: MeshId, now: float
) -> Statement:
    """Sign a statement.

    Args:
        key: A node's, or with `own` None the mesh's.
        own: The signer's credential.
        body: What it says.
        mesh: The mesh that it is for.
        now: Mesh time in seconds.

    Raises:
        PeerError: `own` does not allow it.
    """
    kind, fields = _to_wire(body)
    credential = own.raw if own else b""
    signed = encode([TAG, mesh, kind, int(now), fields, credential])
    return parse_statement(key.sign(signed) + key.public + signed)


def parse_statement(raw: bytes) -> Statement:
    """Decode a statement; check its form and whether its signer may make it, not its signatures.

    Raises:
        PeerError: The bytes are no statement, or its signer has no right to it.
    """
    signed, public = raw[_SIGNED_FROM:], raw[SIGNATURE_BYTES:_SIGNED_FROM]
    match decode(signed, bytes_max=STATEMENT_BYTES_MAX - _SIGNED_FROM):
        case [str(tag), bytes(mesh), str(kind), int(issued_at), fields, bytes(chain)] if (
            tag == TAG and len(mesh) == ID_BYTES and type(issued_at) is int and issued_at >= 0
        ):
            owner = NodeId(key_id(public))
            own = read_credential(chain) if chain else None
            statement = Statement(
                raw=raw,
                id=blake2b(signed, digest_size=ID_BYTES).digest(),
                mesh=MeshId(mesh),
                owner=owner,
                issued_at=issued_at,
                credential=own,
                body=_from_wire(kind, as_map(fields, "the body of a statement")),
            )
        case _:
            _refuse("a statement of an unknown form")
    _check_right(statement)
    return statement


def verify_statement(statement: Statement) -> bool:
    """Whether all signatures in a statement are right."""
    raw, body = statement.raw, statement.body
    return (
        verify(raw[SIGNATURE_BYTES:_SIGNED_FROM], raw[:SIGNATURE_BYTES], raw[_SIGNED_FROM:])
        and (statement.credential is None or is_signed(statement.credential))
        and (not isinstance(body, Grant) or is_signed(body.credential))
        and (
            not isinstance(body, Invitation)
            or verify(body.key, body.proof, _offer(statement.mesh, statement.owner))
        )
    )


def offer_proof(key: SigningKey, *, mesh: MeshId, owner: NodeId) -> bytes:
    """Sign with the key of an invitation that `owner` lays it down."""
    return key.sign(_offer(mesh, owner))


def _offer(mesh: MeshId, owner: NodeId) -> bytes:
    return encode([_OFFER_TAG, mesh, owner])


def _check_right(statement: Statement) -> None:
    own, body = statement.credential, statement.body
    if own is None:
        # The mesh's own key is there for the founding alone.
        if bytes(statement.owner) != statement.mesh or not isinstance(body, Policy):
            _refuse("a statement without the credential of its signer")
        return
    if own.node != statement.owner or own.mesh != statement.mesh:
        _refuse("a statement with a credential of somebody else")
    if statement.issued_at >= own.expires_at:
        _refuse("a statement whose signer's credential had run out")
    if own.role < Role.INVITE:
        _refuse("a statement of a member who may not make any")
    match body:
        case Policy() if own.role is not Role.ADMIN:
            _refuse("a policy that no admin made")
        case Policy(founded_at=founded_at) if founded_at > statement.issued_at + EARLY_S_MAX:
            _refuse("a policy of a mesh that is not founded yet")
        case Invitation(role=role, stage=stage) if role > own.role or (stage and not own.stage):
            _refuse("an invitation that gives more than its signer has")
        case Invitation(until=until) if until > own.expires_at:
            _refuse("an invitation that lasts longer than its signer's credential")
        case Grant(credential=given) if given.mesh != own.mesh or given.chain[:-1] != own.chain:
            _refuse("a grant that does not rest on its signer's credential")
        case Grant(credential=given) if given.begins_at > statement.issued_at + EARLY_S_MAX:
            _refuse("a grant of a credential from the future")


def _to_wire(body: Body) -> tuple[str, dict[str, Any]]:
    match body:
        case Policy():
            return POLICY, {
                "n": body.number,
                "open": body.open,
                "name": body.name,
                "at": body.founded_at,
            }
        case Invitation():
            return INVITATION, {
                "k": body.key,
                "role": body.role.word,
                "stage": body.stage,
                "until": body.until,
                "uses": body.uses,
                "s": body.proof,
            }
        case Revocation():
            return REVOCATION, {"t": body.target, "keep": sorted(body.keeps)}
        case Grant():
            return GRANT, {"c": body.credential.raw}


def _from_wire(kind: str, fields: dict[str, Any]) -> Body:
    match kind:
        case "policy":
            number = take(fields, "n", int)
            if number > POLICY_NUMBER_MAX:
                _refuse("a policy with a number out of bounds")
            return Policy(
                number=number,
                open=take(fields, "open", bool),
                name=plain_text(
                    take(fields, "name", str, size_max=STATEMENT_BYTES_MAX), MESH_NAME_CHARS_MAX
                ),
                founded_at=take(fields, "at", int),
            )
        case "invitation":
            uses = take(fields, "uses", int)
            role = ROLES.get(take(fields, "role", str, size_max=16))
            if uses > USES_MAX or role is None:
                _refuse("an invitation with a field out of bounds")
            return Invitation(
                key=take_exactly(fields, "k", PUBLIC_KEY_BYTES),
                role=role,
                stage=take(fields, "stage", bool),
                until=take(fields, "until", int),
                uses=uses,
                proof=take(fields, "s", bytes, size_max=SIGNATURE_BYTES),
            )
        case "revocation":
            keeps = take_bytes(
                fields, "keep", count_max=KEEPS_MAX, size_max=ID_BYTES, size_min=ID_BYTES
            )
            return Revocation(target=take_exactly(fields, "t", ID_BYTES), keeps=frozenset(keeps))
        case "grant":
            raw = take(fields, "c", bytes, size_max=CREDENTIAL_BYTES_MAX)
            return Grant(credential=read_credential(raw))
        case _:
            raise PeerError("a statement of an unknown kind")


def _refuse(sentence: str) -> NoReturn:
    raise PeerError(sentence)

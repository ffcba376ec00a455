"""Whether a newcomer is let in, and what it gets. Pure.

Two ways lead into a mesh: an invitation, whose key the newcomer proves to have, and, while the mesh
is open, the network that it shares with a member. A member whose credential is half over gets a new
one from any member that may give it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from p2pmesh.errors import PeerError
from p2pmesh.identity.credentials import (
    LAN_TTL_S,
    TTL_S,
    Basis,
    Credential,
    Role,
    issue,
    may_issue,
)
from p2pmesh.identity.hello import EXPIRED, REVOKED, STRANGER, RefusedError
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey, key_id, show_id
from p2pmesh.identity.tokens import is_proof
from p2pmesh.state.trust import Trust
from p2pmesh.wire.statements import Invitation, Statement


@dataclass(frozen=True, slots=True, kw_only=True)
class Applicant:
    """A node that asks for a credential by an invitation.

    Attributes:
        key: Its public key.
        invitation: The public key of the invitation.
        proof: The signature with the invitation's key.
        binding: A digest of the connection on which it asked first.
    """

    key: bytes
    invitation: bytes
    proof: bytes
    binding: bytes

    @property
    def node(self) -> NodeId:
        """Return the id of the node."""
        return NodeId(key_id(self.key))


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """A member that may let others in.

    Attributes:
        key: Its key.
        own: Its credential.
    """

    key: SigningKey
    own: Credential


def invitation_of(trust: Trust, applicant: Applicant, *, mesh: MeshId, now: float) -> Statement:
    """Return the statement behind the invitation that an applicant has.

    Raises:
        PeerError: It does not have its key.
        RefusedError: The invitation is not known, revoked, or over, or the node was revoked.
    """
    statement = trust.invitations.get(key_id(applicant.invitation))
    if statement is None:
        raise RefusedError("this invitation is not known here, or it was revoked", STRANGER)
    if not is_proof(
        applicant.invitation,
        applicant.proof,
        mesh=mesh,
        node=applicant.key,
        binding=applicant.binding,
    ):
        raise PeerError("the other side did not prove that it has the invitation")
    invitation = statement.body
    assert isinstance(invitation, Invitation)
    if invitation.until <= now:
        raise RefusedError("this invitation is over; ask for a new one", EXPIRED)
    revoking = trust.revoking(applicant.node, _above(statement.credential))
    newest = max((one.issued_at for one in revoking), default=-1)
    if newest >= statement.issued_at:
        raise RefusedError("this node was revoked after that invitation was made", REVOKED)
    return statement


def redeem(
    issuer: Issuer,
    trust: Trust,
    statement: Statement,
    applicant: Applicant,
    *,
    now: float,
    used: Collection[NodeId],
) -> Credential:
    """Make the credential of an applicant whose invitation is good.

    Args:
        issuer: Who signs it.
        trust: Of the mesh.
        statement: See `invitation_of`.
        applicant: Whom it is for.
        now: Mesh time in seconds.
        used: The nodes that came in with this invitation. Of one with a limit only its own signer
            knows them.

    Raises:
        RefusedError: As many as it allows have used it, or the issuer may not let the node in.
    """
    invitation = statement.body
    assert isinstance(invitation, Invitation)
    if invitation.uses and applicant.node not in used and len(used) >= invitation.uses:
        times = "once" if invitation.uses == 1 else f"{invitation.uses} times"
        raise RefusedError(f"this invitation was used {times}, as often as it may be", STRANGER)
    credential = issue(
        issuer.own,
        issuer.key,
        applicant.key,
        role=invitation.role,
        stage=invitation.stage,
        basis="invite",
        now=now,
        ttl_s=TTL_S,
        via=invitation.id,
    )
    if not trust.allows(credential):
        raise RefusedError("this node was revoked; only an admin can let it in again", REVOKED)
    return credential


def may_redeem(own: Credential, statement: Statement) -> bool:
    """Whether the holder of `own` may let somebody in with an invitation.

    Of one with a limit only its signer may, because only it counts.
    """
    invitation = statement.body
    assert isinstance(invitation, Invitation)
    counts = not invitation.uses or statement.owner == own.node
    return counts and may_issue(own, role=invitation.role, stage=invitation.stage, basis="invite")


def admit(issuer: Issuer, trust: Trust, key: bytes, *, now: float, named: bool) -> Credential:
    """Make the credential of a node on the network of this one.

    Args:
        issuer: Who signs it.
        trust: Of the mesh.
        key: The node's public key.
        now: Mesh time in seconds.
        named: Whether a person allowed this node by name, which a mesh that is not open takes.

    Raises:
        RefusedError: The mesh is not open, the node was revoked, or the issuer may let nobody in.
    """
    is_open = trust.policy is not None and trust.policy.open
    if not is_open and not named:
        raise RefusedError(
            "this mesh is private: ask a member for an invitation, or to run "
            f"`p2pmesh admit {show_id(key_id(key))}`",
            STRANGER,
        )
    if any(trust.revoking(NodeId(key_id(key)), _above(issuer.own))):
        raise RefusedError("this node was revoked; an admin can invite it again", REVOKED)
    basis: Basis = "grant" if named and issuer.own.role >= Role.INVITE else "lan"
    if not may_issue(issuer.own, role=Role.SERVE, stage=False, basis=basis):
        raise RefusedError("this member may let nobody in; ask another", STRANGER)
    credential = issue(
        issuer.own,
        issuer.key,
        key,
        role=Role.SERVE,
        stage=False,
        basis=basis,
        now=now,
        ttl_s=LAN_TTL_S,
    )
    if not trust.allows(credential):  # of a private mesh, or itself revoked
        raise RefusedError("this member may let nobody in; ask another", STRANGER)
    return credential


def renew(issuer: Issuer, trust: Trust, old: Credential, *, now: float) -> Credential | None:
    """Return a credential that lasts longer than `old`, with the same rights; None if it cannot.

    Args:
        issuer: Who signs it.
        trust: Of the mesh.
        old: Good, and signed.
        now: Mesh time in seconds.
    """
    if now < old.renews_at():
        return None  # else who was just let in could at once leave the branch of who did it
    last = old.last
    basis: Basis = "lan" if last.basis == "lan" else "grant"
    if old.node in {one.node for one in issuer.own.chain}:
        return None  # nobody renews its own, or that of a member above it
    if not may_issue(issuer.own, role=old.role, stage=old.stage, basis=basis):
        return None
    fresh = issue(
        issuer.own,
        issuer.key,
        last.holder,
        role=old.role,
        stage=old.stage,
        basis=basis,
        now=now,
        ttl_s=LAN_TTL_S if basis == "lan" else TTL_S,
    )
    return fresh if fresh.expires_at > old.expires_at and trust.allows(fresh) else None


def _above(credential: Credential | None) -> list[NodeId]:
    return [one.node for one in credential.chain] if credential else []


def fault(trust: Trust, credential: Credential, names: Mapping[NodeId, str]) -> str:
    """Say why a credential is not good in this mesh any more; "" if it is.

    Args:
        trust: Of the mesh.
        credential: In order in itself.
        names: What people call the members.
    """
    revocation = trust.cut(credential)
    if revocation is not None:
        by = names.get(revocation.owner, "a member that is not here")
        return (
            f"this node's membership was revoked by {by}; ask for a new invitation, then: "
            "p2pmesh join TOKEN"
        )
    if trust.closed_before(credential):
        return "this node was let in after the mesh was made private; ask for an invitation"
    return ""

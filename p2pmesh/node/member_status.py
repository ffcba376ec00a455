"""Who belongs to the mesh, and who may come in, as plain values: for console and command line.

Nothing secret is among them: the status is for everybody who reaches the console. Invitations are
named by their ids; the tokens are known to those only who made them or were given them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from p2pmesh.discovery.heard import Waiting as HeardNewcomer
from p2pmesh.identity.credentials import Credential, Role
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.node.admission import Waiting
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.roster import Seen
from p2pmesh.state.trust import Trust
from p2pmesh.wire.statements import Grant, Invitation

ADMINS_ENOUGH = 2  # one of them can be lost


class OwnMembership(Protocol):
    """The membership of this node, see `Membership`."""

    @property
    def warnings(self) -> list[str]:
        """Return sentences about what this node is about to lose."""
        ...


class Door(Protocol):
    """The way in for others, see `Admission`."""

    @property
    def waiting(self) -> Sequence[Waiting]:
        """Return the newcomers that only a person may let in."""
        ...

    def uses(self, invitation: bytes) -> int:
        """Return how often an invitation that this node made was used."""
        ...


class Surroundings(Protocol):
    """The network around, see `LocalNetwork`."""

    @property
    def waiting(self) -> Sequence[HeardNewcomer]:
        """Return the nodes here that look for a mesh and are not in this one."""
        ...

    @property
    def others(self) -> list[str]:
        """Return the names of other open meshes that are heard here."""
        ...

    @property
    def admits(self) -> bool:
        """Whether this node lets anybody in from this network."""
        ...

    @property
    def announces(self) -> bool:
        """Whether this node says on this network that its mesh is here."""
        ...


def mesh_rules(mesh: Mesh, only: NodeId | None, around: Surroundings) -> dict[str, Any]:
    """Return who may join the mesh, and who decides.

    Args:
        mesh: Which one.
        only: See `only_admin`.
        around: The network here.
    """
    policy = mesh.trust.policy
    return {
        "open": policy is not None and policy.open,
        "announced": around.announces,
        "others": around.others,
        "only_admin": show_id(only) if only else "",
    }


def notices(mesh: Mesh, only: NodeId | None, own: OwnMembership) -> list[str]:
    """Return sentences about what this node, or the mesh, has lost or may lose.

    Args:
        mesh: Which one.
        only: See `only_admin`.
        own: This node's membership.
    """
    found = [*own.warnings]
    if only is not None and len(mesh.view.nodes) > 1:  # alone there is nobody to grant it to
        found.append(_on_only_admin(mesh, only))
    return found


def standing(mesh: Mesh, own: Credential | None) -> dict[str, Any]:
    """Return what a node may do, and how it came in; empty values without a credential."""
    if own is None:
        return {"role": "", "stage": False, "basis": "", "by": "", "via": "", "expires_at": None}
    last = own.last
    by = "" if len(own.chain) == 1 else _name(mesh, last.issuer)
    return {
        "role": own.role.word,
        "stage": own.stage,
        "basis": last.basis,
        "by": by,
        "via": show_id(last.via) if last.via else "",
        "expires_at": own.expires_at,
    }


def invitations(mesh: Mesh, door: Door) -> list[dict[str, Any]]:
    """Return the invitations that are not over; the uses of those that this node made."""
    found = []
    for statement in mesh.trust.invitations.values():
        invitation = statement.body
        assert isinstance(invitation, Invitation)
        if invitation.until <= mesh.now:
            continue
        counted = statement.owner == mesh.me and invitation.uses > 0
        found.append(
            {
                "id": show_id(invitation.id),
                "role": invitation.role.word,
                "stage": invitation.stage,
                "until": invitation.until,
                "uses": invitation.uses,
                "used": door.uses(invitation.id) if counted else None,
                "by": _name(mesh, statement.owner),
            }
        )
    return sorted(found, key=lambda one: (one["until"], one["id"]))


def newcomers(mesh: Mesh, door: Door, around: Surroundings) -> list[dict[str, Any]]:
    """Return the nodes that a person may let in."""
    found = {one.node: (one.name, one.address.host) for one in around.waiting}
    found |= {one.node: (one.name, one.host) for one in door.waiting}
    return [
        {"id": show_id(node), "name": name or show_id(node), "host": host}
        for node, (name, host) in sorted(found.items(), key=lambda item: (item[1], item[0]))
        if node not in mesh.view.nodes
    ]


def away(mesh: Mesh, known: Mapping[NodeId, Seen]) -> list[dict[str, Any]]:
    """Return the members that are not here now, and guests, with what they may do when they come.

    Args:
        mesh: Which one.
        known: Everybody who was seen.
    """
    return [
        {"id": show_id(node), "name": seen.name, **standing(mesh, seen.credential)}
        for node, seen in sorted(known.items(), key=lambda item: (item[1].name, item[0]))
        if node not in mesh.view.nodes
        and seen.credential.expires_at > mesh.now
        and mesh.trust.allows(seen.credential)
    ]


def only_admin(mesh: Mesh, known: Mapping[NodeId, Seen]) -> NodeId | None:
    """Return the admin without whom the mesh would have none; None where there are more.

    Args:
        mesh: Which one.
        known: Everybody who was seen.
    """
    credentials = _known_credentials(mesh, known)
    found = admins(credentials, mesh.trust, mesh.now)
    return next(iter(found)) if 0 < len(found) < ADMINS_ENOUGH else None


def admins(known: Iterable[Credential], trust: Trust, now: float) -> set[NodeId]:
    """Return the admins, here or away, that some credentials tell of.

    The chain of each credential names those above its holder with what they were given.
    """
    found = set[NodeId]()
    for credential in known:
        for length, one in enumerate(credential.chain, 1):
            if one.role is not Role.ADMIN or one.node in found:
                continue
            chain = credential.chain[:length]
            expires_at = min(link.expires_at for link in chain)
            above = replace(credential, chain=chain, expires_at=expires_at)
            if expires_at > now and trust.allows(above):
                found.add(one.node)
    return found


def _known_credentials(mesh: Mesh, known: Mapping[NodeId, Seen]) -> Iterator[Credential]:
    yield from (one.credential for one in known.values())
    yield from (one.credential for one in mesh.view.nodes.values() if one.credential)
    for statement in mesh.statements:
        if statement.credential is not None:
            yield statement.credential
        if isinstance(statement.body, Grant):
            yield statement.body.credential


def _on_only_admin(mesh: Mesh, only: NodeId) -> str:
    who = "This node" if only == mesh.me else _name(mesh, only)
    return (
        f"{who} is the only admin of this mesh: if it is lost, nobody can revoke members, grant "
        "roles, or open and close the mesh any more. To make a second one: p2pmesh grant NODE admin"
    )


def _name(mesh: Mesh, node: NodeId) -> str:
    return mesh.names.get(node) or show_id(node)

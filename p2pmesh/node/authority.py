"""Commands of people about who belongs to the mesh: invite, revoke, grant, open and close it."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from p2pmesh.config import Address
from p2pmesh.errors import ConfigError, LocalError, PeerError
from p2pmesh.identity.credentials import TTL_S, Credential, Role, issue, may_issue
from p2pmesh.identity.keys import MeshId, NodeId, show_id
from p2pmesh.identity.tokens import TOKEN_SEED_BYTES, Token
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.roster import Seen
from p2pmesh.state.admission import Issuer
from p2pmesh.state.trust import REVOCATIONS_MAX, group_of, slot_of
from p2pmesh.wire.statements import (
    KEEPS_MAX,
    POLICY_NUMBER_MAX,
    USES_MAX,
    Body,
    Grant,
    Invitation,
    Policy,
    Revocation,
    Statement,
    offer_proof,
    state,
)

ID_SHOWN_CHARS_MIN = 4  # of an id, that a person may give in place of the whole
INVITE_S_MAX = 366 * 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class Invited:
    """An invitation that was made.

    Attributes:
        token: What to hand on.
        invitation: What the mesh knows of it.
    """

    token: Token
    invitation: Invitation


class Authority:
    """What a person may have this node do about members.

    Args:
        mesh: Which one.
        mesh_id: Its id.
        issuer: Returns who signs: this node and its credential.
        addresses: Returns where a newcomer finds this node, the likeliest first.
        seen: Returns everybody who was seen as a member, and guests.
    """

    def __init__(
        self,
        mesh: Mesh,
        mesh_id: MeshId,
        issuer: Callable[[], Issuer],
        addresses: Callable[[], tuple[Address, ...]],
        seen: Callable[[], Mapping[NodeId, Seen]],
    ) -> None:
        self._mesh, self._mesh_id = mesh, mesh_id
        self._issuer, self._addresses, self._seen = issuer, addresses, seen

    # --- commands -------------------------------------------------------------------------------

    def invite(
        self,
        *,
        role: Role,
        stage: bool,
        for_s: int,
        uses: int,
        addresses: tuple[Address, ...] = (),
    ) -> Invited:
        """Make an invitation.

        Args:
            role: What the newcomers become.
            stage: Whether they get that right.
            for_s: How long it can be used, in seconds.
            uses: By how many nodes; 0: no limit.
            addresses: Where they find this node, if a person knows better than it does.

        Raises:
            ConfigError: An argument is out of bounds.
            LocalError: This node may not.
        """
        own = self._own
        if not 0 < for_s <= INVITE_S_MAX or not 0 <= uses <= USES_MAX:
            raise ConfigError(
                f"an invitation lasts at most a year and is for at most {USES_MAX} machines"
            )
        if own.role < Role.INVITE:
            raise LocalError(self._not_allowed("invite anybody", Role.INVITE))
        if not may_issue(own, role=role, stage=stage, basis="invite"):
            raise LocalError(self._cannot_give(role, stage=stage))
        token = Token(
            mesh=self._mesh_id,
            seed=secrets.token_bytes(TOKEN_SEED_BYTES),
            addresses=addresses or self._addresses(),
        )
        invitation = Invitation(
            key=token.key.public,
            role=role,
            stage=stage,
            until=min(int(self._mesh.now) + for_s, own.expires_at),
            uses=uses,
            proof=offer_proof(token.key, mesh=self._mesh_id, owner=self._mesh.me),
        )
        self._declare(invitation)
        return Invited(token=token, invitation=invitation)

    def revoke(self, target: str, *, below: bool) -> list[str]:
        """Revoke a node or an invitation; returns sentences for the person who did it.

        Args:
            target: A name, an id, or the beginning of one.
            below: Whether to revoke those as well that the node let in.

        Raises:
            ConfigError: There is no such node or invitation.
            LocalError: This node may not.
        """
        found = find_id(target, {**self._members(), **self._invitations()}, "node or invitation")
        if found in self._mesh.trust.invitations:
            return self._revoke_invitation(found, target)
        node = NodeId(found)
        if node == self._mesh.me:
            raise ConfigError("that is this node itself: p2pmesh leave")
        self._check_reach(node)
        name = self._members().get(node, target)
        children = dict(self._children(node))
        if below and node in {one.node for one in self._own.chain}:
            raise LocalError(
                f"this node's own membership rests on {name}'s, so --below would put it out too; "
                "leave that out, and revoke one by one whom else it let in"
            )
        revocation = self._revocation(node, [] if below else children)
        self._declare(revocation, taken_over=self._laid_down(node))
        sentences = [f"{name} is out of the mesh."]
        if children:
            names = ", ".join(sorted(set(children.values())))
            sentences.append(
                f"So is everybody whom it let in: {names}."
                if below
                else f"Whom it let in stays: {names}. To revoke them as well: --below"
            )
        if self._mesh.trust.policy is not None and self._mesh.trust.policy.open:
            sentences.append(
                "This mesh is open: somebody on this network can come back with a new key. "
                "To let in only whom you invite: p2pmesh up --private"
            )
        return sentences

    def grant(self, target: str, *, role: Role | None, stage: bool | None) -> str:
        """Give a node another role, or the right `stage`; returns a sentence.

        Raises:
            ConfigError: There is no such node.
            LocalError: This node may not.
        """
        node = NodeId(find_id(target, self._members(), "node"))
        old = self._credential_of(node, target)
        new_role = old.role if role is None else role
        new_stage = old.stage if stage is None else stage
        if self._own.role < Role.INVITE:
            raise LocalError(self._not_allowed("grant anything", Role.INVITE))
        if node in {one.node for one in self._own.chain}:
            raise LocalError(f"{target} stands above this node, which cannot change its role")
        if not may_issue(self._own, role=new_role, stage=new_stage, basis="grant"):
            raise LocalError(self._cannot_give(new_role, stage=new_stage))
        bodies: list[Body] = []
        taken_over: list[Statement] = []
        now = self._mesh.now
        if new_role < old.role or (old.stage and not new_stage):
            self._check_reach(node)
            bodies.append(self._revocation(node, dict(self._children(node))))
            taken_over = self._laid_down(node)
            now += 1  # later than the revocation, whose time is in whole seconds
        credential = issue(
            self._own,
            self._issuer().key,
            old.last.holder,
            role=new_role,
            stage=new_stage,
            basis="grant",
            now=now,
            ttl_s=TTL_S,
        )
        self._declare(*bodies, Grant(credential=credential), taken_over=taken_over)
        what = f"the role {new_role.word}" + (" and the right stage" if new_stage else "")
        when = "as soon as it is started again" if Role.USE is old.role < new_role else "now"
        return f"{self._members().get(node, target)} has {what} {when}."

    def check_may_admit(self) -> None:
        """Refuse to let a newcomer in by name where nobody would believe it.

        Raises:
            LocalError: The mesh is private, and this node may not let others in.
        """
        policy = self._mesh.trust.policy
        if policy is not None and not policy.open and self._own.role < Role.INVITE:
            raise LocalError(self._not_allowed("let anybody into a private mesh", Role.INVITE))

    def set_open(self, *, is_open: bool) -> bool:
        """Open or close the mesh; returns whether that is a change.

        Raises:
            LocalError: This node may not.
        """
        policy = self._mesh.trust.policy
        if policy is None or policy.open == is_open:
            return False
        if self._own.role is not Role.ADMIN:
            what = "open this mesh" if is_open else "make this mesh private"
            raise LocalError(self._not_allowed(what, Role.ADMIN))
        self._declare(
            Policy(
                number=min(policy.number + 1, POLICY_NUMBER_MAX),
                open=is_open,
                name=policy.name,
                founded_at=policy.founded_at,
            )
        )
        return True

    # --- inside ---------------------------------------------------------------------------------

    @property
    def _own(self) -> Credential:
        return self._issuer().own

    def _declare(self, *bodies: Body, taken_over: Iterable[Statement] = ()) -> None:
        """Sign these for the whole mesh, and what another node laid down as of when it did."""
        said = [*((body, self._mesh.now) for body in bodies)]
        said += [(one.body, one.issued_at) for one in taken_over]
        try:
            statements = [
                state(self._issuer().key, self._own, body, mesh=self._mesh_id, now=at)
                for body, at in said
            ]
        except PeerError as exc:  # checked as everybody will check it
            raise LocalError(f"this node may not do that: {exc}") from exc
        self._check_room(statements)
        self._mesh.declare(*statements)

    def _check_room(self, statements: Iterable[Statement]) -> None:
        """Check that no revocation makes an older one give way.

        Raises:
            LocalError: It would.
        """
        held = {
            (group_of(one), slot_of(one))
            for one in (*self._mesh.statements, *statements)
            if isinstance(one.body, Revocation)
        }
        fullest = max(Counter(group for group, _ in held).values(), default=0)
        if fullest > REVOCATIONS_MAX:
            raise LocalError(
                f"this node and those below it made the {REVOCATIONS_MAX} revocations that they "
                "may; an admin that made fewer can do it"
            )

    def _revoke_invitation(self, invitation: bytes, target: str) -> list[str]:
        statement = self._mesh.trust.invitations[invitation]
        if self._own.role is not Role.ADMIN and statement.owner != self._mesh.me:
            raise LocalError(self._not_allowed("revoke an invitation of another node", Role.ADMIN))
        self._declare(Revocation(target=invitation, keeps=frozenset()))
        came = [one.name for one in self._seen().values() if one.credential.last.via == invitation]
        sentences = [f"Nobody can join with the invitation {target} any more."]
        if came:
            sentences.append(
                f"Who came in with it stays: {', '.join(sorted(came))}; p2pmesh revoke NODE"
            )
        return sentences

    def _revocation(self, node: NodeId, children: Iterable[bytes]) -> Revocation:
        """Return the revocation of a node, which keeps those children and any kept before."""
        keeps = {*children}
        if keeps:
            earlier = self._mesh.trust.revoking(node, (self._mesh.me,))
            for body in (one.body for one in earlier if one.owner == self._mesh.me):
                keeps |= body.keeps if isinstance(body, Revocation) else set()
        if len(keeps) > KEEPS_MAX:
            raise LocalError(
                f"that node let in more than the {KEEPS_MAX} that a revocation can keep: --below"
            )
        return Revocation(target=node, keeps=frozenset(keeps))

    def _laid_down(self, node: NodeId) -> list[Statement]:
        """Return the revocations and the policy of a node, which must not end with it.

        This node makes them its own. To keep them as that node's would not do: whoever has its key
        could make others, which do not count, but in whose favour they give way.
        """
        trust = self._mesh.trust
        found = trust.revocations_by(node)
        if trust.policy_statement and trust.policy_statement.owner == node:
            found.append(trust.policy_statement)
        mine = {slot_of(one).name: one.issued_at for one in trust.revocations_by(self._mesh.me)}
        return [
            one
            for one in found
            if slot_of(one).name != self._mesh.me
            and mine.get(slot_of(one).name, -1) < one.issued_at
        ]

    def _children(self, node: NodeId) -> Iterator[tuple[bytes, str]]:
        """The delegations to members that a node let in, with those members' names."""
        for seen in self._seen().values():
            for one in seen.credential.chain[1:]:
                if one.issuer == node:
                    yield one.id, seen.name

    def _check_reach(self, node: NodeId) -> None:
        if self._own.role is Role.ADMIN:
            return
        seen = self._seen().get(node)
        chain = seen.credential.chain if seen else ()
        above = {one.node for one in chain[:-1]}
        if self._mesh.me not in above:
            raise LocalError(self._not_allowed("revoke a node that it did not let in", Role.ADMIN))

    def _credential_of(self, node: NodeId, target: str) -> Credential:
        seen = self._seen().get(node)
        if seen is None:
            raise ConfigError(f"{target} is not known here yet; grant it something when it is")
        return seen.credential

    def _members(self) -> dict[bytes, str]:
        """Everybody whom a person may mean: those that are here go by the names they have now."""
        away = {bytes(node): one.name for node, one in self._seen().items()}
        return {**away, **{bytes(node): name for node, name in self._mesh.names.items()}}

    def _invitations(self) -> dict[bytes, str]:
        return dict.fromkeys(self._mesh.trust.invitations, "")

    def _not_allowed(self, what: str, role: Role) -> str:
        return (
            f"this node has the role {self._own.role.word} and may not {what}; an admin can: "
            f"p2pmesh grant {self._mesh.names.get(self._mesh.me, 'NODE')} {role.word}"
        )

    def _cannot_give(self, role: Role, *, stage: bool) -> str:
        own = self._own
        if role > own.role:
            return self._not_allowed(f"give the role {role.word}", role)
        if stage and not own.stage:
            return (
                "this node has not the right 'stage' and cannot give it (--no-stage leaves it "
                "out); an admin can give it: p2pmesh grant NODE stage"
            )
        return (
            "this node was let in by others that were let in themselves, too far from the founder "
            "to let in more; ask another member"
        )


def find_id(text: str, names: dict[bytes, str], what: str) -> bytes:
    """Return the one of some ids that a person means.

    Args:
        text: A name, an id, or the beginning of an id.
        names: What people call each.
        what: What is looked for, for the error.

    Raises:
        ConfigError: It is none of them, or several.
    """
    word = text.strip()
    start = word.lower() if len(word) >= ID_SHOWN_CHARS_MIN else None
    ids = {one: show_id(one) for one in names}
    # A whole id goes first, and the beginning of one counts as much as a name: nodes name
    # themselves, and one may have taken the id of another for its name.
    found = [one for one in names if ids[one] == start] or [
        one
        for one, name in names.items()
        if name == word or (start is not None and ids[one].startswith(start))
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(f"there is no {what} {word!r}; see p2pmesh members")
    choices = ", ".join(sorted(show_id(one) for one in found))
    raise ConfigError(f"{word!r} can be any of several: {choices}")

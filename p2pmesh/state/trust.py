"""The statements of trust that stand in a mesh, and what follows from them.

Pure, and a CRDT: which statements stand, and what they come to, follows from the set of those that
were heard. Of each branch, that is an admin, or a member that an admin let in together with all
below it, at most so many of each kind are kept, the newest, the same on every node. So nobody can
crowd out what others laid down, however many members it lets in. Of its own revocations a branch
can drop some, which is no more than it may do anyway: who was revoked comes back by the word of its
revoker.

A revocation cuts a credential at the delegation to its target, and with it whatever the target
signed until then and the revocation does not name as kept. It reaches what its signer gave,
directly or below; an admin's reaches everybody.

Revocations are statements themselves, so one may void another: a node that was revoked revokes
nobody any more. Of two nodes that revoke each other nobody can tell who was first, since a clock
can be set back: both are out, and what they signed for others stays. The revocations that count
are the grounded extension of the argumentation framework that they form (Dung, 1995), together
with those that it leaves undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from p2pmesh.identity.credentials import EARLY_S_MAX, Credential, Role
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.outcome import MergeOutcome
from p2pmesh.state.owner_records import EXPIRY_GRACE_S, NEVER
from p2pmesh.wire.facts import Fact
from p2pmesh.wire.records import Record, credential_of
from p2pmesh.wire.registers import Life, register_of
from p2pmesh.wire.statements import Grant, Invitation, Policy, Revocation, Statement

INVITATIONS_MAX = 64  # of a branch; the newest stay
GRANTS_MAX = 128  # of a branch; the newest stay
REVOCATIONS_MAX = 256  # of a branch; the newest stay, and an author stops before
BRANCHES_MAX = 1024  # members that admins let in with the role `invite`; more are not heard
ADMINS_MAX = 256  # that are heard, whatever the members below them say

# Whether the facts of an owner count in a mesh with that trust, at that mesh time in seconds.
Authorised = Callable[["Trust", Fact, float], bool]


class Group(NamedTuple):
    """The statements that share a bound.

    Attributes:
        branch: An admin, or the highest in the signer's chain that is none.
        is_admins: Whether an admin signed.
        kind: The class of the body.
    """

    branch: NodeId
    is_admins: bool
    kind: type


class Slot(NamedTuple):
    """The place of a statement: of those in one place the newest stands."""

    signer: NodeId
    name: bytes


def group_of(statement: Statement) -> Group:
    """Return whose bound a statement is counted against."""
    own, branch = statement.credential, statement.owner
    if own is not None and not statement.is_admins:
        branch = next(one.node for one in own.chain if one.role is not Role.ADMIN)
    return Group(branch, statement.is_admins, type(statement.body))


def slot_of(statement: Statement) -> Slot:
    """Return the place of a statement in its group."""
    match statement.body:
        case Policy():
            name = b""
        case Invitation() as invitation:
            name = invitation.id
        case Revocation(target=target):
            name = target
        case Grant(credential=credential):
            name = credential.node
    return Slot(statement.owner, name)


def ends_at(statement: Statement) -> int:
    """Return the mesh time in seconds at which a statement is void; `NEVER` for most."""
    match statement.body:
        case Invitation(until=until):
            return until + EXPIRY_GRACE_S
        case Grant(credential=credential):
            return credential.expires_at + EXPIRY_GRACE_S
        case _:
            return NEVER


class Statements:
    """All statements that stand."""

    def __init__(self) -> None:
        self._groups: dict[Group, dict[Slot, Statement]] = {}
        self._branches: dict[tuple[NodeId, bool], int] = {}  # with how many groups each
        self._by_id: dict[bytes, Statement] = {}
        self._trust: Trust | None = None
        self._ends_at = NEVER  # none ends before

    def __iter__(self) -> Iterator[Statement]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def ends_at(self) -> int:
        """Mesh time in seconds before which no statement runs out."""
        return self._ends_at

    @property
    def trust(self) -> Trust:
        """What the statements come to; the same object until one changes."""
        if self._trust is None:
            self._trust = Trust(self)
        return self._trust

    def find(self, item: bytes) -> Statement | None:
        """Return the statement with that id, if it stands."""
        return self._by_id.get(item)

    def judge(self, statement: Statement, now: float) -> MergeOutcome:
        """Judge what adding a statement would change."""
        if ends_at(statement) <= now:
            return MergeOutcome.VOID
        group = group_of(statement)
        mine = self._groups.get(group, {}).get(slot_of(statement))
        if mine is not None:
            return MergeOutcome.NEWS if _order(statement) > _order(mine) else MergeOutcome.STALE
        last = self._last(group)
        has_room = self._has_branch(group) and (last is None or _order(statement) > _order(last))
        return MergeOutcome.NEWS if has_room else MergeOutcome.REFUSED

    def add(self, statement: Statement) -> list[Statement]:
        """Let a statement stand, for which there is room; returns those that give way."""
        group, slot = group_of(statement), slot_of(statement)
        replaced = self._groups.get(group, {}).get(slot) or self._last(group)
        gone = [replaced] if replaced is not None else []
        for one in gone:
            self._drop(one)
        if group not in self._groups:
            self._groups[group] = {}
            branch = group.branch, group.is_admins
            self._branches[branch] = self._branches.get(branch, 0) + 1
        self._groups[group][slot] = self._by_id[statement.id] = statement
        self._ends_at = min(self._ends_at, ends_at(statement))
        self._trust = None
        return gone

    def expire(self, now: float) -> list[Statement]:
        """Drop what has run out by then; returns it."""
        if now < self._ends_at:
            return []
        gone = [one for one in self if ends_at(one) <= now]
        for one in gone:
            self._drop(one)
        self._ends_at = min(map(ends_at, self), default=NEVER)
        if gone:
            self._trust = None
        return gone

    def _has_branch(self, group: Group) -> bool:
        if (group.branch, group.is_admins) in self._branches:
            return True
        count = sum(1 for _, is_admins in self._branches if is_admins == group.is_admins)
        return count < (ADMINS_MAX if group.is_admins else BRANCHES_MAX)

    def _drop(self, statement: Statement) -> None:
        group = group_of(statement)
        del self._groups[group][slot_of(statement)], self._by_id[statement.id]
        if not self._groups[group]:
            del self._groups[group]
            branch = group.branch, group.is_admins
            self._branches[branch] -= 1
            if not self._branches[branch]:
                del self._branches[branch]

    def _last(self, group: Group) -> Statement | None:
        """Return the statement that gives way to a new place in its group, if one has to."""
        held = self._groups.get(group, {})
        full = len(held) >= _KIND_MAX[group.kind]
        return min(held.values(), key=_order) if full else None


class Trust:
    """What a set of statements comes to.

    Args:
        statements: All that stand.

    Attributes:
        policy: The rules of the mesh; None before they are known.
        policy_statement: The statement that made them.
        invitations: Those that are neither revoked nor of a revoked signer, by id. Their time may
            be over.
        grants: Likewise, by the node that they are for.
    """

    def __init__(self, statements: Iterable[Statement] = ()) -> None:
        kinds: dict[type, list[Statement]] = {kind: [] for kind in _KIND_MAX}
        for statement in sorted(statements, key=lambda one: one.id):
            kinds[type(statement.body)].append(statement)
        self._revocations = _Revocations(_counting(kinds[Revocation]))
        good = {kind: [one for one in kinds[kind] if self._stands(one)] for kind in kinds}
        self.policy_statement = max(good[Policy], key=_order, default=None)
        policy = self.policy_statement.body if self.policy_statement else None
        self.policy: Policy | None = policy if isinstance(policy, Policy) else None
        self.invitations = {slot_of(one).name: one for one in good[Invitation]}
        self.grants: dict[NodeId, list[Statement]] = {}
        for one in good[Grant]:
            self.grants.setdefault(NodeId(slot_of(one).name), []).append(one)

    def cut(self, credential: Credential, signed: Statement | None = None) -> Statement | None:
        """Return the revocation that voids a credential, or what its holder signed with it.

        Args:
            credential: In order in itself.
            signed: A statement that its holder signed; None for the credential alone.
        """
        found = next(self._revocations.reaching(credential, signed), None)
        return None if found is None else found.statement

    def revoking(self, target: bytes, by: Collection[NodeId] = ()) -> Iterator[Statement]:
        """The revocations of a node or an invitation that count.

        Args:
            target: The node or invitation.
            by: Whose revocations matter, beside those of admins.
        """
        return (one.statement for one in self._revocations.of(target, by))

    def revocations_by(self, signer: NodeId) -> list[Statement]:
        """Return the revocations of a node that count, sorted by id."""
        found = [one.statement for one in self._revocations if one.statement.owner == signer]
        return sorted(found, key=lambda one: one.id)

    def closed_before(self, credential: Credential) -> bool:
        """Whether the mesh was closed when somebody let its holder in without an invitation.

        Members without the role `invite` let others in only while the mesh is open.
        """
        if self.policy is None or self.policy.open or self.policy_statement is None:
            return False
        since = self.policy_statement.issued_at
        return any(
            signer.role < Role.INVITE and one.issued_at > since
            for signer, one in zip(credential.chain, credential.chain[1:], strict=False)
        )

    def allows(self, credential: Credential) -> bool:
        """Whether a credential that is in order in itself is good in this mesh."""
        return self.cut(credential) is None and not self.closed_before(credential)

    def best_grant(self, node: NodeId, now: float) -> Credential | None:
        """Return the credential that is worth most of those granted to `node`."""
        bodies = (one.body for one in self.grants.get(node, ()))
        granted = [one.credential for one in bodies if isinstance(one, Grant)]
        good = [one for one in granted if one.expires_at > now and self.allows(one)]
        return max(good, key=lambda one: one.rank, default=None)

    def _stands(self, statement: Statement) -> bool:
        own, body = statement.credential, statement.body
        if isinstance(body, Invitation) and any(self.revoking(body.id, (statement.owner,))):
            return False
        return own is None or self.cut(own, statement) is None


def everybody(_trust: Trust, _fact: Fact, _now: float) -> bool:
    """Let the facts of every owner count."""
    return True


def members_only(trust: Trust, fact: Fact, _now: float) -> bool:
    """Let the records count that a member's credential covers, and what lives on those.

    A record that stands by itself carries the credential of its owner, begins with it and ends
    before it.
    """
    if not isinstance(fact, Record) or register_of(fact.register).life is Life.LEASED:
        return True
    own = credential_of(fact)
    return (
        own is not None
        and own.role >= Role.SERVE
        and own.begins_at <= fact.issued_at + EARLY_S_MAX
        and fact.expires_at <= own.expires_at
        and trust.allows(own)
    )


def _order(statement: Statement) -> tuple[int, int, bytes]:
    """Return the order in which the largest of some statements stand."""
    number = statement.body.number if isinstance(statement.body, Policy) else 0
    return number, statement.issued_at, statement.id


class _Counted(NamedTuple):
    """A revocation that counts.

    Attributes:
        alone: It cuts off its target and nobody below, because the target revoked its signer too.
    """

    statement: Statement
    alone: bool = False


class _Revocations:
    """Some revocations, found by whom they concern and who may have made them."""

    def __init__(self, some: Iterable[_Counted]) -> None:
        self._admins: dict[bytes, list[_Counted]] = {}
        self._others: dict[tuple[NodeId, bytes], list[_Counted]] = {}
        for one in some:
            target = _target(one.statement)
            if one.statement.is_admins:
                self._admins.setdefault(target, []).append(one)
            else:
                self._others.setdefault((one.statement.owner, target), []).append(one)

    def __iter__(self) -> Iterator[_Counted]:
        for some in (*self._admins.values(), *self._others.values()):
            yield from some

    def of(self, target: bytes, by: Iterable[NodeId]) -> Iterator[_Counted]:
        """Those of `target` by admins and by these nodes."""
        yield from self._admins.get(target, ())
        for owner in by:
            yield from self._others.get((owner, target), ())

    def reaching(self, credential: Credential, signed: Statement | None) -> Iterator[_Counted]:
        """Those that void a credential, or a statement that its holder signed."""
        above: list[NodeId] = []
        follows = [*((one.id, one.issued_at) for one in credential.chain[1:])]
        follows.append((signed.id, signed.issued_at) if signed else (b"", 0))
        for at, (one, follower) in enumerate(zip(credential.chain, follows, strict=True)):
            is_last = at + 1 == len(credential.chain)
            for counted in self.of(one.node, above):
                if (is_last or not counted.alone) and _reaches(
                    counted.statement, credential, at, follower
                ):
                    yield counted
            above.append(one.node)


def _reaches(
    statement: Statement, credential: Credential, at: int, follower: tuple[bytes, int]
) -> bool:
    """Whether a revocation of the holder of one delegation voids what follows it in the chain.

    Args:
        statement: The revocation.
        credential: The whole chain.
        at: The place of that delegation in it.
        follower: The id and time of what its holder signed; an empty id for nothing.
    """
    assert isinstance(statement.body, Revocation)
    one, (signed, signed_at) = credential.chain[at], follower
    if signed in statement.body.keeps:
        return False
    # Who was revoked comes back by the word of an admin, or of who revoked it, and nobody else's.
    # To let in whoever is on a network is nobody's word.
    signer = credential.chain[at - 1] if at else None
    by_right = one.basis != "lan" and (
        signer is None or signer.role is Role.ADMIN or signer.node == statement.owner
    )
    if one.issued_at <= statement.issued_at or not by_right:
        return True
    return bool(signed) and signed_at <= statement.issued_at


def _counting(revocations: list[Statement]) -> Iterator[_Counted]:
    """Return the revocations that count."""
    everything = _Revocations(map(_Counted, revocations))
    found = {one.id: dict(_attackers(everything, one)) for one in revocations}
    mutual: dict[bytes, set[bytes]] = {one.id: set() for one in revocations}
    attackers: dict[bytes, set[bytes]] = {one.id: set() for one in revocations}
    for voided, others in found.items():
        for other, is_direct in others.items():
            back = found[other].get(voided)
            if back is None or (is_direct and not back):
                attackers[voided].add(other)  # to revoke a signer goes before revoking its signers
            elif is_direct and back:
                mutual[voided].add(other)
    out = _voided(attackers)
    for one in revocations:
        if one.id not in out:
            yield _Counted(one, alone=bool(mutual[one.id] - out))


def _attackers(everything: _Revocations, statement: Statement) -> Iterator[tuple[bytes, bool]]:
    """Return the ids of revocations that void a statement, and whether they revoke its signer."""
    if statement.credential is not None:
        for one in everything.reaching(statement.credential, statement):
            if one.statement is not statement:
                yield one.statement.id, _target(one.statement) == statement.owner


def _voided(attackers: Mapping[bytes, set[bytes]]) -> set[bytes]:
    """Return those that something voids which is itself not voided."""
    left = {one: len(some) for one, some in attackers.items()}  # attackers that may yet count
    attacked: dict[bytes, list[bytes]] = {}
    for one, some in attackers.items():
        for other in some:
            attacked.setdefault(other, []).append(one)
    out: set[bytes] = set()
    counts = [one for one, some in left.items() if not some]
    while counts:
        for lost in attacked.get(counts.pop(), ()):
            if lost in out:
                continue
            out.add(lost)
            for freed in attacked.get(lost, ()):
                left[freed] -= 1
                if not left[freed] and freed not in out:
                    counts.append(freed)
    return out


def _target(statement: Statement) -> bytes:
    assert isinstance(statement.body, Revocation)
    return statement.body.target


_KIND_MAX: Mapping[type, int] = {
    Policy: 1,
    Invitation: INVITATIONS_MAX,
    Revocation: REVOCATIONS_MAX,
    Grant: GRANTS_MAX,
}

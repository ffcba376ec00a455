"""The statements of trust that stand in a mesh, and what follows from them.

Pure, and a CRDT: which statements stand, and what they come to, follows from the set of those that
were heard. Of each signer at most so many of each kind are kept, the same on every node.

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

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from p2pmesh.identity.credentials import Credential, Role
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.outcome import MergeOutcome
from p2pmesh.state.owner_records import EXPIRY_GRACE_S, NEVER
from p2pmesh.wire.facts import Fact
from p2pmesh.wire.records import Record, credential_of
from p2pmesh.wire.registers import Life, register_of
from p2pmesh.wire.statements import Grant, Invitation, Policy, Revocation, Statement

INVITATIONS_MAX = 64  # per signer; the newest stay
GRANTS_MAX = 128  # per signer; the newest stay
REVOCATIONS_MAX = 256  # per signer; the oldest stay: nothing that was revoked comes back
SIGNERS_MAX = 1024  # members with the role `invite`; further ones are not heard

# Whether the facts of an owner count in a mesh with that trust, at that mesh time in seconds.
Authorised = Callable[["Trust", Fact, float], bool]


class Slot(NamedTuple):
    """The place of a statement: of those in one place one stands."""

    signer: NodeId
    kind: type
    name: bytes


def slot_of(statement: Statement) -> Slot:
    """Return the place of a statement."""
    match statement.body:
        case Policy():
            name = b""
        case Invitation() as invitation:
            name = invitation.id
        case Revocation():
            name = statement.id
        case Grant(credential=credential):
            name = credential.node
    return Slot(statement.owner, type(statement.body), name)


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
        self._standing: dict[Slot, Statement] = {}
        self._signers: dict[NodeId, int] = {}
        self._trust: Trust | None = None
        self._ends_at = NEVER  # none ends before

    def __iter__(self) -> Iterator[Statement]:
        return iter(self._standing.values())

    def __len__(self) -> int:
        return len(self._standing)

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

    def find(self, signer: NodeId, item: bytes) -> Statement | None:
        """Return the statement of a signer with that id, if it stands."""
        return next((one for one in self._of(signer) if one.id == item), None)

    def judge(self, statement: Statement, now: float) -> MergeOutcome:
        """Judge what adding a statement would change."""
        if ends_at(statement) <= now:
            return MergeOutcome.VOID
        mine = self._standing.get(slot_of(statement))
        if mine is not None:
            return MergeOutcome.NEWS if _order(statement) > _order(mine) else MergeOutcome.STALE
        if statement.owner not in self._signers:
            has_room = len(self._signers) < SIGNERS_MAX
        else:
            last = self._last(statement)
            has_room = last is None or _order(statement) > _order(last)
        return MergeOutcome.NEWS if has_room else MergeOutcome.REFUSED

    def add(self, statement: Statement) -> list[Statement]:
        """Let a statement stand, for which there is room; returns those that give way."""
        slot = slot_of(statement)
        replaced = self._standing.get(slot) or self._last(statement)
        gone = [replaced] if replaced is not None else []
        for one in gone:
            self._drop(one)
        self._standing[slot] = statement
        self._signers[statement.owner] = self._signers.get(statement.owner, 0) + 1
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

    def _of(self, signer: NodeId) -> Iterator[Statement]:
        if signer in self._signers:
            yield from (one for slot, one in self._standing.items() if slot.signer == signer)

    def _drop(self, statement: Statement) -> None:
        del self._standing[slot_of(statement)]
        self._signers[statement.owner] -= 1
        if not self._signers[statement.owner]:
            del self._signers[statement.owner]

    def _last(self, statement: Statement) -> Statement | None:
        """Return the statement that gives way to another of its signer and kind, if one has to."""
        if slot_of(statement) in self._standing:
            return None
        kind = type(statement.body)
        others = [one for one in self._of(statement.owner) if type(one.body) is kind]
        return min(others, key=_order) if len(others) >= _KIND_MAX[kind] else None


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
        self._revocations = _counting(kinds[Revocation])
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
        return _cut(self._revocations, credential, signed)

    def revoking(self, target: bytes) -> Iterator[Statement]:
        """The revocations of a node or an invitation that count."""
        return (one.statement for one in self._revocations.get(target, ()))

    def all_revocations(self) -> Iterator[Statement]:
        """The revocations that count."""
        return (one.statement for some in self._revocations.values() for one in some)

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
        if isinstance(body, Invitation) and any(
            one.is_admins or one.owner == statement.owner for one in self.revoking(body.id)
        ):
            return False
        return own is None or self.cut(own, statement) is None


def everybody(_trust: Trust, _fact: Fact, _now: float) -> bool:
    """Let the facts of every owner count."""
    return True


def members_only(trust: Trust, fact: Fact, _now: float) -> bool:
    """Let the records count that a member's credential covers, and what lives on those.

    A record that stands by itself carries the credential of its owner, and ends before it.
    """
    if not isinstance(fact, Record) or register_of(fact.register).life is Life.LEASED:
        return True
    own = credential_of(fact)
    return (
        own is not None
        and own.role >= Role.SERVE
        and fact.expires_at <= own.expires_at
        and trust.allows(own)
    )


def _order(statement: Statement) -> tuple[int, int, bytes]:
    """Return the order in which the largest of some statements stand."""
    match statement.body:
        case Policy(number=number):
            return number, statement.issued_at, statement.id
        case Revocation():
            return 0, -statement.issued_at, statement.id
        case _:
            return 0, statement.issued_at, statement.id


class _Counted(NamedTuple):
    """A revocation that counts.

    Attributes:
        alone: It cuts off its target and nobody below, because the target revoked its signer too.
    """

    statement: Statement
    alone: bool = False


def _cut(
    revocations: Mapping[bytes, Iterable[_Counted]],
    credential: Credential,
    signed: Statement | None,
) -> Statement | None:
    """See `Trust.cut`; of `revocations` by target."""
    above: set[NodeId] = set()
    follows = [*((one.id, one.issued_at) for one in credential.chain[1:])]
    follows.append((signed.id, signed.issued_at) if signed else (b"", 0))
    for at, (one, follower) in enumerate(zip(credential.chain, follows, strict=True)):
        is_last = at + 1 == len(credential.chain)
        for statement, alone in revocations.get(one.node, ()):
            if not (statement.is_admins or statement.owner in above) or (alone and not is_last):
                continue
            if _reaches(statement, credential, at, follower):
                return statement
        above.add(one.node)
    return None


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
    by_right = (
        at == 0 or credential.chain[at - 1].role is Role.ADMIN or one.issuer == statement.owner
    )
    if one.issued_at <= statement.issued_at or not by_right:
        return True
    return bool(signed) and signed_at <= statement.issued_at


def _counting(revocations: list[Statement]) -> dict[bytes, list[_Counted]]:
    """Return the revocations that count, by target."""
    by_target: dict[bytes, list[_Counted]] = {}
    for one in revocations:
        by_target.setdefault(_target(one), []).append(_Counted(one))
    found = {one.id: dict(_attackers(by_target, one)) for one in revocations}
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
    counting: dict[bytes, list[_Counted]] = {}
    for one in revocations:
        if one.id not in out:
            counted = _Counted(one, alone=bool(mutual[one.id] - out))
            counting.setdefault(_target(one), []).append(counted)
    return counting


def _attackers(
    by_target: Mapping[bytes, list[_Counted]], statement: Statement
) -> Iterator[tuple[bytes, bool]]:
    """Return the ids of revocations that void a statement, and whether they revoke its signer."""
    own = statement.credential
    for delegation in own.chain if own else ():
        for one in by_target.get(delegation.node, ()):
            alone: Mapping[bytes, list[_Counted]] = {delegation.node: [one]}
            if one.statement is not statement and own and _cut(alone, own, statement):
                yield one.statement.id, delegation.node == statement.owner


def _voided(attackers: Mapping[bytes, set[bytes]]) -> set[bytes]:
    """Return those that something voids which is itself not voided."""
    counts: set[bytes] = set()
    out: set[bytes] = set()
    while True:
        undecided = attackers.keys() - counts - out
        found = {one for one in undecided if out.issuperset(attackers[one])}
        lost = {one for one in undecided if not counts.isdisjoint(attackers[one])}
        if not found and not lost:
            return out
        counts |= found
        out |= lost


def _target(statement: Statement) -> bytes:
    assert isinstance(statement.body, Revocation)
    return statement.body.target


_KIND_MAX: Mapping[type, int] = {
    Policy: 1,
    Invitation: INVITATIONS_MAX,
    Revocation: REVOCATIONS_MAX,
    Grant: GRANTS_MAX,
}

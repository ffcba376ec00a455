"""Members of a mesh, and statements of trust of theirs, for tests.

founder ─┬─ anna (admin)
         ├─ bert (admin) ── rosa (admin)
         └─ paul (invite) ─┬─ carl (serve) ── lars (serve, by its network)
                           └─ dora (invite) ── emma (serve)
"""

from __future__ import annotations

from collections.abc import Iterable

from p2pmesh.identity.credentials import LAN_TTL_S, Basis, Credential, Role
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.wire.statements import (
    Body,
    Grant,
    Invitation,
    Policy,
    Revocation,
    Statement,
    offer_proof,
    state,
)
from tests.identity.builders import FOREVER_S, FOUNDED_AT, FOUNDER, FOUNDERS, MESH, credential

NOW = 1_800_000_000


class Person:
    """A member with its key and credential."""

    def __init__(
        self,
        name: str,
        role: Role = Role.SERVE,
        by: Person | None = None,
        *,
        basis: Basis = "grant",
        at: float = FOUNDED_AT,
        ttl_s: int = FOREVER_S,
    ) -> None:
        self.key = SigningKey(name.encode().ljust(32, b"."))
        signer, own = (by.key, by.own) if by else (FOUNDER, FOUNDERS)
        self.own: Credential = credential(
            self.key, role, signer=signer, own=own, basis=basis, now=at, ttl_s=ttl_s
        )

    @property
    def id(self) -> NodeId:
        return NodeId(self.key.id)

    @property
    def link(self) -> bytes:
        """The id of the delegation to this member."""
        return self.own.last.id

    def says(self, body: Body, at: float = NOW) -> Statement:
        return state(self.key, self.own, body, mesh=MESH, now=at)

    def revokes(
        self, target: Person | bytes, *, keeps: Iterable[bytes] = (), at: float = NOW
    ) -> Statement:
        target = target if isinstance(target, bytes) else bytes(target.id)
        return self.says(Revocation(target=target, keeps=frozenset(keeps)), at)

    def invites(self, number: int = 0, *, at: float = NOW, until: int = NOW + 3600) -> Statement:
        key = SigningKey(number.to_bytes(32, "big"))
        return self.says(
            Invitation(
                key=key.public,
                role=Role.SERVE,
                stage=False,
                until=until,
                uses=0,
                proof=offer_proof(key, mesh=MESH, owner=self.id),
            ),
            at,
        )

    def lays_down(self, number: int, *, is_open: bool, at: float = NOW) -> Statement:
        return self.says(
            Policy(number=number, open=is_open, name="home", founded_at=int(FOUNDED_AT)), at
        )

    def grants(
        self,
        target: Person,
        role: Role = Role.SERVE,
        *,
        at: float = NOW,
        ttl_s: int = FOREVER_S,
        basis: Basis = "grant",
    ) -> Statement:
        given = credential(
            target.key, role, signer=self.key, own=self.own, now=at, ttl_s=ttl_s, basis=basis
        )
        return self.says(Grant(credential=given), at)


FOUNDERS_ID = NodeId(FOUNDER.id)
ANNA = Person("anna", Role.ADMIN)
BERT = Person("bert", Role.ADMIN)
ROSA = Person("rosa", Role.ADMIN, BERT)
PAUL = Person("paul", Role.INVITE)
CARL = Person("carl", Role.SERVE, PAUL)
DORA = Person("dora", Role.INVITE, PAUL)
EMMA = Person("emma", Role.SERVE, DORA)
LARS = Person("lars", Role.SERVE, CARL, basis="lan", at=NOW - 1000, ttl_s=LAN_TTL_S)
EVERYBODY = (ANNA, BERT, ROSA, PAUL, CARL, DORA, EMMA, LARS)
NAMES = {one.id: name for one, name in zip(
    EVERYBODY, ("anna", "bert", "rosa", "paul", "carl", "dora", "emma", "lars"), strict=True
)}  # fmt: skip

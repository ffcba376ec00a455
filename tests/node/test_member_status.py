"""Who belongs to a mesh, as people are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import pytest

from p2pmesh.config import Address
from p2pmesh.discovery.heard import Waiting as HeardNewcomer
from p2pmesh.identity.credentials import Credential, Role
from p2pmesh.identity.keys import NodeId, SigningKey, show_id
from p2pmesh.identity.tokens import TOKEN_SEED_BYTES, Token
from p2pmesh.node.admission import Waiting
from p2pmesh.node.member_status import (
    away,
    invitations,
    mesh_rules,
    newcomers,
    notices,
    only_admin,
    standing,
)
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.roster import Seen
from p2pmesh.state.registers import Member
from p2pmesh.state.trust import Trust
from p2pmesh.state.views import NodeView
from p2pmesh.wire.statements import Body, Grant, Invitation, Policy, Revocation, Statement, state
from tests.identity.builders import FOUNDED_AT, FOUNDER, FOUNDERS, MESH, MESH_KEY, credential

ANNA, BERT = SigningKey(b"A" * 32), SigningKey(b"B" * 32)
ME = NodeId(FOUNDER.id)
NOW = FOUNDED_AT + 100


@dataclass
class View:
    nodes: dict[NodeId, NodeView] = field(default_factory=dict)


class Told:
    """A mesh of some members, and what was laid down in it."""

    me, now, refusal = ME, NOW, ""

    def __init__(self, here: Mapping[str, Credential], *statements: Statement) -> None:
        self.statements = statements
        self.trust = Trust(statements)
        self.view = View({one.node: _view(name, one) for name, one in here.items()})

    @property
    def names(self) -> dict[NodeId, str]:
        return {node: view.member.name for node, view in self.view.nodes.items()}


def _view(name: str, own: Credential) -> NodeView:
    member = Member(name=name, addresses=(), version="0.1.0")
    return NodeView(
        node=own.node, instance=1, member=member, caps=None, serves={}, held={}, credential=own
    )


def mesh_of(here: Mapping[str, Credential], *statements: Statement) -> Mesh:
    return cast("Mesh", Told(here, *statements))


def by_founder(body: Body, at: float = FOUNDED_AT + 10) -> Statement:
    return state(FOUNDER, FOUNDERS, body, mesh=MESH, now=at)


def policy(*, is_open: bool) -> Statement:
    body = Policy(number=1, open=is_open, name="quiet-otter", founded_at=int(FOUNDED_AT))
    return state(MESH_KEY, None, body, mesh=MESH, now=FOUNDED_AT)


@dataclass
class Around:
    waiting: tuple[HeardNewcomer, ...] = ()
    others: list[str] = field(default_factory=list)
    admits: bool = False
    announces: bool = False


@dataclass
class Door:
    waiting: list[Waiting] = field(default_factory=list)
    used: int = 0

    def uses(self, invitation: bytes) -> int:
        return self.used


@dataclass
class Own:
    warnings: list[str] = field(default_factory=list)


@pytest.mark.parametrize("is_open", [True, False])
def test_the_rules_of_the_mesh_are_told(is_open: bool) -> None:  # noqa: FBT001
    around = Around(others=["jolly-fox"], admits=True, announces=True)
    mesh = mesh_of({"me": FOUNDERS}, policy(is_open=is_open))
    assert mesh_rules(mesh, ME, around) == {
        "open": is_open,
        "announced": True,
        "others": ["jolly-fox"],
        "only_admin": show_id(ME),
    }
    assert mesh_rules(mesh, None, around)["only_admin"] == ""
    assert mesh_rules(mesh_of({}), None, around)["open"] is False


def test_what_a_node_may_do_and_how_it_came_in_is_told() -> None:
    via = b"v" * 16
    invited = credential(ANNA, Role.INVITE, stage=True, basis="invite", via=via)
    below = credential(BERT, signer=ANNA, own=invited, basis="lan")
    mesh = mesh_of({"me": FOUNDERS, "anna": invited})
    assert standing(mesh, FOUNDERS) == {
        "role": "admin",
        "stage": True,
        "basis": "founder",
        "by": "",
        "via": "",
        "expires_at": FOUNDERS.expires_at,
    }
    assert standing(mesh, invited) == {
        "role": "invite",
        "stage": True,
        "basis": "invite",
        "by": "me",
        "via": show_id(via),
        "expires_at": invited.expires_at,
    }
    assert standing(mesh, below)["by"] == "anna"
    assert standing(mesh_of({}), below)["by"] == show_id(ANNA.id)  # who is not here has no name
    assert standing(mesh, None)["role"] == ""


def invitation_of(seed: bytes, *, uses: int, until: float) -> tuple[Invitation, Token]:
    token = Token(mesh=MESH, seed=seed * TOKEN_SEED_BYTES, addresses=())
    invitation = Invitation(
        key=token.key.public, role=Role.SERVE, stage=False, until=int(until), uses=uses
    )
    return invitation, token


def test_invitations_are_told_without_their_secrets() -> None:
    anna = credential(ANNA, Role.INVITE)
    mine, token = invitation_of(b"a", uses=2, until=NOW + 60)
    hers, _ = invitation_of(b"b", uses=3, until=NOW + 120)
    for_all, _ = invitation_of(b"c", uses=0, until=NOW + 30)
    over, _ = invitation_of(b"d", uses=1, until=NOW)
    mesh = mesh_of(
        {"me": FOUNDERS, "anna": anna},
        *map(by_founder, (mine, for_all, over)),
        state(ANNA, anna, hers, mesh=MESH, now=FOUNDED_AT + 10),
    )
    told = invitations(mesh, Door(used=1))
    assert [(one["id"], one["uses"], one["used"], one["by"]) for one in told] == [
        (show_id(for_all.id), 0, None, "me"),
        (show_id(mine.id), 2, 1, "me"),
        (show_id(hers.id), 3, None, "anna"),
    ]
    assert told[1] == {
        "id": show_id(mine.id),
        "role": "serve",
        "stage": False,
        "until": NOW + 60,
        "uses": 2,
        "used": 1,
        "by": "me",
    }
    assert str(token) not in str(told)


def test_a_revoked_invitation_is_not_told() -> None:
    mine, _ = invitation_of(b"a", uses=2, until=NOW + 60)
    revoked = by_founder(Revocation(target=mine.id, keeps=frozenset()), FOUNDED_AT + 20)
    assert invitations(mesh_of({"me": FOUNDERS}, by_founder(mine), revoked), Door()) == []


def test_newcomers_are_told_once_whoever_noticed_them() -> None:
    carl, dora = NodeId(b"c" * 16), NodeId(b"d" * 16)
    door = Door(waiting=[Waiting(node=carl, name="carl", host="192.168.1.33", at=0.0)])
    address = Address("192.168.1.33", 9338)
    around = Around(
        waiting=(
            HeardNewcomer(node=carl, name="carl", mesh=None, address=address),
            HeardNewcomer(node=dora, name="", mesh=MESH, address=Address("fe80::1%eth0", 1)),
        )
    )
    mesh = mesh_of({"me": FOUNDERS})
    assert newcomers(mesh, door, around) == [
        {"id": show_id(dora), "name": show_id(dora), "host": "fe80::1%eth0"},
        {"id": show_id(carl), "name": "carl", "host": "192.168.1.33"},
    ]


def test_who_has_come_in_waits_no_more() -> None:
    anna = credential(ANNA)
    address = Address("192.168.1.33", 9338)
    heard = HeardNewcomer(node=anna.node, name="anna", mesh=None, address=address)
    door = Door(waiting=[Waiting(node=anna.node, name="anna", host="192.168.1.33", at=0.0)])
    around = Around(waiting=(heard,))
    assert len(newcomers(mesh_of({"me": FOUNDERS}), door, around)) == 1
    assert newcomers(mesh_of({"me": FOUNDERS, "anna": anna}), door, around) == []


def test_members_that_are_away_are_told_unless_their_membership_is_over() -> None:
    anna, bert = credential(ANNA), credential(BERT, ttl_s=50)
    known = {
        one.node: Seen(name=name, credential=one)
        for name, one in (("anna", anna), ("bert", bert), ("me", FOUNDERS))
    }
    [told] = away(mesh_of({"me": FOUNDERS}), known)
    assert told == {
        "id": show_id(anna.node),
        "name": "anna",
        **standing(mesh_of({"me": FOUNDERS}), anna),
    }
    assert away(mesh_of({"me": FOUNDERS, "anna": anna}), known) == []
    revoked = by_founder(Revocation(target=anna.node, keeps=frozenset()))
    assert away(mesh_of({"me": FOUNDERS}, revoked), known) == []


# The only admin


def seen(*some: Credential) -> dict[NodeId, Seen]:
    return {one.node: Seen(name="somebody", credential=one) for one in some}


def test_the_founder_is_the_only_admin_until_there_is_another() -> None:
    anna = credential(ANNA, Role.ADMIN)
    assert only_admin(mesh_of({"me": FOUNDERS}), {}) == ME
    assert only_admin(mesh_of({"me": FOUNDERS, "anna": anna}), {}) is None
    assert only_admin(mesh_of({}), {}) is None


def test_an_admin_that_is_away_is_one_however_it_is_known() -> None:
    anna = credential(ANNA, Role.ADMIN)
    mesh = mesh_of({"me": FOUNDERS})
    assert only_admin(mesh, seen(anna)) is None
    assert only_admin(mesh_of({"me": FOUNDERS}, by_founder(Grant(credential=anna))), {}) is None
    below = credential(BERT, signer=ANNA, own=anna)
    assert only_admin(mesh_of({"me": FOUNDERS, "bert": below}), {}) is None  # the chain names anna
    said = state(ANNA, anna, invitation_of(b"a", uses=1, until=NOW)[0], mesh=MESH, now=NOW - 50)
    assert only_admin(mesh_of({"me": FOUNDERS}, said), {}) is None


def test_an_admin_that_is_revoked_or_over_is_none() -> None:
    anna = credential(ANNA, Role.ADMIN)
    revoked = by_founder(Revocation(target=anna.node, keeps=frozenset()))
    assert only_admin(mesh_of({"me": FOUNDERS}, revoked), seen(anna)) == ME
    assert only_admin(mesh_of({"me": FOUNDERS}), seen(credential(ANNA, Role.ADMIN, ttl_s=99))) == ME


# Notices


def test_what_is_lost_with_the_only_admin_is_said_and_how_to_make_another() -> None:
    mesh = mesh_of({"me": FOUNDERS, "anna": credential(ANNA)})
    [mine] = notices(mesh, ME, Own())
    assert mine.startswith("This node is the only admin of this mesh: if it is lost, nobody can")
    assert mine.endswith("p2pmesh grant NODE admin")
    [hers] = notices(mesh, NodeId(ANNA.id), Own())
    assert hers.startswith("anna is the only admin of this mesh")
    assert notices(mesh, None, Own()) == []
    assert notices(mesh_of({"me": FOUNDERS}), ME, Own()) == []


def test_what_this_node_may_lose_is_said_first() -> None:
    mesh = mesh_of({"me": FOUNDERS, "anna": credential(ANNA)})
    assert notices(mesh, ME, Own(warnings=["It runs out in 3 days"]))[0] == "It runs out in 3 days"

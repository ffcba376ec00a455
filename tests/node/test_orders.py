"""The orders of people, as they come over the control API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from p2pmesh.config import Address
from p2pmesh.discovery.heard import Waiting
from p2pmesh.errors import ConfigError, LocalError
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import RefusedError
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.identity.recovery import recovery_code
from p2pmesh.identity.tokens import Token, parse_token
from p2pmesh.node.joining import Entry, Joiner
from p2pmesh.node.keystore import load_statements
from p2pmesh.node.life import MeshLife
from p2pmesh.node.local_network import LocalNetwork
from p2pmesh.node.mesh import CREDENTIALS_INTERVAL_S
from p2pmesh.node.orders import Orders
from tests.identity.builders import FOUNDER, MESH
from tests.node.cards import founded
from tests.node.members import Member, Members, key_of, members, newcomer

DORA = NodeId(key_of(9).id)


@dataclass
class Around:
    """Stands in for what is heard around a node."""

    waiting: list[Waiting] = field(default_factory=list)
    admitted: list[NodeId] = field(default_factory=list)

    def admit(self, node: NodeId) -> None:
        self.admitted.append(node)


@dataclass
class Ordered:
    """The founder of a mesh, and what its orders lead to beyond it."""

    made: Members
    founder: Member
    around: Around = field(default_factory=Around)
    changes: list[Entry] = field(default_factory=list)
    left: list[None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.orders = Orders(
            lambda: cast("MeshLife", self.founder),  # what orders use of a life, a member has
            self.made.joiner("the-founders", 0),
            cast("LocalNetwork", self.around),
            self.changes.append,
            lambda: self.left.append(None),
        )

    async def give(self, name: str, **values: Any) -> dict[str, Any]:
        return await self.orders.give(name, values)


@asynccontextmanager
async def ordered(folder: Path, *, is_open: bool = True) -> AsyncIterator[Ordered]:
    async with members(folder, is_open=is_open) as made:
        yield Ordered(made, await made.start("founder"))


async def test_an_invitation_is_for_one_day_one_machine_and_the_role_serve(tmp_path: Path) -> None:
    async with ordered(tmp_path) as node:
        answer = await node.give("invite")
        token = parse_token(answer["token"])
        assert token.addresses == (node.founder.address,)
        assert answer == {
            "token": str(token),
            "id": show_id(token.key.id),
            "role": "serve",
            "stage": True,
            "until": int(node.founder.mesh.now) + 86400,
            "uses": 1,
            "addresses": ["memory:1"],
        }
        assert (await node.founder.join(token, newcomer(1))).role is Role.SERVE


async def test_an_invitation_as_it_was_wanted(tmp_path: Path) -> None:
    async with ordered(tmp_path) as node:
        answer = await node.give("invite", role="invite", stage=False, for_s=60, uses=0)
        assert (answer["role"], answer["stage"], answer["uses"]) == ("invite", False, 0)
        guest = await node.give("invite", role="use")
        assert guest["stage"] is False


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("obey", {}, "there is no order 'obey'"),
        ("", {}, "there is no order ''"),
        ("invite", {"role": "king"}, "'king' is no role: use, serve, invite or admin"),
        ("invite", {"role": 5}, "role is missing, or no text"),
        ("invite", {"role": None}, "role is missing, or no text"),
        ("invite", {"stage": "yes"}, "stage is neither true nor false"),
        ("invite", {"stage": 1}, "stage is neither true nor false"),
        ("invite", {"for_s": "24h"}, "for_s is no whole number"),
        ("invite", {"for_s": 1.5}, "for_s is no whole number"),
        ("invite", {"for_s": 0}, "an invitation lasts at most a year"),
        ("invite", {"uses": True}, "uses is no whole number"),
        ("invite", {"uses": -1}, "an invitation lasts at most a year"),
        ("invite", {"uses": 10**30}, "an invitation lasts at most a year"),
        ("revoke", {}, "target is missing, or no text"),
        ("revoke", {"target": " "}, "target is missing, or no text"),
        ("revoke", {"target": ["anna"]}, "target is missing, or no text"),
        ("revoke", {"target": "anna", "below": "no"}, "below is neither true nor false"),
        ("revoke", {"target": "anna"}, "there is no node or invitation 'anna'"),
        ("grant", {"target": "anna"}, "what is missing, or no text"),
        ("grant", {"target": "anna", "what": "king"}, "'king' is no role"),
        ("grant", {"target": "anna", "what": "stage"}, "there is no node 'anna'"),
        ("grant", {"what": "serve"}, "target is missing, or no text"),
        ("admit", {}, "target is missing, or no text"),
        ("admit", {"target": "anna"}, "there is no node waiting 'anna'"),
        ("join", {}, "join is missing, or no text"),
        ("join", {"join": ":::"}, "is not an address"),
        ("join", {"join": "p2pmesh1-junk"}, "this invitation is incomplete or misspelt"),
        ("join", {"join": "p2pmesh9-junk"}, "this invitation is of another version"),
    ],
)
async def test_what_cannot_be_meant_is_refused_and_changes_nothing(
    tmp_path: Path, name: str, values: dict[str, Any], says: str
) -> None:
    async with ordered(tmp_path) as node:
        before = node.founder.mesh.statements
        with pytest.raises(ConfigError) as caught:
            await node.orders.give(name, values)
        assert says in str(caught.value)
        assert node.founder.mesh.statements == before
        assert (node.changes, node.left, node.around.admitted) == ([], [], [])


async def test_what_this_node_may_not_is_another_error(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = Ordered(made, await made.start_with("anna", 1, Role.SERVE, founder))
        with pytest.raises(LocalError, match="may not invite anybody; an admin can"):
            await anna.give("invite")


async def test_members_are_granted_and_revoked(tmp_path: Path) -> None:
    async with ordered(tmp_path) as node:
        anna = await node.made.start_with("anna", 1, Role.SERVE, node.founder)
        granted = await node.give("grant", target="anna", what="admin")
        assert granted == {"sentences": ["anna has the role admin now."]}
        best = node.founder.mesh.trust.best_grant(anna.node, node.founder.mesh.now)
        assert best is not None
        assert best.role is Role.ADMIN
        granted = await node.give("grant", target="anna", what="stage")
        assert "the right stage" in granted["sentences"][0]
        revoked = await node.give("revoke", target=show_id(anna.node)[:8], below=True)
        assert revoked["sentences"][0] == "anna is out of the mesh."
        assert node.founder.mesh.vouch(anna.card.credential)


async def test_an_admin_has_nothing_to_recover(tmp_path: Path) -> None:
    async with ordered(tmp_path) as here:
        with pytest.raises(ConfigError, match="a recovery code begins with"):
            await here.orders.give("recover", {"code": "abc"})
        with pytest.raises(LocalError, match="this node is an admin of"):
            await here.orders.give("recover", {"code": recovery_code(b"m" * 32)})


async def test_who_waits_is_let_in_by_name(tmp_path: Path) -> None:
    async with ordered(tmp_path, is_open=False) as node:
        with pytest.RaisesGroup(RefusedError, flatten_subgroups=True):
            await node.founder.join_lan(newcomer(1), "annas-laptop")
        node.around.waiting = [
            Waiting(node=DORA, name="doras-laptop", mesh=None, address=Address("a", 1))
        ]
        said = await node.give("admit", target="annas-laptop")
        assert said == {
            "sentences": ["annas-laptop may join now, which it does when it asks again."]
        }
        assert (await node.founder.join_lan(newcomer(1))).node == newcomer(1).node
        await node.give("admit", target=show_id(DORA)[:5])
        assert node.around.admitted == [newcomer(1).node, DORA]


async def test_a_mesh_that_this_node_is_in_is_not_joined_again(tmp_path: Path) -> None:
    async with ordered(tmp_path) as node:
        said = await node.give("join", join=f"  {node.founder.invite()} ")
        assert said == {"sentences": ["This node is in the mesh quiet-otter already."]}
        assert node.changes == []


@pytest.mark.parametrize("way", ["192.168.1.5", "an invitation"])
async def test_a_node_goes_into_another_mesh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    there = Entry(card=founded(FOUNDER))
    wanted: list[object] = []

    async def by_name(self: Joiner, ways: Iterable[object], note: object) -> Entry:
        await trio.lowlevel.checkpoint()
        wanted.extend(ways)
        return there

    monkeypatch.setattr(Joiner, "by_name", by_name)
    token = Token(mesh=there.card.id, seed=b"s" * 16, addresses=(Address("10.0.0.1", 1),))
    async with ordered(tmp_path) as node:
        said = await node.give("join", join=str(token) if way == "an invitation" else way)
        assert said == {"sentences": ["This node leaves quiet-otter and joins quiet-lynx."]}
        assert node.changes == [there]
    assert wanted == [token if way == "an invitation" else Address("192.168.1.5", 9338)]


async def test_an_invitation_that_leads_nowhere_changes_nothing(tmp_path: Path) -> None:
    async with ordered(tmp_path) as node:
        unknown = Token(mesh=MESH, seed=b"s" * 16, addresses=(node.founder.address,))
        with pytest.raises(LocalError, match="Cannot join: memory:1: this invitation is not known"):
            await node.give("join", join=str(unknown))
        assert node.changes == []


async def test_a_node_leaves(tmp_path: Path) -> None:
    async with ordered(tmp_path) as node:
        said = await node.give("leave")
        assert said == {"sentences": ["This node leaves the mesh quiet-otter and stops."]}
        assert node.left == [None]
        assert node.founder.node == FOUNDER.id


async def test_with_a_full_disk_the_person_is_told_that_it_will_be_forgotten(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with ordered(tmp_path) as node:
        anna = await node.made.start_with("anna", 1, Role.SERVE, node.founder)
        await node.founder.knows(anna)
        file = node.founder.home.statements_file
        file.unlink()
        file.mkdir()  # it cannot be written
        granted = await node.give("grant", target="anna", what="invite")
        told = node.founder.membership.warnings
        assert granted["sentences"] == ["anna has the role invite now.", *told]
        assert told[0].startswith(
            f"What was decided about members is forgotten when this node stops: Cannot write {file}"
        )
        file.rmdir()
        await trio.sleep(CREDENTIALS_INTERVAL_S + 1)
        assert node.founder.membership.warnings == []
        assert {*load_statements(node.founder.home, MESH)} == {*node.founder.mesh.statements}

"""Members of one mesh on a network in memory, each with all that decides who belongs to it.

Links, hellos, streams and files are real; there are no engines, ports and other networks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio
from trio.testing import memory_stream_pair

from p2pmesh.config import Address
from p2pmesh.errors import LocalError, MeshError
from p2pmesh.gossip.membership import Gossip
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Credential, Role
from p2pmesh.identity.hello import JOIN, LAN, LocalIdentity, Peer, Purpose
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.identity.tokens import Token, prove
from p2pmesh.node.admission import Admission, Answer, ask_with
from p2pmesh.node.authority import Authority
from p2pmesh.node.joining import Door, Joiner
from p2pmesh.node.keystore import (
    MeshInfo,
    load_statements,
    next_epoch,
    save_epoch,
    save_mesh,
    save_statements,
)
from p2pmesh.node.membership import Membership
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.roster import Seen
from p2pmesh.state.trust import members_only
from p2pmesh.transport.memory import MemoryNetwork, MemoryTransport
from p2pmesh.wire.registers import MEMBER
from p2pmesh.wire.statements import Policy, Statement, state
from tests.identity.builders import FOUNDED_AT, FOUNDER, FOUNDERS, MESH, MESH_KEY, credential
from tests.node.cards import card_of
from tests.node.meshes import clock, until
from tests.state.builders import member

NAME = "quiet-otter"
HOST = "192.168.1.50"  # from which newcomers ask
DEADLINE_S = 2000.0  # on the tests' own clock, more than any of them waits


def policy(*, is_open: bool = True) -> Statement:
    """The rules with which the mesh was founded."""
    rules = Policy(number=1, open=is_open, name=NAME, founded_at=int(FOUNDED_AT))
    return state(MESH_KEY, None, rules, mesh=MESH, now=FOUNDED_AT)


def key_of(number: int) -> SigningKey:
    return SigningKey(b"key" + number.to_bytes(29, "big"))


def newcomer(number: int, *, host: str = HOST, own: Credential | None = None) -> Peer:
    """A node as its hello tells of it; a stranger unless it has a credential."""
    key = key_of(number)
    return Peer(
        node=NodeId(key.id),
        public=key.public,
        instance=1,
        mesh=MESH,
        mesh_name=NAME,
        purpose=JOIN,
        version=3,
        clock_ahead_s=0,
        credential=own,
        binding=number.to_bytes(32, "big"),
        host=host,
    )


def request_with(token: Token, peer: Peer) -> dict[str, Any]:
    """What `peer` says to become a member by an invitation."""
    proof = prove(token, node=peer.public, binding=peer.binding)
    return {"name": "new", "i": token.key.public, "s": proof}


@dataclass
class Member:
    """One member."""

    name: str
    key: SigningKey
    home: Home
    address: Address
    card: MeshInfo
    mesh: Mesh
    lan_refusal: str = ""
    dropped: list[MeshError] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    failure: str = ""
    ended: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.membership = Membership(self.key, self.card, self.mesh, self._keep)
        self.authority = Authority(
            self.mesh, MESH, self.membership.issuer, lambda: (self.address,), self._seen
        )
        self.restart_admission()

    def restart_admission(self) -> None:
        """Read from disk again what this member counts there."""
        self.admission = Admission(self.mesh, self.home, self.membership.issuer, self._refuse_from)

    @property
    def node(self) -> NodeId:
        return self.mesh.me

    def invite(self, *, uses: int = 0, role: Role = Role.SERVE, for_s: int = 3600) -> Token:
        return self.authority.invite(role=role, stage=False, for_s=for_s, uses=uses).token

    async def ask(self, peer: Peer, request: Mapping[str, Any], purpose: Purpose = JOIN) -> Answer:
        """What this member answers to a peer on a stream of its own."""
        ours, theirs = memory_stream_pair()
        async with trio.open_nursery() as nursery, ours:
            nursery.start_soon(self.serve, peer, theirs, purpose)
            return await ask_with(ours, dict(request))

    async def join(self, token: Token, peer: Peer) -> Credential:
        return (await self.ask(peer, request_with(token, peer))).credential

    async def join_lan(self, peer: Peer, name: str = "new") -> Credential:
        return (await self.ask(peer, {"name": name}, LAN)).credential

    async def serve(self, peer: Peer, stream: trio.abc.Stream, purpose: Purpose = JOIN) -> None:
        """Answer one stream, as a transport would have it answered."""
        async with stream:
            try:
                await self.admission.handlers()[purpose].handler(peer, stream)
            except MeshError as exc:
                self.dropped.append(exc)

    async def knows(self, *others: Member) -> None:
        """Wait until this member is linked with others and has heard of them."""
        nodes = {one.node for one in others}
        await until(self.mesh, lambda: nodes <= self.mesh.linked & self.mesh.view.nodes.keys())

    async def hears(self, token: Token) -> None:
        """Wait until this member knows of an invitation."""
        await until(self.mesh, lambda: token.key.id in self.mesh.trust.invitations)

    async def _refuse_from(self, _host: str) -> str:
        await trio.lowlevel.checkpoint()
        return self.lan_refusal

    def _keep(self, card: MeshInfo) -> None:
        self.card = card
        save_mesh(self.home, card)

    def _seen(self) -> dict[NodeId, Seen]:
        views = self.mesh.view.nodes.items()
        return {
            node: Seen(name=view.member.name, credential=view.credential)
            for node, view in views
            if view.credential
        }

    async def run(self, *, task_status: trio.TaskStatus[object]) -> None:
        with self.scope:
            try:
                await self.mesh.run(self.admission.handlers(), task_status=task_status)
            except LocalError as exc:
                self.failure = str(exc)
                self.ended.set()


class Members:
    """Makes members, and runs them in one nursery."""

    def __init__(self, folder: Path, nursery: trio.Nursery, *, is_open: bool) -> None:
        self.network = MemoryNetwork()
        self.folder = folder
        self._nursery = nursery
        self._policy = policy(is_open=is_open)
        self._numbers = 0

    async def start(
        self,
        name: str,
        *,
        key: SigningKey | None = None,
        own: Credential | None = None,
        seeds: Iterable[Member] = (),
    ) -> Member:
        """A member that runs; the founder, unless it has a key and a credential of its own."""
        self._numbers += 1
        key, own = key or FOUNDER, own or FOUNDERS
        home = Home.at(self.folder / name)
        home.create()
        if not home.statements_file.exists():
            save_statements(home, MESH, [self._policy])
        save_mesh(home, card_of(own, NAME))
        address = Address("memory", self._numbers)
        made: list[Member] = []

        def me() -> LocalIdentity:
            (one,) = made
            return LocalIdentity(
                key=key,
                instance=1,
                mesh=MESH,
                mesh_name=NAME,
                credential=one.card.credential.raw,
                vouch=one.mesh.vouch,
            )

        core = Gossip(
            key=key,
            mesh=MESH,
            instance=1,
            epoch=next_epoch(home, clock()),
            seeds=tuple(one.address for one in seeds),
            authorised=members_only,
            statements=load_statements(home, MESH),
            credential=own,
        )
        mesh = Mesh(
            core,
            MemoryTransport(me, self.network, address, clock),
            save_epoch=partial(save_epoch, home),
            clock=clock,
            save_statements=partial(save_statements, home, MESH),
            credential=own,
        )
        mesh.publish(MEMBER, member(name, addresses=(address,)).to_wire())
        made.append(Member(name, key, home, address, card_of(own, NAME), mesh))
        await self._nursery.start(made[0].run)
        return made[0]

    async def start_with(
        self, name: str, number: int, role: Role, founder: Member, *, stage: bool = False
    ) -> Member:
        """A member with a role that the founder gave it, linked with the founder."""
        key = key_of(number)
        own = credential(key, role, stage=stage)
        started = await self.start(name, key=key, own=own, seeds=[founder])
        await started.knows(founder)
        await founder.knows(started)
        return started

    def joiner(self, name: str, number: int) -> Joiner:
        """A node of this network that has no mesh."""
        home = Home.at(self.folder / name)
        home.create()
        me = LocalIdentity(key=key_of(number), instance=1, mesh=None)
        nowhere = Address("memory", 0)
        transport = MemoryTransport(lambda: me, self.network, nowhere, clock)
        door = Door(introduce=transport.introduce, ask=transport.ask, identify=_unknown)
        return Joiner(home, me, name, door, clock)


async def _unknown(_address: Address) -> str:
    await trio.lowlevel.checkpoint()
    return ""


@asynccontextmanager
async def members(folder: Path, *, is_open: bool = True) -> AsyncIterator[Members]:
    """Nothing runs any more at the end, and nothing may take for ever."""
    async with trio.open_nursery() as nursery:
        with trio.fail_after(DEADLINE_S):
            yield Members(folder, nursery, is_open=is_open)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def founder_of(folder: Path, *, is_open: bool = True) -> AsyncIterator[Member]:
    """The only member of a mesh."""
    async with members(folder, is_open=is_open) as made:
        yield await made.start("founder")

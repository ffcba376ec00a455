"""One node's life in one mesh: from the first hello to the goodbye.

Here is what belongs to one mesh: its records, the plan that follows from them, the links, the
address book. Engines, models, ports, API and console outlive it (`run.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import structlog
import trio

from p2pmesh.config import Address
from p2pmesh.engine.argv import engine_modality
from p2pmesh.errors import LocalError
from p2pmesh.gateway.serve import Gateway
from p2pmesh.gossip.membership import Gossip
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import HTTP, LocalIdentity, Needs, Peer, Vouch
from p2pmesh.identity.keys import MeshId, NodeId
from p2pmesh.models.parts import ReplicaKey
from p2pmesh.node.admission import Admission
from p2pmesh.node.authority import Authority
from p2pmesh.node.backends import MeshBackends
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.interfaces import advertised, for_invitation
from p2pmesh.node.inventory import InventoryPublisher, ModelInventory
from p2pmesh.node.joining import Entry, Joiner
from p2pmesh.node.keystore import (
    MeshInfo,
    load_book,
    load_statements,
    next_epoch,
    save_book,
    save_epoch,
    save_mesh,
    save_statements,
)
from p2pmesh.node.local_network import LocalNetwork
from p2pmesh.node.membership import Membership
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.pipelines import Pipelines
from p2pmesh.node.plan_report import PlanReporter
from p2pmesh.node.presence import Own, Presence
from p2pmesh.node.proofs import ask_replica
from p2pmesh.node.rankings import Rankings
from p2pmesh.node.reconciler import Reconciler
from p2pmesh.node.roster import Roster, Seen
from p2pmesh.node.shards import Shards
from p2pmesh.state.registers import ModelRequest, wants_to_wire
from p2pmesh.state.trust import members_only
from p2pmesh.transport.base import Service, Transport
from p2pmesh.watchable import Watchable
from p2pmesh.wire.registers import WANTS

GOODBYE_S = 1.0
BOOK_PAUSE_S = 1.0  # between two writes of the address book, when many nodes join at once

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lasting:
    """The parts of a node that outlive its mesh.

    Attributes:
        wanted: What it asks any mesh to serve.
        slots: Requests at the same time, where no want says otherwise.
        changes: Notified of each change of the present mesh.
        network: What is around this node.
        joiner: Gets it into other meshes.
        change_mesh: Begins to leave the present mesh for another one.
    """

    home: Home
    clock: Callable[[], float]
    transport: Transport
    engines: EngineManager
    inventory: ModelInventory
    gateway: Gateway
    own: Own
    wanted: tuple[ModelRequest, ...]
    slots: int
    changes: Watchable
    network: LocalNetwork
    joiner: Joiner
    change_mesh: Callable[[Entry], None]


class MeshLife:
    """One node's life in one mesh; run once.

    Args:
        lasting: The node.
        me: Its identity in this mesh, as the transport states it by now.
        entry: The mesh, and where members of it may be found.
        state_identity: Has every hello say that this node is a member, with what credential.

    Attributes:
        mesh: The access to it.
        membership: This node's own.
        admission: Lets others in.
        authority: What people decide about members.
        roster: Who was seen as a member.
        reconciler: Makes the plan and follows it.
        routes: The gateway's way to its models.
        planner: Says what the plan is, and what it would be.
    """

    def __init__(
        self,
        lasting: Lasting,
        me: LocalIdentity,
        entry: Entry,
        state_identity: Callable[[MeshInfo, Vouch], None],
    ) -> None:
        self.card = card = entry.card
        self._entry, self._lasting = entry, lasting
        self._state_identity = state_identity
        core = Gossip(
            key=me.key,
            mesh=card.id,
            instance=me.instance,
            epoch=next_epoch(lasting.home, lasting.clock()),
            seeds=entry.seeds,
            book=load_book(lasting.home, card.id),
            authorised=members_only,
            statements=load_statements(lasting.home, card.id),
            credential=card.credential,
        )
        self.mesh = Mesh(
            core,
            lasting.transport,
            save_epoch=partial(save_epoch, lasting.home),
            clock=lasting.clock,
            save_statements=partial(save_statements, lasting.home, card.id),
            credential=card.credential,
            changes=lasting.changes,  # of all its meshes, so that who waits is woken by each
        )
        self.membership = Membership(me.key, card, self.mesh, self._keep)
        self.roster = Roster(lasting.home, card.id)
        issuer = self.membership.issuer
        self.admission = Admission(self.mesh, lasting.home, issuer, lasting.network.refusal)
        self.authority = Authority(self.mesh, card.id, issuer, self._invites_to, self.known)
        self._presence = Presence(self.mesh, lasting.own)
        self.mesh.publish(WANTS, wants_to_wire(lasting.wanted))
        self._publisher = InventoryPublisher(self.mesh, lasting.inventory)
        self._pipelines = Pipelines(self.mesh, lasting.engines)
        library = lasting.inventory.library
        self._rankings = Rankings(
            self.mesh, library, lasting.inventory.file, self._publisher.look_now
        )
        self.reconciler = Reconciler(
            self.mesh,
            lasting.engines,
            lasting.inventory,
            slots=lasting.slots,
            ask=self._ask,
            pipelines=self._pipelines,
            shards=Shards(lasting.engines, library, self._rankings.obtain),
        )
        self.routes = MeshBackends(self.mesh, self.reconciler, lasting.engines, slots=lasting.slots)
        self.planner = PlanReporter(self.mesh, self.reconciler, lasting.engines)
        self._living = trio.CancelScope()
        self._acting = trio.CancelScope()
        self._peer_streams: set[trio.CancelScope] = set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until it was left or is cancelled; started once the mesh was heard.

        Before that this node has nothing to answer with: it does not even know itself.
        """
        with self._living:
            async with trio.open_nursery() as nursery:
                http = Service(self._serve_peer, Needs(Role.USE))
                handlers = {
                    HTTP: http,
                    **self.admission.handlers(),
                    **self._pipelines.handlers(),
                    **self._rankings.handlers(),
                }
                await nursery.start(self.mesh.run, handlers)
                await nursery.start(self._act)
                await self.mesh.settled.wait()
                task_status.started()
                await keep_book(self.mesh, self._lasting.home, self.card.id)

    def say_goodbye(self) -> None:
        """Tell the others that this node leaves, so that they take over; it does nothing more.

        Its engines go on, which answer for as long as they are let.
        """
        log.info("mesh_left", mesh=self.card.name)
        self._acting.cancel()
        self._presence.say_goodbye()

    async def leave(self) -> None:
        """End this life but for the streams of peers, whose running answers `drain` waits for."""
        self.say_goodbye()
        await self.mesh.finish(GOODBYE_S)
        for stream in self._peer_streams:
            stream.shield = True
        self._living.cancel()

    async def drain(self, deadline_s: float) -> None:
        """Let the answers that peers still receive end, and cut those that do not."""
        try:
            await self._lasting.gateway.drain_peers(deadline_s)
        finally:
            for stream in self._peer_streams:
                stream.shield = False

    async def _act(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Do, until the goodbye, what is told to the mesh or follows from it."""
        with self._acting:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._presence.run)
                nursery.start_soon(self._publisher.run)
                nursery.start_soon(self._rankings.run)
                await nursery.start(self._pipelines.run)
                nursery.start_soon(self.reconciler.run)
                nursery.start_soon(self.membership.run)
                await nursery.start(self._heed_network)
                nursery.start_soon(self._keep_roster)
                task_status.started()

    async def _heed_network(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Speak for this mesh on the network around, or follow a better one that is heard there."""
        network = self._lasting.network
        await network.enter(self.card, self.mesh, is_new=self._entry.is_new)
        task_status.started()
        self._lasting.change_mesh(await network.follow(self._lasting.joiner))

    def _keep(self, card: MeshInfo) -> None:
        """Remember this mesh with another credential of this node."""
        self.card = card
        self._state_identity(card, self.mesh.vouch)
        save_mesh(self._lasting.home, card)

    def known(self) -> Mapping[NodeId, Seen]:
        """Everybody who was seen as a member, here or away, and guests."""
        return {**self.admission.guests, **self.roster.seen}

    async def _keep_roster(self) -> None:
        """Remember who is a member, until cancelled."""
        while True:
            seen = self.mesh.changes.count
            views = self.mesh.view.nodes.values()
            self.roster.note(
                Seen(name=view.member.name, credential=view.credential)
                for view in views
                if view.credential
            )
            await self.mesh.changes.wait(seen)

    def _invites_to(self) -> tuple[Address, ...]:
        """The addresses that go into an invitation: what others can reach before what they may."""
        return for_invitation(advertised(self._lasting.own.listening))

    async def _serve_peer(self, peer: Peer, stream: trio.abc.Stream) -> None:
        with trio.CancelScope() as scope:
            self._peer_streams.add(scope)
            try:
                await self._lasting.gateway.serve_peer(peer, stream)
            finally:
                self._peer_streams.discard(scope)

    async def _ask(self, replica: ReplicaKey) -> None:
        """Have the replica of a model that runs here too compute a token on its node."""
        file = self._lasting.inventory.file(replica.part.digest)
        assert file is not None, "what runs here has a file here"
        stream = await self.mesh.open_stream(replica.node, HTTP)
        await ask_replica(stream, replica, engine_modality(file.card.gives))


async def keep_book(mesh: Mesh, home: Home, mesh_id: MeshId) -> None:
    """Remember where the others of a mesh are, for the next start, until cancelled."""
    written = load_book(home, mesh_id)
    while True:
        seen = mesh.changes.count
        book = dict(mesh.book)
        if book != written:
            try:
                save_book(home, mesh_id, book)
            except LocalError as exc:
                log.warning("address_book_not_saved", reason=str(exc))
            written = book
            await trio.sleep(BOOK_PAUSE_S)
        await mesh.changes.wait(seen)

"""One node: its parts, in the order in which they start and stop.

Everything runs in one nursery tree. Parts know each other only through what is passed here.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import psutil
import structlog
import trio

from p2pmesh import __version__
from p2pmesh.config import Settings
from p2pmesh.console import serve as console
from p2pmesh.console.api import create_app
from p2pmesh.engine.argv import engine_modality
from p2pmesh.engine.find import Engine, find_engine
from p2pmesh.errors import LocalError
from p2pmesh.gateway.serve import Gateway
from p2pmesh.gossip.membership import Gossip
from p2pmesh.home import PRIVATE_MODE, Home, write_atomic
from p2pmesh.identity.hello import HTTP, LocalIdentity
from p2pmesh.identity.keys import show_id
from p2pmesh.models.parts import ReplicaKey
from p2pmesh.models.store import Store
from p2pmesh.node.backends import MeshBackends
from p2pmesh.node.clocks import SteadyClock
from p2pmesh.node.descriptors import budget, raise_limit
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.interfaces import advertised, default_name, own_host
from p2pmesh.node.inventory import InventoryPublisher, ModelInventory, Opened, open_models
from p2pmesh.node.joining import choose_mesh
from p2pmesh.node.keystore import MeshInfo, load_book, next_epoch, node_key, save_book, save_epoch
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.ports import Listening, listen
from p2pmesh.node.proofs import ask_replica
from p2pmesh.node.reconciler import Reconciler
from p2pmesh.node.status import Addresses, NodeStatus
from p2pmesh.placement.resources import Memory, Published, budget_bytes, publish
from p2pmesh.state.registers import Caps, Member, wants_to_wire
from p2pmesh.transport.tls import TlsTransport
from p2pmesh.web_policy import WebPolicy
from p2pmesh.wire.registers import CAPS, MEMBER, WANTS

DRAIN_S = 10.0  # running answers get this long after the first Ctrl-C
GOODBYE_S = 1.0
MEASURE_INTERVAL_S = 5.0
BOOK_PAUSE_S = 1.0  # between two writes of the address book, when many nodes join at once
PORTS = ("peer", "api", "console")

log = structlog.get_logger(__name__)


class Ui(Protocol):
    """The display of a start, to a person or a program. Calls return at once."""

    def hashing(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """A model's file is being read; called from a thread."""
        ...

    def note(self, sentence: str) -> None:
        """Something the user did not ask for and should know."""
        ...

    def listening(self, status: NodeStatus) -> None:
        """The addresses answer."""
        ...

    def ready(self, status: NodeStatus) -> None:
        """Every model that the mesh should serve is served, or cannot be."""
        ...


Until = Callable[[], Awaitable[None]]


async def run(settings: Settings, ui: Ui, until: Until | None = None) -> None:
    """Run a node until a signal or its console tells it to stop.

    Args:
        settings: What the user wants of it.
        ui: Who is told how it goes.
        until: Its return stops the node too.

    Raises:
        ConfigError: A setting cannot be used.
        MeshError: It cannot start or go on; the sentence says why.
    """
    home = Home.of(settings)
    with home.locked():
        node = Node(settings, home, ui)
        try:
            await node.prepare()
            await node.run(until)
        finally:
            node.close()


class Node:
    """A node and its parts.

    Args:
        settings: What the user wants of it.
        home: Where it writes; locked for it.
        ui: Who is told how it goes.
    """

    def __init__(self, settings: Settings, home: Home, ui: Ui) -> None:
        self._settings, self._home, self._ui = settings, home, ui
        self._name = settings.name or default_name()
        self._self = LocalIdentity(key=node_key(home), instance=secrets.randbits(63), mesh=None)
        self._store = Store(home, environ=os.environ)
        self._clock = SteadyClock()
        self._stop = trio.Event()
        self._ports: dict[str, Listening] = {}

    async def prepare(self) -> None:
        """Everything that can fail for a reason of the user's, before anything is promised."""
        self._engine: Engine = await trio.to_thread.run_sync(
            partial(find_engine, self._settings.engine, self._home.engine, os.environ)
        )
        self._opened: Opened = await trio.to_thread.run_sync(
            partial(open_models, self._store, self._settings, self._ui.hashing),
            abandon_on_cancel=True,
        )
        for name in PORTS:
            wanted = getattr(self._settings, name)
            port = await listen(name, wanted, exact=name in self._settings.given)
            self._ports[name] = port
            if name not in self._settings.given and port.address.port != wanted.port:
                self._ui.note(f"Port {wanted.port} is taken: {name} is at {port.address}")

    def close(self) -> None:
        """Give the ports back, whether or not anybody served them."""
        for port in self._ports.values():
            for listener in port.listeners:
                listener.socket.close()

    async def run(self, until: Until | None) -> None:
        """Join or found, start every part, wait, stop every part."""
        listeners = self._ports["peer"].listeners
        bounds = budget(raise_limit())
        transport = TlsTransport(
            lambda: self._self,
            listeners,
            self._clock,
            unauthenticated_max=bounds.unauthenticated,
            holding_max=bounds.holding,
        )
        card = await choose_mesh(
            self._home, self._settings.join, transport.introduce, self._ui.note
        )
        self._self = LocalIdentity(
            key=self._self.key, instance=self._self.instance, mesh=card.id, mesh_name=card.name
        )
        mesh = self._make_mesh(card, transport)
        inventory = ModelInventory(self._store, self._opened)
        engines = EngineManager(self._engine, logs=self._home.logs)
        publisher = InventoryPublisher(mesh, inventory)
        reconciler = Reconciler(
            mesh,
            engines,
            inventory,
            slots=self._settings.slots,
            ask=partial(self._ask, mesh, inventory),
        )
        routes = MeshBackends(mesh, reconciler, engines, slots=self._settings.slots)
        policy = self._web_policy()
        gateway = Gateway(routes, limits=bounds.gateway, policy=policy)
        status = self._make_status(card, mesh, reconciler, engines, routes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heed_signals)
            if until is not None:
                nursery.start_soon(self._heed, until)
            self._introduce_itself(mesh)
            await nursery.start(mesh.run, {HTTP: gateway.serve_peer})
            await nursery.start(self._measure, mesh, engines)
            await nursery.start(engines.run)
            nursery.start_soon(publisher.run)
            nursery.start_soon(reconciler.run)
            await (
                mesh.settled.wait()
            )  # before that it knows nothing to answer with, not even itself
            await nursery.start(gateway.serve, self._ports["api"].listeners)
            serve_console = partial(console.serve, connections_max=bounds.console)
            app = create_app(status, policy=policy)
            await nursery.start(serve_console, app, self._ports["console"].listeners)
            nursery.start_soon(self._keep_book, mesh, card)
            self._write_run_file(status, card)
            try:
                self._ui.listening(status)
                nursery.start_soon(self._announce_ready, mesh, reconciler, routes, status)
                await self._stop.wait()
                await self._leave(mesh, gateway, engines)
            finally:
                self._home.run_file.unlink(missing_ok=True)
            nursery.cancel_scope.cancel()

    async def _leave(self, mesh: Mesh, gateway: Gateway, engines: EngineManager) -> None:
        log.info("node_leaving")
        # Said first, so that the others take over while the last answers are finished here.
        mesh.publish(MEMBER, self._member(left=True).to_wire())
        await gateway.drain(DRAIN_S)
        await engines.stop()
        await mesh.finish(GOODBYE_S)

    # --- parts ----------------------------------------------------------------------------------

    def _make_mesh(self, card: MeshInfo, transport: TlsTransport) -> Mesh:
        core = Gossip(
            key=self._self.key,
            mesh=card.id,
            instance=self._self.instance,
            epoch=next_epoch(self._home, self._clock()),
            seeds=self._settings.join,
            book=load_book(self._home, card.id),
        )
        return Mesh(
            core,
            transport,
            save_epoch=partial(save_epoch, self._home),
            clock=self._clock,
        )

    def _make_status(
        self,
        card: MeshInfo,
        mesh: Mesh,
        reconciler: Reconciler,
        engines: EngineManager,
        routes: MeshBackends,
    ) -> NodeStatus:
        return NodeStatus(
            name=self._name,
            home=self._home,
            card=card,
            addresses=Addresses(**{name: self._ports[name].address for name in PORTS}),
            engine=self._engine,
            mesh=mesh,
            reconciler=reconciler,
            engines=engines,
            routes=routes,
            token=secrets.token_urlsafe(32),
            stop=self._stop.set,
        )

    def _web_policy(self) -> WebPolicy:
        return WebPolicy(
            hosts=frozenset({own_host(), *self._settings.hosts}),
            origins=frozenset(self._settings.origins),
        )

    async def _ask(self, mesh: Mesh, inventory: ModelInventory, replica: ReplicaKey) -> None:
        """Have the replica of a model that runs here too compute a token on its node."""
        file = inventory.file(replica.part.digest)
        assert file is not None, "what runs here has a file here"
        stream = await mesh.open_stream(replica.node, HTTP)
        await ask_replica(stream, replica, engine_modality(file.card.gives))

    def _introduce_itself(self, mesh: Mesh) -> None:
        mesh.publish(MEMBER, self._member(left=False).to_wire())
        mesh.publish(WANTS, wants_to_wire(self._opened.wanted))

    def _member(self, *, left: bool) -> Member:
        return Member(
            name=self._name,
            addresses=advertised(self._ports["peer"].address),
            version=__version__,
            left=left,
        )

    def _write_run_file(self, status: NodeStatus, card: MeshInfo) -> None:
        fields = {
            **status.ready_line(),
            "token": status.token,
            "mesh": {"id": show_id(card.id), "name": card.name},
            "started_at": int(time.time()),
        }
        write_atomic(self._home.run_file, json.dumps(fields).encode(), PRIVATE_MODE)

    # --- tasks ----------------------------------------------------------------------------------

    async def _heed_signals(self) -> None:
        """The first signal stops in order, the second at once."""
        wanted = [signal.SIGINT, signal.SIGTERM]
        if sys.platform == "win32":
            wanted.append(signal.SIGBREAK)
        with trio.open_signal_receiver(*wanted) as signals:
            async for signum in signals:
                if self._stop.is_set():
                    # The launchers end the engines once this process is gone.
                    self._home.run_file.unlink(missing_ok=True)
                    os._exit(128 + signum)
                self._ui.note("Stopping: finishing running answers; once more to stop at once")
                self._stop.set()

    async def _heed(self, until: Until) -> None:
        await until()
        self._stop.set()

    async def _measure(
        self,
        mesh: Mesh,
        engines: EngineManager,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Keep telling the mesh how much memory this node gives; started once it was told.

        What was said last stands while the system cannot be asked.
        """
        told = self._tell_budget(mesh, engines, None)
        task_status.started()
        while True:
            await trio.sleep(MEASURE_INTERVAL_S)
            try:
                told = self._tell_budget(mesh, engines, told)
            except (psutil.Error, OSError) as exc:  # no descriptor is left to read /proc with
                log.warning("memory_not_measured", reason=str(exc))

    def _tell_budget(self, mesh: Mesh, engines: EngineManager, told: Published | None) -> Published:
        engine, named = self._engine, self._settings.memory
        memories = [_main_memory(engines.used_bytes()), *_device_memories(engine)]
        budget = budget_bytes(named, memories)
        now = publish(told, budget, exact=named is not None, now_s=trio.current_time())
        caps = Caps(
            budget_bytes=now.budget_bytes,
            engine=f"{engine.kind} {engine.version}",
            rpc=engine.rpc or "",
        )
        mesh.publish(CAPS, caps.to_wire())
        return now

    async def _keep_book(self, mesh: Mesh, card: MeshInfo) -> None:
        """Remember where the others are, for the next start."""
        written = load_book(self._home, card.id)
        while True:
            seen = mesh.changes.count
            book = dict(mesh.book)
            if book != written:
                try:
                    save_book(self._home, card.id, book)
                except LocalError as exc:
                    log.warning("address_book_not_saved", reason=str(exc))
                written = book
                await trio.sleep(BOOK_PAUSE_S)
            await mesh.changes.wait(seen)

    async def _announce_ready(
        self, mesh: Mesh, reconciler: Reconciler, routes: MeshBackends, status: NodeStatus
    ) -> None:
        await reconciler.planned.wait()
        while any(model.state == "loading" for model in routes.models()):
            await mesh.changes.wait(mesh.changes.count)
        self._ui.ready(status)


def _main_memory(held_bytes: int) -> Memory:
    memory = psutil.virtual_memory()
    return Memory(
        total_bytes=memory.total, free_bytes=memory.available, held_bytes=held_bytes, main=True
    )


def _device_memories(engine: Engine) -> list[Memory]:
    # As found at the start, before this node's own engines took any of it.
    return [
        Memory(total_bytes=device.total_bytes, free_bytes=device.free_bytes)
        for device in engine.devices
        if not device.unified
    ]

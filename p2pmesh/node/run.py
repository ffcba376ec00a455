"""One node: its parts, in the order in which they start and stop.

Everything runs in one nursery tree. Parts know each other only through what is passed here. What
belongs to one mesh lives in `life.py`; a node that changes its mesh has one such life after another
here, while its engines, ports, API and console go on.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import structlog
import trio

from p2pmesh.config import Settings
from p2pmesh.console import serve as console
from p2pmesh.console.api import ConsoleSource, create_app
from p2pmesh.engine.find import Engine, find_engine
from p2pmesh.errors import LocalError
from p2pmesh.gateway.serve import Gateway
from p2pmesh.home import PRIVATE_MODE, Home, write_atomic
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import LocalIdentity, Vouch
from p2pmesh.identity.keys import SEED_BYTES, NodeId, show_id
from p2pmesh.identity.recovery import recovery_code
from p2pmesh.models.shard_cache import ShardCache
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.store import Store
from p2pmesh.node.arrival import check_settings, choose_entry
from p2pmesh.node.clocks import SteadyClock
from p2pmesh.node.descriptors import Bounds, budget, raise_limit
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.guest import Guest, GuestParts
from p2pmesh.node.interfaces import default_name, is_loopback, own_host
from p2pmesh.node.inventory import ModelInventory, Opened, open_models
from p2pmesh.node.joining import Door, Entry, Joiner, what_answers
from p2pmesh.node.keystore import MeshInfo, forget_mesh, found_mesh, node_key, save_mesh
from p2pmesh.node.life import GOODBYE_S, Lasting, MeshLife
from p2pmesh.node.local_network import LocalNetwork, only_here
from p2pmesh.node.memory_speed import MemorySpeed, is_machine_busy, measure_mib_per_s
from p2pmesh.node.orders import Orders
from p2pmesh.node.ports import Listening, listen
from p2pmesh.node.presence import Own
from p2pmesh.node.status import Addresses, NodeStatus
from p2pmesh.node.switch import BackendsSwitch
from p2pmesh.transport.tls import TlsTransport
from p2pmesh.watchable import Watchable
from p2pmesh.web_policy import WebPolicy

DRAIN_S = 10.0  # running answers get this long after the first Ctrl-C
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

    def ready(self, status: NodeStatus | Guest) -> None:
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


class _Frame(NamedTuple):
    """What a node runs in, whichever part it takes in a mesh."""

    bounds: Bounds
    transport: TlsTransport
    joiner: Joiner
    network: LocalNetwork
    nursery: trio.Nursery


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
        self._changes = Watchable()
        self._stopping = self._leaving = False
        self._destination: Entry | None = None
        self._told = trio.Event()  # to stop, or to change the mesh
        self._ports: dict[str, Listening] = {}

    async def prepare(self) -> None:
        """Everything that can fail for a reason of the user's, before anything is promised."""
        check_settings(self._settings)
        self._engine: Engine = await trio.to_thread.run_sync(
            partial(find_engine, self._settings.engine, self._home.engine, os.environ)
        )
        self._memory_speed = MemorySpeed(
            self._home.memory_speed_file,
            self._engine,
            measure=measure_mib_per_s,
            is_busy=is_machine_busy,
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
            port.close()

    def stop(self) -> None:
        """Begin the end of this node; returns at once."""
        self._stopping = True
        self._told.set()

    def leave(self) -> None:
        """Begin the end of this node, after which it belongs to no mesh; returns at once."""
        self._leaving = True
        self.stop()

    def change_mesh(self, entry: Entry) -> None:
        """Begin to leave the present mesh for another one; returns at once.

        Engines, API and console go on meanwhile. A later call overrules one that was not followed
        yet; a call with the present mesh does nothing.

        Args:
            entry: The other mesh.
        """
        self._destination = entry
        self._told.set()

    async def run(self, until: Until | None) -> None:
        """Join or found a mesh, and take part in it, or use it, until this node is to stop."""
        bounds = budget(raise_limit())
        transport = self._make_transport(bounds)
        joiner = self._make_joiner(transport)
        network = self._make_network()
        async with trio.open_nursery() as nursery:
            frame = _Frame(bounds, transport, joiner, network, nursery)
            nursery.start_soon(self._heed_signals)
            if until is not None:
                nursery.start_soon(self._heed, until)
            # While nothing of this node works yet; it is known by the time it is told.
            nursery.start_soon(self._memory_speed.run)
            await nursery.start(network.run)
            entry = await choose_entry(self._settings, joiner, network, self._found, self._ui.note)
            try:
                if entry.card.credential.role is Role.USE:
                    await self._be_guest(entry, frame)
                else:
                    await self._be_member(entry, frame)
            finally:
                self._remove_run_file()
            if self._leaving:
                forget_mesh(self._home)
            nursery.cancel_scope.cancel()

    async def _be_guest(self, entry: Entry, frame: _Frame) -> None:
        """Hand on what clients ask to the members of a mesh, until this node is to stop.

        If it was granted more since it was last here, it becomes a member.
        """
        parts = GuestParts(
            home=self._home,
            name=self._name,
            me=self._self,
            transport=frame.transport,
            addresses=self._addresses,
            token=secrets.token_urlsafe(32),
            stop=self.stop,
            order=self._guest_order,
        )
        guest = Guest(entry, parts)
        await guest.renew()
        if guest.card.credential.role > Role.USE:
            await self._be_member(replace(entry, card=guest.card), frame)
            return
        frame.network.rest()
        await frame.nursery.start(guest.run, self._ports["api"].listeners)
        await self._serve_console(guest, frame)
        self._write_run_file(guest, entry.card)
        self._ui.note(
            f"This node uses the mesh {entry.card.name} through its members, and serves nothing. "
            f"API at http://{self._addresses.api}/v1"
        )
        self._ui.ready(guest)
        while not self._stopping:
            await self._told.wait()

    async def _be_member(self, entry: Entry, frame: _Frame) -> None:
        """Start every part, follow from mesh to mesh, stop every part."""
        nursery = frame.nursery
        engines = EngineManager(self._engine, logs=self._home.logs)
        switch = BackendsSwitch(engines, self._changes)
        gateway = Gateway(switch, limits=frame.bounds.gateway, policy=self._web_policy())
        lasting = self._make_lasting(frame, engines, gateway)
        await nursery.start(engines.run)
        life = self._life = await self._enter(entry, lasting, nursery)
        switch.enter(life.routes)
        if self._settings.private or self._settings.open:
            life.authority.set_open(is_open=self._settings.open)
        orders = Orders(
            lambda: self._life, frame.joiner, frame.network, self.change_mesh, self.leave
        )
        status = self._make_status(life, engines, frame.network, orders)
        await nursery.start(gateway.serve, self._ports["api"].listeners)
        await self._serve_console(status, frame)
        self._write_run_file(status, entry.card)
        self._ui.listening(status)
        nursery.start_soon(self._announce_ready, life, switch, status)
        nursery.start_soon(self._tell_refusals)
        with engines.watched(self._changes.notify):
            while (there := await self._next_destination(life.card)) is not None:
                switch.leave()
                await life.leave()
                nursery.start_soon(life.drain, DRAIN_S)
                life = self._life = await self._enter(there, lasting, nursery)
                switch.enter(life.routes)
                status.enter(life)
                self._write_run_file(status, there.card)
                self._ui.note(f"This node is in the mesh {there.card.name} now")
        await self._leave(life, gateway, engines)

    async def _serve_console(self, source: ConsoleSource, frame: _Frame) -> None:
        serve = partial(console.serve, connections_max=frame.bounds.console)
        app = create_app(source, policy=self._web_policy())
        await frame.nursery.start(serve, app, self._ports["console"].listeners)

    async def _guest_order(self, name: str, _values: Mapping[str, Any]) -> dict[str, Any]:
        if name != "leave":
            raise LocalError(
                "this node only uses the mesh; for another role let an admin run: p2pmesh grant "
                f"{show_id(self._self.key.id)} serve; then start this node again"
            )
        self.leave()
        return {"sentences": ["This node leaves the mesh and stops."]}

    async def _next_destination(self, present: MeshInfo) -> Entry | None:
        """Return the mesh to change to, remembered already; None once this node is to stop."""
        while not self._stopping:
            there, self._destination = self._destination, None
            if there is None or there.card.id == present.id:
                self._told = trio.Event()
                await self._told.wait()
                continue
            try:
                save_mesh(self._home, there.card)
            except LocalError as exc:
                self._ui.note(f"{exc}. Going on in the mesh {present.name}")
                continue
            return there
        return None

    async def _enter(self, entry: Entry, lasting: Lasting, nursery: trio.Nursery) -> MeshLife:
        """Begin a life in a mesh; returns once the mesh was heard."""
        life = MeshLife(lasting, self._self, entry, self._state_identity)
        self._state_identity(entry.card, life.mesh.vouch)
        await nursery.start(life.run)
        return life

    def _state_identity(self, card: MeshInfo, vouch: Vouch) -> None:
        """Say in every hello from now on that this node is a member of that mesh."""
        self._self = replace(
            self._self,
            mesh=card.id,
            mesh_name=card.name,
            credential=card.credential.raw,
            vouch=vouch,
        )

    def _found(self) -> MeshInfo:
        """Found a mesh as the user wants it; its key is forgotten, or told to the user."""
        seed = secrets.token_bytes(SEED_BYTES)
        mesh = found_mesh(
            self._home,
            self._self.key,
            name=self._settings.mesh or "",
            is_open=not self._settings.private,
            now=self._clock(),
            seed=seed,
        )
        if self._settings.recovery_code:
            self._ui.note(
                f"Recovery code of {mesh.name}, told only now: {recovery_code(seed)}. Keep it on "
                "paper: whoever has it can become an admin, by p2pmesh recover on a member"
            )
        return mesh

    async def _leave(self, life: MeshLife, gateway: Gateway, engines: EngineManager) -> None:
        log.info("node_leaving")
        # Said first, so that the others take over while the last answers are finished here.
        life.say_goodbye()
        await gateway.drain(DRAIN_S)
        await engines.stop()
        await life.mesh.finish(GOODBYE_S)

    @property
    def _addresses(self) -> Addresses:
        return Addresses(**{name: self._ports[name].address for name in PORTS})

    # --- parts ----------------------------------------------------------------------------------

    def _make_transport(self, bounds: Bounds) -> TlsTransport:
        return TlsTransport(
            lambda: self._self,
            self._ports["peer"].lend(),
            self._clock,
            unauthenticated_max=bounds.unauthenticated,
            holding_max=bounds.holding,
            only_here=only_here,
        )

    def _make_joiner(self, transport: TlsTransport) -> Joiner:
        door = Door(introduce=transport.introduce, ask=transport.ask, identify=what_answers)
        return Joiner(self._home, self._self, self._name, door, self._clock)

    def _make_network(self) -> LocalNetwork:
        listening = self._ports["peer"].address
        return LocalNetwork(
            self._home,
            NodeId(self._self.key.id),
            self._name,
            listening.port,
            wanted=self._settings.mesh,
            is_welcome=self._settings.open,
            # Who listens on loopback alone can be reached by nobody around.
            is_on=not (self._settings.no_discovery or is_loopback(listening.host)),
        )

    def _make_lasting(self, frame: _Frame, engines: EngineManager, gateway: Gateway) -> Lasting:
        own = Own(
            name=self._name,
            listening=self._ports["peer"].address,
            memory_bytes=self._settings.memory,
            engine=self._engine,
            engines=engines,
            memory_mib_per_s=lambda: self._memory_speed.mib_per_s,
        )
        return Lasting(
            home=self._home,
            clock=self._clock,
            transport=frame.transport,
            engines=engines,
            inventory=ModelInventory(self._store, self._opened, self._library(engines)),
            gateway=gateway,
            own=own,
            wanted=self._opened.wanted,
            slots=self._settings.slots,
            changes=self._changes,
            network=frame.network,
            joiner=frame.joiner,
            change_mesh=self.change_mesh,
        )

    def _library(self, engines: EngineManager) -> ShardLibrary:
        cache = ShardCache(self._home.shards, self._settings.disk, in_use=engines.files)
        return ShardLibrary(self._home.rankings, cache)

    def _make_status(
        self, life: MeshLife, engines: EngineManager, network: LocalNetwork, orders: Orders
    ) -> NodeStatus:
        return NodeStatus(
            name=self._name,
            home=self._home,
            addresses=self._addresses,
            engine=self._engine,
            engines=engines,
            life=life,
            around=network,
            changes=self._changes,
            token=secrets.token_urlsafe(32),
            stop=self.stop,
            order=orders.give,
        )

    def _web_policy(self) -> WebPolicy:
        return WebPolicy(
            hosts=frozenset({own_host(), *self._settings.hosts}),
            origins=frozenset(self._settings.origins),
        )

    def _write_run_file(self, status: NodeStatus | Guest, card: MeshInfo) -> None:
        fields = {
            **status.ready_line(),
            "token": status.token,
            "mesh": {"id": show_id(card.id), "name": card.name},
            "started_at": int(time.time()),
        }
        write_atomic(self._home.run_file, json.dumps(fields).encode(), PRIVATE_MODE)

    def _remove_run_file(self) -> None:
        try:
            self._home.run_file.unlink(missing_ok=True)
        except OSError as exc:
            # It is believed only while this process lives.
            log.warning("run_file_left", reason=str(exc))

    # --- tasks ----------------------------------------------------------------------------------

    async def _heed_signals(self) -> None:
        """The first signal stops in order, the second at once."""
        wanted = [signal.SIGINT, signal.SIGTERM]
        if sys.platform == "win32":
            wanted.append(signal.SIGBREAK)
        with trio.open_signal_receiver(*wanted) as signals:
            async for signum in signals:
                if self._stopping:
                    # The launchers end the engines once this process is gone.
                    self._remove_run_file()
                    os._exit(128 + signum)
                self._ui.note("Stopping: finishing running answers; once more to stop at once")
                self.stop()

    async def _heed(self, until: Until) -> None:
        await until()
        self.stop()

    async def _tell_refusals(self) -> None:
        """Say it when members take this node for one of them no more."""
        told = ""
        while True:
            seen = self._changes.count
            if (refusal := self._life.mesh.refusal) and refusal != told:
                told = refusal
                self._ui.note(f"A member refuses this node: {refusal}")
            await self._changes.wait(seen)

    async def _announce_ready(
        self, life: MeshLife, switch: BackendsSwitch, status: NodeStatus
    ) -> None:
        await life.reconciler.planned.wait()
        while any(model.state == "loading" for model in switch.models()):
            await self._changes.wait(self._changes.count)
        self._ui.ready(status)

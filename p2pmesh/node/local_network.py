"""The network around a node: the meshes that are heard there, and its own, where that is welcome.

A mesh is announced, and lets newcomers in without an invitation, only on networks where it was
founded, where this node joined it over the network, or where a person said so: a laptop carries the
mesh of its home into no café. A network is known by its gateway's MAC address. One without a
gateway is known only as long as the node runs. A mesh that was founded before this machine had any
network, as when it starts faster than its Wi-Fi, was founded on the first one that comes.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import structlog
import trio

from p2pmesh.discovery import interfaces
from p2pmesh.discovery.announcement import Announcement
from p2pmesh.discovery.choice import (
    FOLLOW_FOR_S,
    HeardMesh,
    choose,
    founding_delay_s,
    should_follow,
)
from p2pmesh.discovery.heard import Waiting
from p2pmesh.discovery.network_id import network_ids
from p2pmesh.discovery.onlink import Interface
from p2pmesh.discovery.service import Discovery
from p2pmesh.errors import LocalError
from p2pmesh.home import Home, read_json, write_atomic
from p2pmesh.identity.credentials import Role, may_issue
from p2pmesh.identity.hello import VERSIONS, RefusedError
from p2pmesh.identity.keys import MeshId, NodeId, show_id
from p2pmesh.node.joining import Entry, Joiner
from p2pmesh.node.keystore import MeshInfo
from p2pmesh.node.mesh import Mesh
from p2pmesh.wire.statements import Policy

LOOK_INTERVAL_S = 3.0  # at the networks: so long a mesh may be announced on another one
NO_GATEWAY = ""  # the network of an interface that leads nowhere else
NETWORKS_MAX = 64  # remembered per mesh; the oldest goes
SETTLE_S = 30.0  # from an interface that comes up to its address, its gateway and that one's MAC

log = structlog.get_logger(__name__)


@asynccontextmanager
async def only_here(tcp: trio.SocketStream) -> AsyncIterator[None]:
    """Keep a challenge on the link of this machine; see `TlsTransport`.

    Raises:
        RefusedError: The connection comes from elsewhere.
    """
    try:
        reason = await interfaces.refusal(tcp.socket)
    except OSError as exc:
        raise RefusedError("the connection has ended") from exc
    if reason:
        raise RefusedError(reason)
    with interfaces.hold_to_link(tcp.socket):
        yield


class LocalNetwork:
    """What a node says and hears on the networks around it.

    Args:
        home: Where the networks of each mesh are remembered.
        me: This node.
        name: What people call it.
        port: Where it listens for peers.
        wanted: The name of the mesh that the user wants to be in; None where any will do.
        is_welcome: Whether the user said that the mesh is to be announced on this network.
        is_on: Whether to speak and to listen at all.

    Attributes:
        announces: Whether it is said here that the mesh is here.
    """

    def __init__(
        self,
        home: Home,
        me: NodeId,
        name: str,
        port: int,
        *,
        wanted: str | None = None,
        is_welcome: bool,
        is_on: bool,
    ) -> None:
        self._home, self._me, self._port = home, me, port
        self._wanted, self._is_welcome = wanted, is_welcome
        self._discovery = Discovery(me, name, port, interfaces=self._interfaces) if is_on else None
        self.announces = False
        self._mesh: Mesh | None = None
        self._card: MeshInfo | None = None
        self._known = frozenset[str]()  # networks of the present mesh, by their gateways
        self._here: dict[str, str] = {}  # the networks of this machine, by interface
        self._unroutable = frozenset[str]()  # interfaces without gateway where the mesh was founded
        self._settling = False  # the mesh is to be at home here, where no gateway is known yet
        self._settling_since: float | None = None  # when there was any network
        self._moved_in_at = 0.0  # the unix time when this mesh was founded or joined here

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Speak and listen until cancelled."""
        await self._look()
        if self._discovery is None:
            task_status.started()
            return
        async with trio.open_nursery() as nursery:
            await nursery.start(self._discovery.run)
            task_status.started()
            while True:
                with trio.move_on_after(LOOK_INTERVAL_S):
                    await self._mesh_changed()
                before = self._here
                await self._look()
                self._settle_late()
                if self._here != before:
                    # Another network may have the addresses of the last one.
                    self._discovery.start_anew()
                self._announce()

    # --- without a mesh -------------------------------------------------------------------------

    async def find(self, joiner: Joiner, is_wanted: Callable[[HeardMesh], bool]) -> Entry | None:
        """Join the open mesh that is heard here; None when there is none that lets this node in.

        Args:
            joiner: Gets this node in.
            is_wanted: Whether a mesh that is heard will do.
        """
        if self._discovery is None:
            return None
        began, refused = trio.current_time(), set[MeshId]()
        while True:
            seen, now = self._discovery.changes.count, trio.current_time()
            heard = [
                one
                for one in self._discovery.heard.meshes(now)
                if one.id not in refused and is_wanted(one)
            ]
            if (best := choose(heard)) is not None:
                try:
                    return await self._join(joiner, best)
                except LocalError as exc:
                    log.info("mesh_not_joined", mesh=best.name, reason=str(exc))
                    refused.add(best.id)
                    continue
            newcomers = [one.node for one in self._discovery.heard.waiting(now) if one.mesh is None]
            left_s = began + founding_delay_s(self._me, newcomers) - now
            if left_s <= 0:
                return None
            with trio.move_on_after(left_s):
                await self._discovery.changes.wait(seen)

    async def _join(self, joiner: Joiner, mesh: HeardMesh) -> Entry:
        assert self._discovery is not None
        addresses = self._discovery.heard.addresses(mesh.id, trio.current_time())
        return await joiner.over_network(mesh.id, addresses)

    def rest(self) -> None:
        """Ask for nothing any more: this node found its mesh, and does not speak for it."""
        if self._discovery is not None:
            self._discovery.seek(on=False)

    # --- in a mesh ------------------------------------------------------------------------------

    async def enter(self, card: MeshInfo, mesh: Mesh, *, is_new: bool) -> None:
        """Speak for a mesh from now on, where that is welcome.

        Args:
            card: The mesh.
            mesh: The access to it.
            is_new: Whether this node founded it here and now, or joined it over this network.
        """
        self._card, self._mesh = card, mesh
        self._known = frozenset(_load(self._home).get(show_id(card.id), []))
        self._unroutable = frozenset()
        self._settling, self._settling_since = is_new or self._is_welcome, None
        self._moved_in_at = card.joined_at
        await self._look()
        self._settle()
        if self._discovery is not None:
            self._discovery.seek(on=self._may_wait)
            self._announce()

    async def follow(self, joiner: Joiner) -> Entry:
        """Wait for a mesh that this node is to follow, and join it.

        That is an older one that is open, or one in which a person let this node in by name.
        """
        if self._discovery is None:
            await trio.sleep_forever()
        assert self._discovery is not None
        refused = set[MeshId]()
        while True:
            seen = self._discovery.changes.count
            there = self._better(refused)
            if there is not None:
                try:
                    return await self._join(joiner, there)
                except LocalError as exc:
                    log.info("mesh_not_followed", mesh=there.name, reason=str(exc))
                    refused.add(there.id)
            await self._discovery.changes.wait(seen)

    def admit(self, node: NodeId) -> None:
        """Tell a node that a person let it in where this mesh is."""
        if self._discovery is not None:
            self._discovery.admit(node)

    @property
    def waiting(self) -> list[Waiting]:
        """The nodes around here that look for a mesh and are not in this one."""
        if self._discovery is None or self._card is None:
            return []
        found = self._discovery.heard.waiting(trio.current_time())
        return [one for one in found if one.mesh != self._card.id]

    @property
    def others(self) -> list[str]:
        """The names of other open meshes that are heard here."""
        if self._discovery is None or self._card is None:
            return []
        heard = self._discovery.heard.meshes(trio.current_time())
        return sorted(one.name for one in heard if one.open and one.id != self._card.id)

    @property
    def admits(self) -> bool:
        """Whether who is on this network may join without an invitation."""
        policy = self._mesh.trust.policy if self._mesh is not None else None
        return policy is not None and policy.open and self._may_let_in

    async def refusal(self, host: str) -> str:
        """Say why nobody joins this mesh from `host` without an invitation; "" if they may."""
        await self._look()
        name = _interface_of(host)
        if name in self._welcome:
            return ""
        return (
            "this mesh lets nobody in on this network, where it was not founded; ask a member for "
            "an invitation, or to run: p2pmesh up --open"
        )

    # --- inside ---------------------------------------------------------------------------------

    def _settle_late(self) -> None:
        """Settle on the first network of a machine that had none, if nobody counts on the mesh."""
        if self._mesh is None or not self._settling:
            return
        if self._settling_since is None and self._here:
            if not self._is_pristine:  # who was invited came over a VPN
                self._settling = False
                return
            self._moved_in_at = self._mesh.now
        self._settle()
        if self._discovery is not None:
            self._discovery.seek(on=self._may_wait)

    def _settle(self) -> None:
        """Have a mesh that is to be at home where this machine is be so, once it is anywhere."""
        if not self._settling or not self._here:
            return
        assert self._card is not None
        assert self._mesh is not None
        now = trio.current_time()
        if self._settling_since is None:
            self._settling_since = now
        if now - self._settling_since > SETTLE_S:
            self._settling = False
            return
        self._unroutable = frozenset(
            name for name, network in self._here.items() if network == NO_GATEWAY
        )
        found = {network for network in self._here.values() if network != NO_GATEWAY}
        if not found:
            return
        self._settling = False
        networks, mesh = _load(self._home), show_id(self._card.id)
        known = networks.get(mesh, [])
        if not found.issubset(known):
            known = [*(one for one in known if one not in found), *sorted(found)]
            networks[mesh] = known[-NETWORKS_MAX:]
            _save(self._home, networks)
        self._known = frozenset(known)

    @property
    def _welcome(self) -> frozenset[str]:
        """The interfaces to networks on which this node may speak for its mesh."""
        return frozenset(
            name
            for name, network in self._here.items()
            if network in self._known or (network == NO_GATEWAY and name in self._unroutable)
        )

    def _interfaces(self) -> Sequence[Interface]:
        usable = interfaces.usable_interfaces()
        if self._card is None:
            return usable  # a node without a mesh asks everywhere
        welcome = self._welcome
        return [one for one in usable if one.name in welcome]

    async def _look(self) -> None:
        usable = await trio.to_thread.run_sync(interfaces.usable_interfaces)
        networks = await network_ids()
        self._here = {one.name: networks.get(one.name, NO_GATEWAY) for one in usable}

    async def _mesh_changed(self) -> None:
        if self._mesh is None:
            await trio.sleep_forever()
        assert self._mesh is not None
        trust = self._mesh.trust
        while self._mesh.trust is trust:
            await self._mesh.changes.wait(self._mesh.changes.count)

    def _announce(self) -> None:
        """Say what is true now: that this mesh is here, if this node could let anybody in."""
        if self._discovery is None or self._mesh is None or self._card is None:
            return
        card, policy = self._card, self._mesh.trust.policy
        if policy is None or not self._may_let_in:
            self.announces = False
            self._discovery.announce(None)
            return
        self.announces = True
        self._discovery.announce(
            Announcement(
                node=self._me,
                mesh=card.id,
                mesh_name=policy.name,
                founded_at=policy.founded_at,
                open=policy.open,
                port=self._port,
                version=max(VERSIONS),
            )
        )

    @property
    def _may_let_in(self) -> bool:
        """Whether this node has the right to let others in, and is where it may be used."""
        own = self._mesh.credential if self._mesh is not None else None
        can = own is not None and may_issue(own, role=Role.SERVE, stage=False, basis="lan")
        return can and bool(self._welcome)

    @property
    def _may_follow(self) -> bool:
        """Whether this node came here by itself, lately, and nobody counts on it yet.

        Who founded a private mesh wants to be nowhere else.
        """
        assert self._card is not None
        assert self._mesh is not None
        policy = self._mesh.trust.policy
        if policy is None or not policy.open:
            return False
        last = self._card.credential.last
        by_itself = last.basis == "lan" or (last.basis == "founder" and self._is_pristine)
        return by_itself and self._mesh.now - self._moved_in_at < FOLLOW_FOR_S

    @property
    def _may_wait(self) -> bool:
        """Whether to be shown to members of other meshes as waiting to be let in by name."""
        return self._may_follow and self._wanted is None

    @property
    def _is_pristine(self) -> bool:
        """Whether this mesh has issued nothing: no invitation, no grant, no revocation."""
        assert self._mesh is not None
        return all(isinstance(one.body, Policy) for one in self._mesh.statements)

    def _better(self, refused: set[MeshId]) -> HeardMesh | None:
        assert self._discovery is not None
        assert self._mesh is not None
        assert self._card is not None
        if not self._may_follow:
            self._discovery.seek(on=False)
            return None
        heard = [
            one
            for one in self._discovery.heard.meshes(trio.current_time())
            if one.id not in refused
            and one.id != self._card.id
            and self._wanted in (None, one.name)
        ]
        # A mesh that is not open is only announced to whom a person let in.
        named = [one for one in heard if not one.open]
        if named:
            return named[0]
        mine = HeardMesh(
            id=self._card.id,
            name=self._card.name,
            founded_at=self._card.founded_at,
            open=True,
            version=max(VERSIONS),
        )
        return should_follow(
            mine,
            heard,
            joined_at=self._moved_in_at,
            now=self._mesh.now,
            pristine=self._is_pristine,
        )


def _interface_of(host: str) -> str:
    """Return the name of the interface on whose link an address is; "" for none."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    scope = getattr(address, "scope_id", None)
    for one in interfaces.usable_interfaces():
        if scope in (one.name, str(one.index)) or (scope is None and one.reaches(address)):
            return one.name
    return ""


def _load(home: Home) -> dict[str, list[str]]:
    try:
        fields = read_json(home.networks_file)
        return {str(mesh): [str(one) for one in known] for mesh, known in fields.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        # A loss only: the mesh is announced nowhere until a person says so.
        log.warning("networks_unreadable", path=str(home.networks_file), reason=str(exc))
        return {}


def _save(home: Home, networks: dict[str, list[str]]) -> None:
    try:
        write_atomic(home.networks_file, json.dumps(networks, indent=1).encode() + b"\n")
    except LocalError as exc:
        log.warning("networks_not_saved", reason=str(exc))

"""The status of a node and its mesh as plain values: what console and command line show."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import trio

from p2pmesh import __version__
from p2pmesh.config import Address
from p2pmesh.engine.find import Engine
from p2pmesh.gossip.events import Health
from p2pmesh.home import Home
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import parse_stage
from p2pmesh.node.backends import MeshBackends
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.interfaces import is_loopback
from p2pmesh.node.keystore import MeshInfo
from p2pmesh.node.member_status import (
    Door,
    OwnMembership,
    Surroundings,
    away,
    invitations,
    mesh_rules,
    newcomers,
    notices,
    only_admin,
    standing,
)
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.reconciler import Reconciler
from p2pmesh.node.roster import Seen
from p2pmesh.state.registers import Served
from p2pmesh.state.views import NodeView
from p2pmesh.watchable import Watchable


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """The addresses at which a node listens, as bound."""

    api: Address
    console: Address
    peer: Address


class InMesh(Protocol):
    """The parts that belong to one mesh."""

    @property
    def card(self) -> MeshInfo:
        """Return which mesh it is."""
        ...

    @property
    def mesh(self) -> Mesh:
        """Return the access to it."""
        ...

    @property
    def membership(self) -> OwnMembership:
        """Return the membership of this node."""
        ...

    @property
    def admission(self) -> Door:
        """Return the way in for others."""
        ...

    def known(self) -> Mapping[NodeId, Seen]:
        """Return everybody who was seen as a member, here or away."""
        ...

    @property
    def reconciler(self) -> Reconciler:
        """Return the part that has the plan."""
        ...

    @property
    def routes(self) -> MeshBackends:
        """Return the view of its models."""
        ...


class NodeStatus:
    """Implements the console's source of snapshots.

    Args:
        name: What people call the node.
        home: Where it writes.
        addresses: Where it listens.
        engine: What runs models.
        engines: What runs.
        life: The mesh that it is in; `enter` exchanges it.
        around: The network that it is on.
        changes: Notified of each change of the present mesh.
        token: Who shows it may stop the node.
        stop: Begins the node's graceful end; returns at once.
        order: Carries out what a person orders, see `Orders`.
    """

    def __init__(
        self,
        *,
        name: str,
        home: Home,
        addresses: Addresses,
        engine: Engine,
        engines: EngineManager,
        life: InMesh,
        around: Surroundings,
        changes: Watchable,
        token: str,
        stop: Callable[[], None],
        order: Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]],
    ) -> None:
        self.token = token
        self.stop = stop
        self._order = order
        self._name, self._home, self._addresses = name, home, addresses
        self._engine, self._engines = engine, engines
        self._around, self._changes = around, changes
        self._started_s = trio.current_time()
        self.enter(life)

    def enter(self, life: InMesh) -> None:
        """Show another mesh from now on."""
        self._card, self._mesh = life.card, life.mesh
        self._membership, self._admission = life.membership, life.admission
        self._known = life.known
        self._reconciler, self._routes = life.reconciler, life.routes
        self._changes.notify()

    async def order(self, name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Carry out what a person orders; see `Orders.give`."""
        return await self._order(name, values)

    async def wait_changed(self, seen: int) -> int:
        """The count of changes, as soon as it is not `seen` any more."""
        return await self._changes.wait(seen)

    def snapshot(self) -> Mapping[str, Any]:
        """Everything, as JSON values."""
        view, agreement, known = self._mesh.view, self._mesh.agreement, self._known()
        only = only_admin(self._mesh, known)
        return {
            "node": self._node(),
            "mesh": {
                "id": show_id(self._card.id),
                "name": self._card.name,
                "founded_at": self._card.founded_at,
                **mesh_rules(self._mesh, only, self._around),
                "admits": self._around.admits and not is_loopback(self._addresses.peer.host),
                "notices": notices(self._mesh, only, self._membership),
                "nodes": len(view.nodes),
                "plan": self._reconciler.plan.digest.hex(),
                "agreed": agreement.same == agreement.asked,
            },
            "nodes": [self._peer(node) for node in view.nodes.values()],
            "away": away(self._mesh, known),
            "invitations": invitations(self._mesh, self._admission),
            "newcomers": newcomers(self._mesh, self._admission, self._around),
            "models": [self._model(digest) for digest in sorted(self._digests())],
        }

    def ready_line(self) -> dict[str, Any]:
        """How programs that started this node reach it."""
        return {
            "id": show_id(self._mesh.me),
            "name": self._name,
            "pid": os.getpid(),
            "api": str(self._addresses.api),
            "console": str(self._addresses.console),
            "peer": str(self._addresses.peer),
            "home": str(self._home.root),
        }

    def _node(self) -> dict[str, Any]:
        engine = self._engine
        me = self._mesh.view.nodes.get(self._mesh.me)
        budget = me.caps.budget_bytes if me and me.caps else 0
        return {
            **self.ready_line(),
            "version": __version__,
            "uptime_s": int(trio.current_time() - self._started_s),
            "memory": {"budget_bytes": budget, "used_bytes": self._engines.used_bytes()},
            "engine": {
                "kind": engine.kind,
                "source": engine.source,
                "version": engine.version,
                "rpc": engine.rpc,
                "confinement": asdict(engine.confinement),
                "rpc_confinement": engine.rpc_confinement and asdict(engine.rpc_confinement),
                "devices": [
                    {
                        "id": device.id,
                        "description": device.description,
                        "total_bytes": device.total_bytes,
                        "free_bytes": device.free_bytes,
                    }
                    for device in engine.devices
                ],
            },
            "warnings": [*engine.warnings, *self._failed_here()],
        }

    def _failed_here(self) -> list[str]:
        """Sentences about what failed here and is served by others instead."""
        running = {part.digest for part in self._engines.states()}
        return [
            f"{self._id(digest)} is served elsewhere because it failed here: {why}"
            for digest, why in self._engines.failures.items()
            if digest not in running and self._routes.state(digest) == "ready"
        ]

    def _peer(self, view: NodeView) -> dict[str, Any]:
        rtt_s = self._mesh.rtt_s(view.node)
        return {
            "id": show_id(view.node),
            "name": view.member.name,
            "self": view.node == self._mesh.me,
            "state": self._mesh.health(view.node).value,
            **standing(self._mesh, view.credential),
            "address": str(view.member.addresses[0]) if view.member.addresses else "",
            "version": view.member.version,
            "memory_bytes": view.caps.budget_bytes if view.caps else 0,
            "engine": view.caps.engine if view.caps else "",
            "models": [
                {
                    "id": self._id(part.digest),
                    "digest": part.digest,
                    "part": part.name,
                    "layers": _layers(one),
                    "experts": _experts(one),
                    "state": self._seen(view.node, one),
                }
                for part, one in view.serves.items()
                if self._mesh.health(view.node) is not Health.DEAD
                and view.node not in self._mesh.dead
            ],
            "rtt_ms": None if rtt_s is None else round(rtt_s * 1000, 1),
        }

    def _model(self, digest: ModelDigest) -> dict[str, Any]:
        view = self._mesh.view
        model = view.models[digest]
        card = model.card
        replicas = [self._replica(node, one) for node, one in self._routes.answering(digest)]
        copies = [a.copies for a in self._reconciler.plan.assignments if a.digest == digest]
        state = self._routes.state(digest)
        if state == "ready" and not any(one["state"] == "ready" for one in replicas):
            state = Health.SUSPECT.value  # its last owner does not answer, and is not given up yet
        return {
            "id": self._id(digest),
            "digest": digest,
            "name": card.name if card else "",
            "size_bytes": card.size_bytes if card else 0,
            "architecture": card.architecture if card else "",
            "takes": sorted(card.takes) if card else [],
            "gives": sorted(card.gives) if card else [],
            "state": state,
            "replicas": replicas,
            "copies": sum(copies),
            "wanted_by": [show_id(wish.owner) for wish in model.wishes],
            "reason": self._routes.reason(digest),
        }

    def _digests(self) -> set[ModelDigest]:
        models = self._mesh.view.models
        return {digest for digest, one in models.items() if one.card or one.wishes}

    def _id(self, digest: ModelDigest) -> str:
        return self._mesh.view.catalogue.id_of(digest) if digest in self._digests() else digest

    def _replica(self, node: NodeView, one: Served) -> dict[str, Any]:
        return {
            "node": show_id(node.node),
            "name": node.member.name,
            "part": one.name,
            "layers": _layers(one),
            "experts": _experts(one),
            "state": self._seen(node.node, one),
            "detail": one.detail,
        }

    def _seen(self, node: NodeId, one: Served) -> str:
        """Return the state that a node claims for a model, or its own while it does not answer."""
        health = self._mesh.health(node)
        return one.state if health is Health.LIVE else health.value


def _experts(served: Served) -> dict[str, Any] | None:
    """Return how much a shard holds of the experts; None for other parts."""
    return None if served.shard is None else served.shard.described()


def _layers(served: Served) -> list[int] | None:
    """Return the first and the last layer of a stage, counted from 1; None of a whole model."""
    stage = parse_stage(served.name)
    if stage is None:
        return None
    _, first, last = served.stages[stage.number]
    return [first + 1, last + 1]

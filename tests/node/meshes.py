"""Several meshes on one network in memory; node n listens at memory:n."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from p2pmesh.config import Address
from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity.credentials import Credential, Role
from p2pmesh.identity.hello import HTTP, LocalIdentity, Needs, Peer
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.node.mesh import Mesh
from p2pmesh.state.registers import Caps
from p2pmesh.transport.base import Service
from p2pmesh.transport.memory import MemoryNetwork, MemoryTransport
from p2pmesh.wire.registers import MEMBER
from tests.identity.builders import credential
from tests.state.builders import MESH, NOW, member

DEADLINE_S = 1000.0  # on the tests' own clock: reached only by what would never end
CAPS_BODY = Caps(budget_bytes=4 << 30, engine="embedded", rpc="").to_wire()
SPREAD_S = 5.0  # joining, and everybody's links to everybody


def peer_of(key: SigningKey, *, clock_ahead_s: int = 0) -> Peer:
    """What a finished hello tells of a node."""
    return Peer(
        node=NodeId(key.id),
        public=key.public,
        instance=1,
        mesh=MESH,
        mesh_name="home",
        purpose="gossip",
        clock_ahead_s=clock_ahead_s,
        version=1,
    )


def clock() -> float:
    """Unix time that goes with trio's clock."""
    return NOW + trio.current_time()


@dataclass(slots=True)
class Started:
    """One mesh and what it wrote and was handed."""

    mesh: Mesh
    address: Address
    epochs: list[int] = field(default_factory=list)
    streams: list[tuple[NodeId, bytes]] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def on_stream(self, peer: Peer, stream: trio.abc.Stream) -> None:
        self.streams.append((peer.node, bytes(await stream.receive_some())))
        await stream.send_all(b"an answer")

    async def run(self, *, task_status: trio.TaskStatus[object]) -> None:
        with self.scope:
            handlers = {HTTP: Service(self.on_stream, Needs(Role.USE))}
            await self.mesh.run(handlers, task_status=task_status)


class Meshes:
    """Makes them, and runs them in one nursery."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork()
        self._nursery = nursery

    def make(
        self,
        number: int,
        *,
        key: SigningKey | None = None,
        save_epoch: Callable[[int], None] | None = None,
        now: Callable[[], float] = clock,
        own: Credential | None = None,
        **core: Any,
    ) -> Started:
        """A mesh that is not running yet; all but the first name the first as their seed."""
        key = key or SigningKey(number.to_bytes(32, "big"))
        defaults: dict[str, Any] = {
            "instance": number,
            "epoch": NOW,
            "seeds": () if number == 1 else (Address("memory", 1),),
        }
        arguments = {**defaults, **core}
        gossip = Gossip(key=key, mesh=MESH, **arguments)
        me = LocalIdentity(
            key=key,
            instance=arguments["instance"],
            mesh=MESH,
            mesh_name="home",
            credential=(own or credential(key)).raw,
        )
        address = Address("memory", number)
        epochs: list[int] = []
        mesh = Mesh(
            gossip,
            MemoryTransport(lambda: me, self.network, address, now),
            save_epoch=save_epoch or epochs.append,
            clock=now,
        )
        mesh.publish(MEMBER, member(f"node-{number}", addresses=(address,)).to_wire())
        return Started(mesh, address, epochs)

    async def start(self, number: int, **arguments: Any) -> Started:
        """As `make`, and running."""
        started = self.make(number, **arguments)
        await self._nursery.start(partial(started.run))
        return started

    async def crash(self, started: Started) -> None:
        """kill -9: its connections break at once."""
        started.scope.cancel()
        await wait_all_tasks_blocked()


@asynccontextmanager
async def meshes() -> AsyncIterator[Meshes]:
    """Nothing runs any more at the end, and nothing may take for ever."""
    async with trio.open_nursery() as nursery:
        with trio.fail_after(DEADLINE_S):
            yield Meshes(nursery)
        nursery.cancel_scope.cancel()


async def until(mesh: Mesh, true: Callable[[], bool]) -> None:
    """Wait for changes of `mesh` until it is as it should be."""
    while not true():
        await mesh.changes.wait(mesh.changes.count)


def budget(mesh: Mesh, of: NodeId) -> int | None:
    """What `mesh` has heard that a node gives to models."""
    caps = mesh.view.nodes[of].caps
    return caps.budget_bytes if caps else None

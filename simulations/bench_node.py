"""The cost of a change in the mesh for one node: `python -m simulations.bench_node`.

A whole node without sockets: document, views, inputs of placement, plan, reconciling, routes. Every
other node wants one model and holds three; some serve theirs. For each size it prints the time on
the event loop until everything is up to date again, routes of the next request included, for

    state      a node says that a copy of a model is ready, or is not any more
    budget     a node gives more memory, or less
    lease      a node renews its lease, which changes nothing
    departure  a node says goodbye, and comes back

each as the median of `--changes` of them, without the checks of signatures, which are the same in
any shape of the node. Besides how often a lease woke those who wait for changes.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import trio
import trio.testing

from p2pmesh.config import Address
from p2pmesh.engine.find import Engine
from p2pmesh.gossip.membership import Gossip
from p2pmesh.gossip.shared import Shared
from p2pmesh.home import Home
from p2pmesh.identity import hello
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.models.parts import ReplicaKey
from p2pmesh.models.shard_cache import ShardCache
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.store import Store
from p2pmesh.node.backends import MeshBackends
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.inventory import ModelInventory, Opened
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.pipelines import Pipelines
from p2pmesh.node.reconciler import Reconciler
from p2pmesh.node.shards import Shards
from p2pmesh.state.registers import (
    Caps,
    HeldModel,
    Member,
    ModelRequest,
    Served,
    held_pages,
    held_register,
    serves_to_wire,
    wants_to_wire,
)
from p2pmesh.transport.memory import MemoryNetwork, MemoryTransport
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import RecordCheck, seal
from p2pmesh.wire.registers import CAPS, MEMBER, SERVING, WANTS
from simulations.bodies import GIB, card, model

MESH = MeshId(b"b" * 16)
SIZES = ((30, 20), (300, 60), (1000, 200))
CHANGES = 20
BATCH = 50  # records per message
HELD, WANTED = 3, 1  # models of each node


class Peer:
    """One of the other nodes: what it has said, and how it says more."""

    def __init__(self, number: int, models: int, now: int) -> None:
        self.number, self._models, self._now = number, models, now
        self._key = SigningKey(number.to_bytes(32, "big"))
        self.id, self.public = NodeId(self._key.id), self._key.public
        self._seq = 0
        self._held = [model((number * 7 + step * 3) % models) for step in range(HELD)]

    def say(self, register: str, body: Mapping[str, Any]) -> bytes:
        """A new version of one of its registers."""
        self._seq += 1
        return seal(
            self._key,
            mesh=MESH,
            register=register,
            epoch=self._now,
            seq=self._seq,
            instance=1,
            issued_at=self._now,
            ttl_s=3600,
            body=dict(body),
        ).raw

    def lease(self, *, left: bool = False) -> bytes:
        """Its `member` record, or its goodbye; without an address, so that nobody is dialled."""
        member = Member(name=f"node-{self.number}", addresses=(), version="0.1.0", left=left)
        return self.say(MEMBER, member.to_wire())

    def gives(self, gib: int) -> bytes:
        """How much memory it gives."""
        return self.say(CAPS, Caps(budget_bytes=gib * GIB, engine="simulated", rpc="").to_wire())

    def serves(self, *, ready: bool) -> bytes:
        """Whether the first model that it holds is ready there."""
        served = Served(digest=self._held[0], state="ready" if ready else "loading")
        return self.say(SERVING, serves_to_wire([served]))

    def everything(self) -> Iterator[bytes]:
        """All its registers, as at a start."""
        yield self.lease()
        yield self.gives(4 + self.number % 29)
        held = [HeldModel(digest=one, stem=f"model-{one[-4:]}", card=card(1)) for one in self._held]
        for number, page in enumerate(held_pages(held)):
            yield self.say(held_register(number), page)
        wish = ModelRequest(
            digest=model(self.number % self._models),
            stem=f"model-{self.number % self._models}",
            replicas=1,
            priority=0,
            context=0,
            slots=4,
        )
        yield self.say(WANTS, wants_to_wire([wish]))
        if self.number % 3 == 0:
            yield self.serves(ready=True)


@dataclass
class Node:
    """The node that is measured."""

    mesh: Mesh
    routes: MeshBackends
    peers: list[Peer]

    async def hear(self, *records: bytes) -> float:
        """Take records in and bring everything up to date; returns the seconds it took."""
        begun_s = time.thread_time()
        self.mesh.message_received(self.peers[0].id, Push(records=records))
        await _until_planned()
        for served in self.routes.models():
            self.routes.targets(served.digest)
        return time.thread_time() - begun_s


async def start(nursery: trio.Nursery, nodes: int, models: int, folder: Path) -> Node:
    """A node that knows all the others."""
    now = int(time.time())
    key = SigningKey(b"\xff" * 32)
    trusting = Shared(check=RecordCheck(verify=lambda _: True))
    core = Gossip(key=key, mesh=MESH, instance=1, epoch=now, shared=trusting)
    transport = MemoryTransport(_nobody, MemoryNetwork(), Address("memory", 0))
    mesh = Mesh(core, transport, save_epoch=lambda _: None, clock=time.time)
    nursery.start_soon(mesh.run, {})
    await mesh.settled.wait()
    mesh.publish(MEMBER, Member(name="me", addresses=(), version="0.1.0").to_wire())
    mesh.publish(CAPS, Caps(budget_bytes=GIB, engine="simulated", rpc="").to_wire())
    library = ShardLibrary(folder / "rankings", ShardCache(folder / "shards", None))
    inventory = ModelInventory(
        Store(Home.at(folder), environ={}), Opened(files={}, demo=model(0), wanted=()), library
    )
    engine = Engine(kind="embedded", command=("none",), source="wheel", version="0")
    engines = EngineManager(engine, logs=folder)
    reconciler = Reconciler(
        mesh,
        engines,
        inventory,
        slots=4,
        ask=_ask_nobody,
        pipelines=Pipelines(mesh, engines),
        shards=Shards(engines, library, _obtain_nothing),
    )
    node = Node(mesh, MeshBackends(mesh, reconciler, engines, slots=4), [])
    node.peers = [Peer(number + 1, models, now) for number in range(nodes - 1)]
    mesh.link_up(_peer(node.peers[0]))
    records = [record for peer in node.peers for record in peer.everything()]
    for begun in range(0, len(records), BATCH):
        mesh.message_received(node.peers[0].id, Push(records=tuple(records[begun : begun + BATCH])))
    nursery.start_soon(reconciler.run)
    await reconciler.planned.wait()
    await node.hear()
    return node


Change = Callable[[Peer], bytes]


def changes() -> dict[str, tuple[Change, Change]]:
    """Each kind of change, and what undoes it."""
    return {
        "state": (lambda peer: peer.serves(ready=False), lambda peer: peer.serves(ready=True)),
        "budget": (lambda peer: peer.gives(40), lambda peer: peer.gives(41)),
        "lease": (Peer.lease, Peer.lease),
        "departure": (lambda peer: peer.lease(left=True), Peer.lease),
    }


async def measure(nodes: int, models: int, count: int) -> dict[str, float]:
    """Milliseconds of the event loop per change, by kind, and wakings per lease."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with trio.open_nursery() as nursery:
            node = await start(nursery, nodes, models, Path(folder))
            # Each of few owners at a time: what one says too fast is not taken.
            peers = itertools.cycle(random.Random(1).sample(node.peers, min(count, nodes - 1)))
            for kind, pair in changes().items():
                times_s: list[float] = []
                woken = node.mesh.changes.count
                for _ in range(count):
                    peer = next(peers)
                    times_s += [await node.hear(change(peer)) for change in pair]
                figures[kind] = 1000 * statistics.median(times_s)
                if kind == "lease":
                    figures["woken"] = (node.mesh.changes.count - woken) / len(times_s)
            nursery.cancel_scope.cancel()
    return figures


async def _until_planned() -> None:
    """Wait until nothing is left to do, the thread that plans included."""
    threads = trio.to_thread.current_default_thread_limiter()
    await trio.testing.wait_all_tasks_blocked()
    while threads.borrowed_tokens:
        await trio.testing.wait_all_tasks_blocked(cushion=0.001)


def _peer(peer: Peer) -> hello.Peer:
    """Return the peer that a finished hello proves."""
    return hello.Peer(
        node=peer.id,
        public=peer.public,
        instance=1,
        mesh=MESH,
        mesh_name="bench",
        purpose="gossip",
        clock_ahead_s=0,
        version=max(hello.VERSIONS),
    )


def _nobody() -> Any:
    raise AssertionError("nothing is dialled here")


async def _ask_nobody(replica: ReplicaKey) -> None:
    raise AssertionError(f"nothing runs here, so {replica} is not asked")


async def _obtain_nothing(*shard: object) -> None:
    raise AssertionError(f"no shard runs here, nor {shard}")


def main(arguments: Sequence[str]) -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench_node", description=__doc__)
    parser.add_argument("--changes", type=int, default=CHANGES, help="of each kind and size")
    parser.add_argument("--nodes", type=int, nargs="*", help="sizes, of 30, 300 and 1000")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    print("nodes models" + "".join(f"{kind:>11}" for kind in changes()) + "   ms; woken per lease")
    for nodes, models in SIZES:
        if options.nodes and nodes not in options.nodes:
            continue
        figures = trio.run(measure, nodes, models, options.changes)
        shown = "".join(f"{figures[kind]:11.2f}" for kind in changes())
        print(f"{nodes:5} {models:6}{shown}   {figures['woken']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

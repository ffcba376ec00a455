"""One node without a network: the test says what the others would, and engines are scripted.

Everything between a received record and what the node does about it is real: core, view, plan,
serving, routes. Only links, engine processes and the core's own timers are not there: it probes
nobody, so nobody has to answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from p2pmesh.config import Address
from p2pmesh.engine.find import Engine
from p2pmesh.engine.server import LlamaServer
from p2pmesh.engine.supervisor import EngineStatus, State
from p2pmesh.errors import LinkError
from p2pmesh.gossip.core import REVIEW, TICK
from p2pmesh.gossip.events import TimerFired
from p2pmesh.gossip.membership import Gossip
from p2pmesh.gossip.overlay import RINGS
from p2pmesh.gossip.probe import PROBE_INTERVAL_S
from p2pmesh.home import Home
from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import ReplicaKey
from p2pmesh.models.shard_cache import ShardCache
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.store import ModelFile, Store
from p2pmesh.node import engines as engines_module
from p2pmesh.node.backends import MeshBackends
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.inventory import InventoryPublisher, ModelInventory, Opened
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.pipelines import Pipelines
from p2pmesh.node.reconciler import Reconciler
from p2pmesh.node.shards import Shards
from p2pmesh.state.registers import (
    Caps,
    HeldModel,
    ModelRequest,
    Served,
    ServeState,
    held_pages,
    held_register,
    serves_to_wire,
    wants_to_wire,
)
from p2pmesh.transport.memory import MemoryNetwork, MemoryTransport
from p2pmesh.wire.evidence import Accusation, accused_to_wire, make_certificate
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import Record
from p2pmesh.wire.registers import ACCUSED, CAPS, MEMBER, SERVING, WANTS
from tests.node.meshes import clock, peer_of
from tests.state.builders import KEYS, MESH, NODES, NOW, card, digest, member, record

ME = NODES[0]
GIB = 2**30
HERE = Address("memory", 0)
SLOTS = 4
MESSENGER = len(NODES) - 1  # no member
ENGINE = Engine(kind="embedded", command=("none",), source="wheel", version="2026.10")


async def obtain_nothing(*shard: object) -> None:
    raise AssertionError(f"no shard starts here, nor {shard}")


class Hearsay:
    """The mesh as one node hears of it; other nodes are numbers from 1 on."""

    def __init__(self) -> None:
        core = Gossip(key=KEYS[0], mesh=MESH, instance=1, epoch=NOW)
        transport = MemoryTransport(_nobody, MemoryNetwork(), HERE)
        self.mesh = Mesh(core, transport, save_epoch=_no_epoch, clock=clock)
        self.mesh._nursery = _NoTimers()  # type: ignore[assignment]  # nothing else is started here
        self.mesh._do(core.start(clock()))
        self.mesh.settled.set()
        self.mesh.publish(MEMBER, member("me", addresses=(HERE,)).to_wire())
        self._seq = 0
        self._members: dict[int, Record] = {}

    def give(self, budget_bytes: int = 8 * GIB) -> None:
        """This node's own memory."""
        caps = Caps(budget_bytes=budget_bytes, engine="embedded 2026.10", rpc="")
        self.mesh.publish(CAPS, caps.to_wire())

    def say(self, number: int, register: str, body: dict[str, Any]) -> None:
        """Another node signs something, and it arrives."""
        said = self._sign(number, register, body)
        if register == MEMBER:
            self._members[number] = said
        self._tell(number, Push(records=(said.raw,)))

    def _sign(self, number: int, register: str, body: dict[str, Any]) -> Record:
        self._seq += 1
        return record(number, register, seq=self._seq, issued_at=int(clock()), body=body)

    def _tell(self, number: int, facts: Push) -> None:
        """Over its own link, or by a messenger who comes, says it and goes."""
        if NODES[number] in self.mesh.linked:
            self.mesh.message_received(NODES[number], facts)
            return
        self.link(MESSENGER)
        self.mesh.message_received(NODES[MESSENGER], facts)
        self.mesh.link_down(NODES[MESSENGER])

    def join(self, number: int, *, budget_bytes: int = 0, linked: bool = True) -> NodeId:
        """Another node is here."""
        self.say(number, MEMBER, member(f"node-{number}", addresses=()).to_wire())
        caps = Caps(budget_bytes=budget_bytes, engine="native b1", rpc="7.0.0")
        self.say(number, CAPS, caps.to_wire())
        self.mesh._feed(TimerFired(token=REVIEW))  # it is a neighbour now
        if linked:
            self.link(number)
        return NODES[number]

    def link(self, number: int) -> None:
        self.mesh.link_up(peer_of(KEYS[number]))

    def suspect(self, number: int) -> None:
        """Its link breaks."""
        self.mesh.link_down(NODES[number])

    def pass_on(self) -> None:
        """What the core holds back, as it does for a while with much to say at once, is said."""
        self.mesh._feed(TimerFired(token=REVIEW))

    async def stay_awake(self, seconds: float) -> None:
        """Time passes with the core's own timer, without which it takes a while for a sleep."""
        end = clock() + seconds
        while clock() < end:
            await trio.sleep(PROBE_INTERVAL_S)
            self.mesh._feed(TimerFired(token=TICK))

    def kill(self, number: int) -> None:
        """Its link breaks, and the mesh agrees that it is gone: everybody else says so."""
        self.suspect(number)
        gone = self._members.pop(number)
        accusation = Accusation(subject=gone.owner, epoch=gone.epoch, seq=gone.seq)
        witnesses = sorted([0, *self._members])[:RINGS]
        evidence = [self._sign(n, ACCUSED, accused_to_wire([accusation])) for n in witnesses]
        removal = make_certificate(accusation, evidence)
        self._tell(number, Push(certificates=(removal.raw,)))

    def hold(self, number: int, *models: HeldModel) -> None:
        """It has these files; few enough for one page."""
        (page,) = held_pages(models)
        self.say(number, held_register(0), page)

    def serve(self, number: int, model: int, state: ServeState = "ready", detail: str = "") -> None:
        self.serve_parts(number, Served(digest=digest(model), state=state, detail=detail))

    def serve_parts(self, number: int, *served: Served) -> None:
        self.say(number, SERVING, serves_to_wire(served))

    def want(self, number: int, *models: ModelRequest) -> None:
        self.say(number, WANTS, wants_to_wire(models))

    def want_copies(self, count: int, model: ModelRequest) -> None:
        """So many owners want a model: each may ask for one copy."""
        for number in range(1, count + 1):
            self.want(number, replace(model, replicas=count))

    def served(self) -> dict[ModelDigest, tuple[str, str]]:
        """What this node tells the others that it runs: state and detail."""
        me = self.mesh.view.nodes[ME]
        return {one.digest: (one.state, one.detail) for one in me.serves.values()}


def wanted(model: int, **changes: Any) -> ModelRequest:
    arguments: dict[str, Any] = {
        "digest": digest(model),
        "stem": f"model-{model}",
        "replicas": 1,
        "priority": 0,
        "context": 1024,
        "slots": 2,
    }
    return ModelRequest(**{**arguments, **changes})


class ScriptedEngine:
    """Stands in for `Supervisor`: its states are the test's, its end is the node's."""

    started: list[ScriptedEngine]  # a fresh list for each `Parts`

    def __init__(
        self, kind: LlamaServer, *, logs: Path, on_change: Callable[[EngineStatus], None]
    ) -> None:
        self.launch = kind.launch
        self.log_path = logs / f"engine-{kind.name}.log"
        self.ended = False
        self._on_change = on_change
        self.status = EngineStatus(
            state="loading",
            host="",
            port=0,
            api_key="secret",
            pid=None,
            detail="waiting to start",
            since_s=0.0,
        )
        self.started.append(self)

    async def run(self) -> None:
        try:
            self.become("loading", "starting")
            await trio.sleep_forever()
        finally:
            self.become("stopping", "ending the engine")
            self.become("stopped")
            self.ended = True

    def become(self, state: State, detail: str = "", **changes: Any) -> None:
        self.status = replace(self.status, state=state, detail=detail, **changes)
        self._on_change(self.status)


@dataclass
class Parts:
    """A node's parts around a `Hearsay`, with model 0 as its embedded one."""

    hearsay: Hearsay
    inventory: ModelInventory
    manager: EngineManager
    engines: list[ScriptedEngine]
    publisher: InventoryPublisher = field(init=False)
    reconciler: Reconciler = field(init=False)
    routes: MeshBackends = field(init=False)
    asked: list[ReplicaKey] = field(default_factory=list)
    answering: set[NodeId] = field(default_factory=lambda: set(NODES))

    def __post_init__(self) -> None:
        self.join(self.hearsay)

    def join(self, hearsay: Hearsay) -> None:
        """Make the parts that belong to one mesh anew; engines and inventory stay."""
        self.hearsay = hearsay
        self.publisher = InventoryPublisher(hearsay.mesh, self.inventory)
        self.reconciler = Reconciler(
            hearsay.mesh,
            self.manager,
            self.inventory,
            slots=SLOTS,
            ask=self.ask,
            pipelines=Pipelines(hearsay.mesh, self.manager),
            shards=Shards(self.manager, self.inventory.library, obtain_nothing),
        )
        self.routes = MeshBackends(hearsay.mesh, self.reconciler, self.manager, slots=SLOTS)

    @property
    def mesh(self) -> Mesh:
        return self.hearsay.mesh

    def engine(self, model: int) -> ScriptedEngine:
        """The latest engine of a model."""
        id_of = self.mesh.view.catalogue.id_of
        return next(
            one for one in reversed(self.engines) if one.launch.alias == id_of(digest(model))
        )

    async def ask(self, replica: ReplicaKey) -> None:
        """Another node's replica is asked for a token."""
        self.asked.append(replica)
        if replica.node not in self.answering:
            raise LinkError("nobody answers")

    def running(self) -> list[str]:
        return [one.launch.alias for one in self.engines if not one.ended]


def model_file(model: int, **changes: Any) -> ModelFile:
    one = card(**changes)
    return ModelFile(
        parts=(Path(f"/models/model-{model}.gguf"),),
        stem=f"model-{model}",
        size_bytes=one.size_bytes,
        card=one,
    )


def library_in(folder: Path) -> ShardLibrary:
    return ShardLibrary(folder / "rankings", ShardCache(folder / "shards", None))


def make_parts(
    hearsay: Hearsay,
    folder: Path,
    patch: pytest.MonkeyPatch,
    *,
    files: Iterable[int] = (0,),
    budget_bytes: int = 8 * GIB,
    **changes: Any,
) -> Parts:
    """The parts of a node that holds these models; nothing runs yet."""
    engines: list[ScriptedEngine] = []
    scripted = type("Scripted", (ScriptedEngine,), {"started": engines})
    patch.setattr(engines_module, "Supervisor", scripted)
    opened = Opened(
        files={digest(model): model_file(model, **changes) for model in files},
        demo=digest(0),
        wanted=(),
    )
    inventory = ModelInventory(Store(Home.at(folder), environ={}), opened, library_in(folder))
    hearsay.give(budget_bytes)
    return Parts(hearsay, inventory, EngineManager(ENGINE, logs=folder), engines)


@asynccontextmanager
async def serving(parts: Parts) -> AsyncIterator[Parts]:
    """Its engines follow the plan; by the first line of the block they do what is known."""
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.manager.run)
        nursery.start_soon(parts.reconciler.run)
        await wait_all_tasks_blocked()
        yield parts
        nursery.cancel_scope.cancel()


class _NoTimers:
    """Stands in for the nursery in which timers run."""

    def start_soon(self, *_: object) -> None:
        """It never fires."""


def _nobody() -> Any:
    raise AssertionError("nothing is dialled here")


def _no_epoch(epoch: int) -> None:
    raise AssertionError("nobody has this node's key")

"""From the facts to this node's engines: plan, reconcile, start and stop, and say what runs.

The decisions are `placement`'s; here are the processes. A node acts on itself only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import structlog
import trio

from p2pmesh.engine.argv import Launch, engine_modality
from p2pmesh.engine.find import Engine
from p2pmesh.engine.process import EngineProcess, EngineStatus
from p2pmesh.models.cards import ModelDigest
from p2pmesh.node.holding import Holding
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.proofs import Ask, Proofs
from p2pmesh.placement.facts import Facts
from p2pmesh.placement.inputs import InputsReader, launch_context, launch_slots
from p2pmesh.placement.plan import Plan, plan
from p2pmesh.placement.reconcile import Check, Replica, Start, Stop, reconcile
from p2pmesh.state.bodies import SERVES, Served, ServeState, serves_to_wire

DRAIN_S = 30.0  # a running answer gets this long before its engine is stopped
DRAIN_POLL_S = 0.1

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Running:
    process: EngineProcess
    scope: trio.CancelScope
    draining: bool = False

    @property
    def state(self) -> ServeState:
        state = self.process.status.state
        return "stopping" if self.draining or state == "stopped" else state


class Serving:
    """The engines of one node.

    Args:
        mesh: Where facts come from and states go.
        engine: What runs models.
        holding: Where their files are.
        slots: Requests at the same time, where no want says otherwise.
        logs: Where engines log.
        in_flight: How many requests an engine is answering.
        ask: Has another node's replica compute a token; raises `MeshError` when it does not.
    """

    def __init__(
        self,
        mesh: Mesh,
        engine: Engine,
        holding: Holding,
        *,
        slots: int,
        logs: Path,
        in_flight: Callable[[ModelDigest], int],
        ask: Ask,
    ) -> None:
        self.plan: Plan = plan(Facts())
        self.planned = trio.Event()
        self._facts = Facts()
        self._mesh = mesh
        self._engine = engine
        self._holding = holding
        self._slots = slots
        self._logs = logs
        self._in_flight = in_flight
        self._threads = compute_threads(psutil.cpu_count(logical=False))
        self._inputs = InputsReader()
        self._proofs = Proofs(ask, mesh.changes.notify)
        self._running: dict[ModelDigest, _Running] = {}
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()

    def status(self, digest: ModelDigest) -> EngineStatus | None:
        """The engine of a model, while it takes requests; None otherwise."""
        running = self._running.get(digest)
        return running.process.status if running and running.state == "ready" else None

    def doubt(self, replica: Replica) -> None:
        """Believe a replica that failed a request no more, until it has answered anew."""
        self._proofs.void(replica)

    def used_bytes(self) -> int:
        """Main memory that this node's engines hold."""
        pids = [one.process.status.pid for one in self._running.values()]
        return sum(_resident_bytes(pid) for pid in pids if pid is not None)

    async def run(self) -> None:
        """Serve what the plan has here, until cancelled or stopped; then all engines are gone."""
        await self._mesh.settled.wait()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    while True:
                        seen = self._mesh.changes.count
                        self._reconcile(nursery)
                        self.planned.set()
                        await self._mesh.changes.wait(seen)
        finally:
            self._stopped.set()

    async def stop(self) -> None:
        """End all engines; returns when they are gone."""
        self._scope.cancel()
        if self.planned.is_set():
            await self._stopped.wait()

    def _reconcile(self, nursery: trio.Nursery) -> None:
        facts = self._inputs.read(self._mesh.view, self._mesh.dead)
        if facts != self._facts:
            self._facts, self.plan = facts, plan(facts)
            self._mesh.set_plan(self.plan.digest)
        running = {digest: one.state for digest, one in self._running.items()}
        for action in reconcile(
            me=self._mesh.me,
            plan=self.plan,
            facts=facts,
            running=running,
            proven=self._proofs.review(self._claims(facts)),
        ):
            match action:
                case Start(digest=digest):
                    self._start(digest, nursery)
                case Check(digest=digest, node=node):
                    self._proofs.check((digest, node), nursery)
                case Stop() if self._mesh.catching_up:
                    continue  # the plan may lack what the others said meanwhile
                case Stop(digest=digest, reason=reason):
                    log.info("model_stopping", digest=digest, reason=str(reason))
                    self._running[digest].draining = True
                    nursery.start_soon(self._drain, self._running[digest], digest)
        self._publish()

    def _claims(self, facts: Facts) -> dict[Replica, int]:
        """The replicas that other nodes say are ready, with those nodes' instances."""
        nodes = self._mesh.view.nodes
        return {
            (part.digest, part.node): nodes[part.node].instance
            for part in facts.residents
            if part.state == "ready" and part.node != self._mesh.me
        }

    def _start(self, digest: ModelDigest, nursery: trio.Nursery) -> None:
        file = self._holding.file(digest)
        if file is None:  # it was held when the plan was made
            log.warning("model_gone", digest=digest)
            return
        view, me = self._mesh.view, self._mesh.me
        model = view.models[digest]
        mine = (wish.wanted for wish in model.wishes if wish.owner == me)
        launch = Launch(
            model_paths=file.parts,
            alias=view.catalogue.id_of(digest),
            modality=engine_modality(file.card.gives),
            context=launch_context(model.wanted, file.card, view.nodes[me].budget_bytes),
            slots=launch_slots(model.wanted, next(mine, None), self._slots),
            threads=compute_threads(psutil.cpu_count(logical=False)),
        )
        process = EngineProcess(
            self._engine,
            launch,
            logs=self._logs,
            on_change=lambda _: self._publish(),
            check=partial(self._holding.check, digest),
        )
        log.info("model_starting", digest=digest, alias=launch.alias)
        self._running[digest] = _Running(process, trio.CancelScope())
        nursery.start_soon(self._serve, digest, self._running[digest])

    async def _serve(self, digest: ModelDigest, running: _Running) -> None:
        try:
            with running.scope:
                await running.process.run()
        finally:
            del self._running[digest]
            self._publish()

    async def _drain(self, running: _Running, digest: ModelDigest) -> None:
        with trio.move_on_after(DRAIN_S):
            while self._in_flight(digest):  # noqa: ASYNC110 - a count, nobody announces it
                await trio.sleep(DRAIN_POLL_S)
        running.scope.cancel()

    def _publish(self) -> None:
        served = [
            Served(digest=digest, state=one.state, detail=one.process.status.detail)
            for digest, one in self._running.items()
        ]
        self._mesh.publish(SERVES, serves_to_wire(served))


def compute_threads(cores: int | None) -> int:
    """How many threads compute: one core is left to the node and to what else runs here.

    llama.cpp's threads wait for each other after every step by spinning. With as many as cores, a
    single busy program makes each wait a time slice long: measured on two cores, 0.8 to 2 s for a
    request that takes 4 ms with one thread less.

    Args:
        cores: Physical ones; None when the system does not say.
    """
    return max((cores or 2) - 1, 1)


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:  # it ended a moment ago
        return 0

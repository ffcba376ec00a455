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
from p2pmesh.models.parts import PartId, ReplicaKey
from p2pmesh.node.holding import Holding
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.proofs import Ask, Proofs
from p2pmesh.placement.facts import Facts
from p2pmesh.placement.inputs import InputsReader, launch_context, launch_slots
from p2pmesh.placement.plan import Plan, plan
from p2pmesh.placement.reconcile import Check, Start, Stop, reconcile
from p2pmesh.state.bodies import Served, ServeState, serves_to_wire
from p2pmesh.wire.registers import SERVING

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
        self._running: dict[PartId, _Running] = {}
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()

    def status(self, part: PartId) -> EngineStatus | None:
        """The engine of a part, while it takes requests; None otherwise."""
        running = self._running.get(part)
        return running.process.status if running and running.state == "ready" else None

    def doubt(self, replica: ReplicaKey) -> None:
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
        running = {part: one.state for part, one in self._running.items()}
        for action in reconcile(
            me=self._mesh.me,
            plan=self.plan,
            facts=facts,
            running=running,
            proven=self._proofs.review(self._claims(facts)),
        ):
            match action:
                case Start(part=part):
                    self._start(part, nursery)
                case Check(replica=replica):
                    self._proofs.check(replica, nursery)
                case Stop() if self._mesh.catching_up:
                    continue  # the plan may lack what the others said meanwhile
                case Stop(part=part, reason=reason):
                    log.info("part_stopping", part=part, reason=str(reason))
                    self._running[part].draining = True
                    nursery.start_soon(self._drain, self._running[part], part)
        self._publish()

    def _claims(self, facts: Facts) -> dict[ReplicaKey, int]:
        """The replicas that other nodes say are ready, with those nodes' instances."""
        nodes = self._mesh.view.nodes
        return {
            ReplicaKey(one.node, one.part): nodes[one.node].instance
            for one in facts.residents
            if one.state == "ready" and one.node != self._mesh.me
        }

    def _start(self, part: PartId, nursery: trio.Nursery) -> None:
        file = self._holding.file(part.digest)
        if file is None:  # it was held when the plan was made
            log.warning("part_gone", part=part)
            return
        view, me = self._mesh.view, self._mesh.me
        model = view.models[part.digest]
        mine = (wish.wanted for wish in model.wishes if wish.owner == me)
        launch = Launch(
            model_paths=file.parts,
            alias=view.catalogue.id_of(part.digest),
            modality=engine_modality(file.card.gives),
            context=launch_context(model.wanted, file.card, view.nodes[me].budget_bytes),
            slots=launch_slots(model.wanted, next(mine, None), self._slots),
            threads=self._threads,
        )
        process = EngineProcess(
            self._engine,
            launch,
            logs=self._logs,
            on_change=lambda _: self._publish(),
            check=partial(self._holding.check, part.digest),
        )
        log.info("part_starting", part=part, alias=launch.alias)
        self._running[part] = _Running(process, trio.CancelScope())
        nursery.start_soon(self._serve, part, self._running[part])

    async def _serve(self, part: PartId, running: _Running) -> None:
        try:
            with running.scope:
                await running.process.run()
        finally:
            del self._running[part]
            self._publish()

    async def _drain(self, running: _Running, part: PartId) -> None:
        with trio.move_on_after(DRAIN_S):
            while self._in_flight(part.digest):  # noqa: ASYNC110 - a count, nobody announces it
                await trio.sleep(DRAIN_POLL_S)
        running.scope.cancel()

    def _publish(self) -> None:
        served = [
            Served(
                digest=part.digest,
                name=part.name,
                state=one.state,
                detail=one.process.status.detail,
            )
            for part, one in self._running.items()
        ]
        self._mesh.publish(SERVING, serves_to_wire(served))


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

"""From the facts of one mesh to this node's engines: plan, reconcile, and say what runs.

The decisions are `placement`'s, the processes `engines.py`'s. A node acts on itself only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import structlog
import trio

from p2pmesh.engine.argv import Launch, engine_modality
from p2pmesh.engine.server import LlamaServer
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import ReplicaKey, parse_stage
from p2pmesh.node.engines import EngineManager, compute_threads
from p2pmesh.node.inventory import ModelInventory
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.pipelines import Pipelines
from p2pmesh.node.proofs import Ask, Proofs
from p2pmesh.node.shards import Shards
from p2pmesh.placement.facts import PlacementInputs
from p2pmesh.placement.inputs import InputsReader, launch_slots, part_context
from p2pmesh.placement.plan import Plan, plan
from p2pmesh.placement.reconcile import Check, Start, Stop, StopReason, reconcile
from p2pmesh.state.registers import serves_to_wire
from p2pmesh.wire.registers import SERVING

# A plan of more nodes is made in a thread: to find that a model fits on no 8 of them takes 0.4 s,
# on no 4 of them 8 ms.
PLANNED_AT_ONCE_MAX = 4

log = structlog.get_logger(__name__)


class Reconciler:
    """Keeps the engines at what the plan of a mesh has here, and the mesh told of them.

    Args:
        mesh: Where facts come from and states go.
        engines: What runs here.
        inventory: Where the files of models are.
        slots: Requests at the same time, where no want says otherwise.
        pipelines: Starts stages and heads.
        shards: Starts shards.
        ask: Has another node's replica compute a token; raises `MeshError` when it does not.

    Attributes:
        plan: The present one.
        planned: Set once there was the first.
    """

    def __init__(
        self,
        mesh: Mesh,
        engines: EngineManager,
        inventory: ModelInventory,
        *,
        slots: int,
        ask: Ask,
        pipelines: Pipelines,
        shards: Shards,
    ) -> None:
        self._pipelines, self._shards = pipelines, shards
        self.plan: Plan = plan(PlacementInputs())
        self.planned = trio.Event()
        self._facts = PlacementInputs()
        self._view = mesh.view
        self._mesh = mesh
        self._engines = engines
        self._inventory = inventory
        self._slots = slots
        self._threads = compute_threads(psutil.cpu_count(logical=False))
        self._inputs = InputsReader()
        self._proofs = Proofs(ask, mesh.changes.notify)

    @property
    def facts(self) -> PlacementInputs:
        """Return what the present plan was made from."""
        return self._facts

    def doubt(self, replica: ReplicaKey) -> None:
        """Believe a replica that failed a request no more, until it has answered anew."""
        self._proofs.void(replica)

    async def run(self) -> None:
        """Follow the plan until cancelled. The engines go on."""
        self._publish()
        await self._mesh.settled.wait()
        with self._engines.watched(self._publish):
            async with trio.open_nursery() as nursery:
                while True:
                    seen = self._mesh.changes.count
                    await self._replan()
                    self._reconcile(nursery)
                    self.planned.set()
                    await self._mesh.changes.wait(seen)

    async def _replan(self) -> None:
        """Plan anew if the facts have changed."""
        view = self._mesh.view
        facts = self._inputs.read(view, self._mesh.dead)
        if facts != self._facts:
            if len(facts.nodes) <= PLANNED_AT_ONCE_MAX:
                self.plan = plan(facts)
            else:
                self.plan = await trio.to_thread.run_sync(plan, facts, abandon_on_cancel=True)
            self._facts = facts
            self._mesh.set_plan(self.plan.digest)
        self._view = view  # the one that the plan is of: the mesh may be further by now

    def _reconcile(self, nursery: trio.Nursery) -> None:
        for action in reconcile(
            me=self._mesh.me,
            plan=self.plan,
            facts=self._facts,
            running=self._engines.states(),
            proven=self._proofs.review(self._claims(self._facts)),
        ):
            match action:
                case Start():
                    self._start(action)
                case Check(replica=replica):
                    self._proofs.check(replica, nursery)
                case Stop() if self._mesh.catching_up:
                    continue  # the plan may lack what the others said meanwhile
                case Stop(part=part, reason=reason):
                    log.info("part_stopping", part=part, reason=str(reason))
                    if reason is StopReason.BROKEN:
                        self._engines.cut(part)
                    elif reason is StopReason.FAILED:
                        self._engines.rest(part)
                    else:
                        self._engines.drain(part)
        self._publish()

    def _claims(self, facts: PlacementInputs) -> dict[ReplicaKey, int]:
        """The replicas that other nodes say are ready, with those nodes' instances."""
        nodes = self._view.nodes
        return {
            ReplicaKey(one.node, one.part): nodes[one.node].instance
            for one in facts.residents
            if one.state == "ready" and one.node != self._mesh.me
        }

    def _start(self, action: Start) -> None:
        part, stages = action.part, action.stages
        stage = parse_stage(part.name)
        if stage is not None and stage.number:
            paths = partial(self._paths, part.digest)
            self._pipelines.start_stage(part, stages, threads=self._threads, model_paths=paths)
            return
        file = self._inventory.file(part.digest)
        if file is None:  # it was held when the plan was made
            log.warning("part_gone", part=part)
            return
        view, me = self._view, self._mesh.me
        model = view.models[part.digest]
        mine = (wish.wanted for wish in model.wishes if wish.owner == me)
        launch = Launch(
            model_paths=file.parts,
            alias=view.catalogue.id_of(part.digest),
            modality=engine_modality(file.card.gives),
            context=part_context(part.name, model.wanted, file.card, view.nodes[me].budget_bytes),
            slots=launch_slots(model.wanted, next(mine, None), self._slots),
            threads=self._threads,
        )
        check = partial(self._inventory.check, part.digest)
        if action.shard is not None:
            self._shards.start(part, action.shard, launch, file, check)
        elif stage is None:
            self._engines.start(part, LlamaServer(self._engines.engine, launch, check=check))
        else:
            self._pipelines.start_head(part, stages, launch, check)

    def _paths(self, digest: ModelDigest) -> Sequence[Path]:
        file = self._inventory.file(digest)
        return () if file is None else file.parts

    def _publish(self) -> None:
        self._mesh.publish(SERVING, serves_to_wire(self._engines.served()))

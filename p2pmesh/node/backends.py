"""The gateway's backends: the mesh's view joined with this node's engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import trio

from p2pmesh.gateway.route import LOADING, READY, ServedModel, ShardsServed, Target
from p2pmesh.gossip.events import Health
from p2pmesh.identity.hello import HTTP
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.catalogue import Catalogue, Named
from p2pmesh.models.parts import WHOLE, PartId, ReplicaKey, is_full, takes_requests
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.reconciler import Reconciler
from p2pmesh.placement.assignment import Assignment
from p2pmesh.placement.explain import explain
from p2pmesh.placement.inputs import launch_context, launch_slots, part_context
from p2pmesh.placement.layout import Experts
from p2pmesh.placement.plan import Plan
from p2pmesh.sharing import MILLION
from p2pmesh.state.registers import Served
from p2pmesh.state.views import ModelView, NodeView

CHAT = frozenset({"chat"})  # what a model of which nothing is known is taken to give


class MeshBackends:
    """Implements the gateway's `Backends`.

    Args:
        mesh: What the nodes say that they serve.
        reconciler: What the plan is.
        engines: What this node runs.
        slots: Requests at the same time, where no want says otherwise.
    """

    def __init__(
        self, mesh: Mesh, reconciler: Reconciler, engines: EngineManager, *, slots: int
    ) -> None:
        self._mesh = mesh
        self._reconciler = reconciler
        self._engines = engines
        self._slots = slots
        self._made: _Made | None = None
        self._planned: tuple[Plan, Mapping[ModelDigest, Assignment]] = reconciler.plan, {}

    def models(self) -> Sequence[ServedModel]:
        """See `Backends.models`."""
        return self._fresh().models

    def catalogue(self) -> Catalogue:
        """See `Backends.catalogue`."""
        return self._fresh().catalogue

    def targets(self, digest: ModelDigest) -> Sequence[Target]:
        """See `Backends.targets`."""
        known = self._fresh().targets
        if digest not in known:
            known[digest] = self._targets(digest)
        return known[digest]

    async def connect(self, target: Target) -> trio.abc.Stream:
        """See `Backends.connect`."""
        if not target.local:
            return await self._mesh.open_stream(target.node, HTTP)
        return await self._engines.connect(target.part)

    def engine_key(self, part: PartId) -> str | None:
        """See `Backends.engine_key`."""
        return self._engines.api_key(part)

    async def lost(self, target: Target) -> None:
        """See `Backends.lost`."""
        if not target.local:
            await self._mesh.suspected(target.node).wait()
            return
        while self._engines.states().get(target.part) in ("ready", "stopping"):
            await self._mesh.changes.wait(self._mesh.changes.count)

    def begin(self, part: PartId) -> None:
        """See `Backends.begin`."""
        self._engines.begin(part)

    def end(self, part: PartId) -> None:
        """See `Backends.end`."""
        self._engines.end(part)

    def failed(self, replica: ReplicaKey) -> None:
        """See `Backends.failed`."""
        self._reconciler.doubt(replica)

    async def changed(self) -> None:
        """See `Backends.changed`."""
        await self._mesh.changes.wait(self._mesh.changes.count)

    # --- also for the status --------------------------------------------------------------------

    def replicas(self, digest: ModelDigest) -> Sequence[tuple[NodeView, Served]]:
        """Return the replicas that nodes claim for a model, in whatever state."""
        model = self._mesh.view.models.get(digest)
        dead = self._mesh.dead
        return [pair for pair in model.replicas if pair[0].node not in dead] if model else ()

    def answering(self, digest: ModelDigest) -> Sequence[tuple[NodeView, Served]]:
        """Return the replicas for a model, or for what stands in for it, in whatever state."""
        stand_in = self._stand_in(digest)
        return self.replicas(digest if stand_in is None else stand_in.digest)

    def _serving(self, digest: ModelDigest) -> list[tuple[NodeView, Served]]:
        """Return the replicas among them that take requests: no stages behind a head."""
        return [pair for pair in self.replicas(digest) if takes_requests(pair[1].name)]

    def state(self, digest: ModelDigest) -> str:
        """The best of its replicas' states; `loading` also while one is about to start.

        Of a pipeline only the head makes it ready: the other stages are ready before.
        """
        states = {
            one.state
            for _, one in self.replicas(digest)
            if one.state != READY or takes_requests(one.name)
        }
        for state in (READY, LOADING, "failed"):
            if state in states:
                return state
        assignment = self._assignments().get(digest)
        if assignment is not None and assignment.instead is not None:
            return self.state(assignment.instead)
        return LOADING if assignment and assignment.nodes else "not served"

    def reason(self, digest: ModelDigest) -> str:
        """Why a model is placed as it is, or why it failed, in a sentence."""
        if self.state(digest) == "failed":
            return "; ".join(
                f"on {node.member.name}: {one.detail or 'it did not say why'}"
                for node, one in self.replicas(digest)
                if one.state == "failed"
            )
        assignment = self._assignments().get(digest)
        if assignment is None:
            return "no node here has its file"
        return explain(assignment, self._name_of)

    def _name_of(self, node: NodeId) -> str:
        view = self._mesh.view.nodes.get(node)
        return view.member.name if view else show_id(node)

    def _assignments(self) -> Mapping[ModelDigest, Assignment]:
        """The plan by model; made once per plan."""
        plan = self._reconciler.plan
        if self._planned[0] is not plan:
            self._planned = plan, {one.digest: one for one in plan.assignments}
        return self._planned[1]

    # --- made once per change, as every request asks --------------------------------------------

    def _fresh(self) -> _Made:
        count = self._mesh.changes.count
        if self._made is None or self._made.count != count:
            self._made = self._make(count)
        return self._made

    def _make(self, count: int) -> _Made:
        view, assignments = self._mesh.view, self._assignments()
        offered = {
            digest: model
            for digest, model in view.models.items()
            if model.names and self._is_offered(model, assignments.get(digest))
        }
        names = frozenset().union(*(model.names for model in offered.values()))
        if self._made is not None and self._made.names == names:
            catalogue = self._made.catalogue
        else:
            catalogue = Catalogue(names)
        models = [self._model(model, catalogue) for model in offered.values()]
        return _Made(
            count=count,
            names=names,
            catalogue=catalogue,
            models=tuple(sorted(models, key=lambda model: model.id)),
            targets={},
        )

    def _is_offered(self, model: ModelView, assignment: Assignment | None) -> bool:
        """Whether requests may ask for it: it is wanted, or runs somewhere.

        That goes for what should be served and is not yet: its owner died a moment ago.
        """
        if model.wishes or (assignment is not None and assignment.copies):
            return True
        return any(model.digest in node.held for node, _ in self.replicas(model.digest))

    def _model(self, model: ModelView, catalogue: Catalogue) -> ServedModel:
        stand_in = self._stand_in(model.digest)
        if stand_in is not None:
            one = self._model(stand_in, catalogue)
            return replace(
                one,
                digest=model.digest,
                id=catalogue.id_of(model.digest),
                reason=self.reason(model.digest),
                demo=False,
                layout="quantisation",
                served_as=one.id,
            )
        digest, card = model.digest, model.card
        serving = self._serving(digest)
        claiming = [(node, one) for node, one in serving if one.state == READY]
        ready = [node for node, one in claiming if self._can_reach(node.node, one.part)]
        state, reason = self.state(digest), self.reason(digest)
        if claiming and not ready:
            # Either it answers again in a moment, or another node takes its place.
            state, reason = LOADING, f"{claiming[0][0].member.name} does not answer"
        own = any(node.node == self._mesh.me for node in model.holders)
        says = [node.held[digest].card.gives for node in ready if digest in node.held]
        assignment = self._assignments().get(digest)
        return ServedModel(
            digest=digest,
            id=catalogue.id_of(digest),
            gives=frozenset().union(*([] if own else says)) or (card.gives if card else CHAT),
            certain=own,
            placed=assignment is not None and bool(assignment.nodes),
            demo=digest in self._mesh.view.demos,
            state=state,
            reason=reason,
            nodes=tuple(node.member.name for node in ready),
            context_tokens=_context(model, claiming),
            size_bytes=card.size_bytes if card else 0,
            layout=_layout([one.name for _, one in claiming], assignment),
            shards=_shards(assignment),
        )

    def _stand_in(self, digest: ModelDigest) -> ModelView | None:
        """Return the model that answers in place of another, by the plan; None for none."""
        assignment = self._assignments().get(digest)
        if assignment is None or assignment.instead is None:
            return None
        return self._mesh.view.models.get(assignment.instead)

    def _targets(self, digest: ModelDigest) -> tuple[Target, ...]:
        if stand_in := self._stand_in(digest):
            return self._targets(stand_in.digest)
        model = self._mesh.view.models.get(digest)
        offered = next((one for one in self._fresh().models if one.digest == digest), None)
        if model is None or offered is None:
            return ()
        slots = launch_slots(model.wanted, None, self._slots)
        targets = [
            Target(
                node=node.node,
                node_name=node.member.name,
                part=one.part,
                model_id=offered.id,
                local=node.node == self._mesh.me,
                slots=slots,
            )
            for node, one in self._serving(digest)
            if one.state == READY and self._can_reach(node.node, one.part)
        ]
        return tuple(sorted(targets, key=lambda target: (not target.local, target.node)))

    def _can_reach(self, node: NodeId, part: PartId) -> bool:
        if node == self._mesh.me:
            return self._engines.status(part) is not None
        return self._mesh.health(node) is Health.LIVE


@dataclass(frozen=True, slots=True)
class _Made:
    """The values derived from the state at one count of changes."""

    count: int
    names: frozenset[Named]
    catalogue: Catalogue
    models: tuple[ServedModel, ...]
    targets: dict[ModelDigest, tuple[Target, ...]]


def _layout(ready: Sequence[str], assignment: Assignment | None) -> str:
    """How a model is served by its parts that are ready, or else how the plan has it served."""
    if ready:
        full = [name for name in ready if is_full(name)]
        return "experts" if not full else WHOLE if WHOLE in full else "pipeline"
    if assignment is None or not assignment.nodes:
        return ""
    return str(assignment.layout.decision()[0])


def _shards(assignment: Assignment | None) -> ShardsServed | None:
    if assignment is None or not isinstance(assignment.layout, Experts):
        return None
    layout = assignment.layout
    return ShardsServed(
        experts=layout.quality.places,
        kept=tuple(one.shard.size for one in layout.shards),
        divergence=layout.quality.divergence / MILLION if layout.quality.is_measured else None,
        coverage=layout.quality.coverage / MILLION,
    )


def _context(model: ModelView, ready: Sequence[tuple[NodeView, Served]]) -> int:
    """The context that a request gets wherever it is answered: the least of the replicas'."""
    given = [
        part_context(one.name, model.wanted, node.held[model.digest].card, node.budget_bytes)
        for node, one in ready
        if model.digest in node.held
    ]
    default = launch_context(model.wanted, model.card, 0) if model.card else 0
    return min(given, default=default)

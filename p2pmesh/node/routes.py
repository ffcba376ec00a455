"""Who serves what, as the gateway asks for it: the mesh's view joined with this node's engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from p2pmesh.errors import EngineError
from p2pmesh.gateway.route import LOADING, ReplicaKey, ServedModel, Target
from p2pmesh.gossip.events import Health
from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import Card, ModelDigest
from p2pmesh.models.catalogue import Catalogue
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.serving import Serving
from p2pmesh.placement.inputs import agreed, launch_context, launch_slots
from p2pmesh.placement.plan import explain
from p2pmesh.state.bodies import Served, Wanted
from p2pmesh.state.views import NodeView

CHAT = frozenset({"chat"})  # what a model of which nothing is known is taken to give


class Routes:
    """Implements the gateway's `Backends`.

    Args:
        mesh: What the nodes say that they serve.
        serving: What this node serves.
        slots: Requests at the same time, where no want says otherwise.
    """

    def __init__(self, mesh: Mesh, serving: Serving, *, slots: int) -> None:
        self._mesh = mesh
        self._serving = serving
        self._slots = slots
        self._made: _Made | None = None

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
            return await self._mesh.open_stream(target.node)
        status = self._serving.status(target.digest)
        if status is None:
            raise EngineError(f"{target.model_id} is not running here any more")
        return await trio.open_tcp_stream(status.host, status.port)

    def engine_key(self, digest: ModelDigest) -> str | None:
        """See `Backends.engine_key`."""
        status = self._serving.status(digest)
        return status.api_key if status else None

    async def lost(self, target: Target) -> None:
        """See `Backends.lost`."""
        if not target.local:
            await self._mesh.suspected(target.node).wait()
            return
        while self._state_here(target.digest) in ("ready", "stopping"):
            await self._mesh.changes.wait(self._mesh.changes.count)

    def failed(self, replica: ReplicaKey) -> None:
        """See `Backends.failed`."""
        self._serving.doubt((replica.digest, replica.node))

    async def changed(self) -> None:
        """See `Backends.changed`."""
        await self._mesh.changes.wait(self._mesh.changes.count)

    # --- also for the status --------------------------------------------------------------------

    def replicas(self, digest: ModelDigest) -> list[tuple[NodeView, Served]]:
        """Who says that it runs a model, in whatever state."""
        return [(node, node.serves[digest]) for node in self._alive() if digest in node.serves]

    def state(self, digest: ModelDigest) -> str:
        """The best of its replicas' states; `loading` also while one is about to start."""
        states = {one.state for _, one in self.replicas(digest)}
        for state in ("ready", "loading", "failed"):
            if state in states:
                return state
        planned = any(a.digest == digest and a.nodes for a in self._serving.plan.assignments)
        return "loading" if planned else "not served"

    def reason(self, digest: ModelDigest) -> str:
        """Why a model is placed as it is, or why it failed, in a sentence."""
        if self.state(digest) == "failed":
            return "; ".join(
                f"on {node.member.name}: {one.detail or 'it did not say why'}"
                for node, one in self.replicas(digest)
                if one.state == "failed"
            )
        for one in self._serving.plan.assignments:
            if one.digest == digest:
                names = {n: v.member.name for n, v in self._mesh.view.nodes.items()}
                return explain(one, names)
        return "no node here has its file"

    # --- made once per change, as every request asks --------------------------------------------

    def _fresh(self) -> _Made:
        count = self._mesh.changes.count
        if self._made is None or self._made.count != count:
            self._made = self._make(count)
        return self._made

    def _make(self, count: int) -> _Made:
        view = self._mesh.view
        # Those too that should be served and are not yet: their owner died a moment ago.
        digests = {one.digest for one in self._serving.plan.assignments if one.copies}
        digests.update(want.wanted.digest for want in view.wants)
        for node in self._alive():
            digests.update(digest for digest in node.serves if digest in node.held)
        names = [named for named in view.names if named.digest in digests]
        catalogue = Catalogue(names)
        wishes = agreed(view)
        models = [
            self._model(digest, catalogue, wishes.get(digest))
            for digest in {named.digest for named in names}
        ]
        return _Made(
            count=count,
            catalogue=catalogue,
            models=tuple(sorted(models, key=lambda model: model.id)),
            targets={},
        )

    def _model(
        self, digest: ModelDigest, catalogue: Catalogue, wanted: Wanted | None
    ) -> ServedModel:
        view = self._mesh.view
        card = view.cards.get(digest)
        claiming = [node for node, one in self.replicas(digest) if one.state == "ready"]
        ready = [node for node in claiming if self._can_reach(node.node, digest)]
        state, reason = self.state(digest), self.reason(digest)
        if claiming and not ready:
            # Either it answers again in a moment, or another node takes its place.
            state, reason = LOADING, f"{claiming[0].member.name} does not answer"
        own = digest in view.nodes[self._mesh.me].held if self._mesh.me in view.nodes else False
        says = [node.held[digest].card.gives for node in ready if digest in node.held]
        return ServedModel(
            digest=digest,
            id=catalogue.id_of(digest),
            gives=frozenset().union(*([] if own else says)) or (card.gives if card else CHAT),
            certain=own,
            placed=any(a.digest == digest and a.nodes for a in self._serving.plan.assignments),
            demo=digest in view.demos,
            state=state,
            reason=reason,
            nodes=tuple(node.member.name for node in ready),
            context_tokens=self._context(digest, card, wanted) if card else 0,
            size_bytes=card.size_bytes if card else 0,
        )

    def _context(self, digest: ModelDigest, card: Card, wanted: Wanted | None) -> int:
        """The context that a request gets wherever it is answered: the least of the replicas'."""
        given = [
            launch_context(wanted, node.held[digest].card, node.caps.budget_bytes)
            for node, one in self.replicas(digest)
            if one.state == "ready" and node.caps and digest in node.held
        ]
        return min(given, default=launch_context(wanted, card, 0))

    def _targets(self, digest: ModelDigest) -> tuple[Target, ...]:
        wanted = agreed(self._mesh.view).get(digest)
        targets = [
            Target(
                node=node.node,
                node_name=node.member.name,
                digest=digest,
                model_id=self.catalogue().id_of(digest),
                local=node.node == self._mesh.me,
                slots=launch_slots(wanted, None, self._slots),
            )
            for node, one in self.replicas(digest)
            if one.state == "ready" and self._can_reach(node.node, digest)
        ]
        return tuple(sorted(targets, key=lambda target: (not target.local, target.node)))

    def _alive(self) -> list[NodeView]:
        dead = self._mesh.dead
        return [one for node, one in self._mesh.view.nodes.items() if node not in dead]

    def _state_here(self, digest: ModelDigest) -> str:
        own = self._mesh.view.nodes.get(self._mesh.me)
        served = own.serves.get(digest) if own else None
        return served.state if served else "not served"

    def _can_reach(self, node: NodeId, digest: ModelDigest) -> bool:
        if node == self._mesh.me:
            return self._serving.status(digest) is not None
        return self._mesh.health(node) is Health.LIVE


@dataclass(frozen=True, slots=True)
class _Made:
    """What follows from the state at one count of changes."""

    count: int
    catalogue: Catalogue
    models: tuple[ServedModel, ...]
    targets: dict[ModelDigest, tuple[Target, ...]]

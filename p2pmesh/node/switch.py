"""The gateway's backends of a node that may change its mesh.

The gateway outlives meshes. Between two of them it goes on with what this node serves by itself:
the models keep their names, local engines answer at once, and a request for another node's model
waits, like one whose owner died a moment ago, until the next mesh is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import trio

from p2pmesh.errors import LinkError
from p2pmesh.gateway.backends import Backends
from p2pmesh.gateway.route import ServedModel, Target
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.catalogue import Catalogue
from p2pmesh.models.parts import PartId, ReplicaKey
from p2pmesh.node.engines import EngineManager
from p2pmesh.watchable import Watchable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What was offered in the mesh that was left, with the replicas that run here."""

    models: Sequence[ServedModel]
    catalogue: Catalogue
    here: Mapping[ModelDigest, Sequence[Target]]


_NOTHING = _Kept(models=(), catalogue=Catalogue(frozenset()), here={})


class BackendsSwitch:
    """Implements the gateway's `Backends` over those of the present mesh.

    Args:
        engines: What this node runs.
        changes: Notified of each change of the present mesh, and here of each change of mesh.
    """

    def __init__(self, engines: EngineManager, changes: Watchable) -> None:
        self._engines = engines
        self._changes = changes
        self._present: Backends | None = None  # None between two meshes
        self._kept = _NOTHING
        self._watches: set[trio.CancelScope] = set()

    def enter(self, backends: Backends) -> None:
        """Go on with the backends of a mesh that was heard."""
        self._present = backends
        self._changes.notify()

    def leave(self) -> None:
        """Go on with the engines here alone; called before the mesh is told goodbye."""
        left, self._present = self._present, None
        if left is not None:
            models = left.models()
            here = {
                model.digest: [one for one in left.targets(model.digest) if one.local]
                for model in models
            }
            self._kept = _Kept(models=models, catalogue=left.catalogue(), here=here)
        for watch in self._watches:
            watch.cancel()
        self._changes.notify()

    # --- Backends -------------------------------------------------------------------------------

    def models(self) -> Sequence[ServedModel]:
        """See `Backends.models`."""
        return self._present.models() if self._present else self._kept.models

    def catalogue(self) -> Catalogue:
        """See `Backends.catalogue`."""
        return self._present.catalogue() if self._present else self._kept.catalogue

    def targets(self, digest: ModelDigest) -> Sequence[Target]:
        """See `Backends.targets`."""
        if self._present:
            return self._present.targets(digest)
        here = self._kept.here.get(digest, ())
        return [one for one in here if self._engines.status(one.part) is not None]

    async def connect(self, target: Target) -> trio.abc.Stream:
        """See `Backends.connect`."""
        if target.local:
            return await self._engines.connect(target.part)
        if self._present is None:
            raise LinkError("this node is changing its mesh")
        return await self._present.connect(target)

    def engine_key(self, part: PartId) -> str | None:
        """See `Backends.engine_key`."""
        return self._engines.api_key(part)

    async def lost(self, target: Target) -> None:
        """See `Backends.lost`.

        That a link ends with the mesh that it belonged to says nothing about the node.
        """
        while True:
            while (present := self._present) is None:
                await self._changes.wait(self._changes.count)
            with trio.CancelScope() as watch:
                self._watches.add(watch)
                try:
                    await present.lost(target)
                finally:
                    self._watches.discard(watch)
                return

    def begin(self, part: PartId) -> None:
        """See `Backends.begin`."""
        self._engines.begin(part)

    def end(self, part: PartId) -> None:
        """See `Backends.end`."""
        self._engines.end(part)

    def failed(self, replica: ReplicaKey) -> None:
        """See `Backends.failed`."""
        if self._present:
            self._present.failed(replica)

    async def changed(self) -> None:
        """See `Backends.changed`."""
        await self._changes.wait(self._changes.count)

"""This node's expert shards, whose files are cut here.

A shard is an ordinary llama-server on a file of its own. Before it starts, the ranking that orders
the experts is got from other nodes, and the file is written, unless both are here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog
import trio

from p2pmesh.engine.argv import Launch
from p2pmesh.engine.server import LlamaServer, ServerProgram
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import PartId, Shard
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.store import ModelFile
from p2pmesh.node.engines import EngineManager

Obtain = Callable[[ModelDigest, ModelFile, Shard], Awaitable[None]]

log = structlog.get_logger(__name__)


class Shards:
    """Runs the shards that the plan has on this node.

    Args:
        engines: What runs here.
        library: The rankings and files of shards here.
        obtain: Gets what the shard of a model takes and is not here; raises `MeshError`.
    """

    def __init__(self, engines: EngineManager, library: ShardLibrary, obtain: Obtain) -> None:
        self._engines, self._library, self._obtain = engines, library, obtain

    def start(
        self,
        part: PartId,
        shard: Shard,
        launch: Launch,
        file: ModelFile,
        check: Callable[[], None],
    ) -> None:
        """Start the engine of a shard.

        Args:
            part: Its name.
            shard: What it holds.
            launch: How it serves the model, apart from its file.
            file: The whole model.
            check: Raises MeshError when `file` is not that model any more.
        """
        make = partial(self._make, part, shard, file, check)
        kind = _ShardServer(self._engines.engine, launch, make=make)
        self._engines.start(part, kind, shard=shard)

    def _make(self, part: PartId, shard: Shard, file: ModelFile, check: Callable[[], None]) -> Path:
        """Return the file of a shard; in a thread of trio's, which a cancellation ends.

        Raises:
            MeshError: There is none, and another try soon would end the same way.
        """
        check()  # the file of a shard is kept under the model's name
        trio.from_thread.run(self._obtain, part.digest, file, shard)
        shown = -1

        def progress(done: int, total: int) -> None:
            nonlocal shown
            trio.from_thread.check_cancelled()
            percent = done * 100 // max(total, 1)
            if percent // 10 > shown:  # all of the mesh is told
                shown = percent // 10
                say = f"writing the shard, {shown * 10} % of {total / 1e6:,.0f} MB"
                trio.from_thread.run_sync(self._engines.say, part, say)

        return self._library.make(file, part.digest, shard, progress)


class _ShardServer(LlamaServer):
    """A llama-server on a file that is made before it starts."""

    def __init__(self, engine: ServerProgram, launch: Launch, *, make: Callable[[], Path]) -> None:
        super().__init__(engine, launch)
        self._make = make

    def prepare(self) -> float:
        """Make the file, and return how long a load of its size may take.

        Raises:
            MeshError: There is none.
        """
        self._take(replace(self.launch, model_paths=(self._make(),)))
        return super().prepare()

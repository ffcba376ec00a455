"""This node's expert shards: their rankings come from peers, their files are cut here.

A shard is an ordinary llama-server on a file of its own. Before it starts, the ranking that orders
the experts is fetched from any node that says it has it, and the file is written, unless both are
here. Rankings are named by their digest, so it does not matter who sends one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog
import trio

from p2pmesh.engine.argv import Launch
from p2pmesh.engine.server import LlamaServer, ServerProgram
from p2pmesh.errors import LinkError, MeshError, PeerError
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import RANKING, Needs, Peer
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.importance import RANKING_BYTES_MAX, RankingDigest
from p2pmesh.models.parts import PartId, Shard
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.store import ModelFile
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.mesh import Mesh
from p2pmesh.transport.base import Handlers, Service
from p2pmesh.transport.handshake import receive_frame, send_frame

REQUEST_BYTES_MAX = 64  # a digest in hex
ANSWER_TIMEOUT_S = 30.0  # for at most 2 MiB

_DIGEST = re.compile(r"[0-9a-f]{64}")

log = structlog.get_logger(__name__)


class Shards:
    """Runs the shards that the plan has on this node, and gives its rankings to others.

    Args:
        mesh: The ways to other nodes, and what they say that they have.
        engines: What runs here.
        library: The rankings and files of shards here.
    """

    def __init__(self, mesh: Mesh, engines: EngineManager, library: ShardLibrary) -> None:
        self._mesh, self._engines, self._library = mesh, engines, library

    def handlers(self) -> Handlers:
        """The service for those who lack a ranking."""
        return {RANKING: Service(self._serve, Needs(Role.SERVE))}

    def start(self, part: PartId, shard: Shard, launch: Launch, file: ModelFile) -> None:
        """Start the engine of a shard.

        Args:
            part: Its name.
            shard: What it holds.
            launch: How it serves the model, apart from its file.
            file: The whole model.
        """
        make = partial(self._make, part, shard, file)
        kind = _ShardServer(self._engines.engine, launch, make=make)
        self._engines.start(part, kind, shard=shard)

    def _make(self, part: PartId, shard: Shard, file: ModelFile) -> Path:
        """Return the file of a shard; in a thread of trio's, which a cancellation ends.

        Raises:
            MeshError: There is none, and another try soon would end the same way.
        """
        digest = RankingDigest(shard.ranking)
        if self._library.read(digest) is None:
            trio.from_thread.run(self._fetch, part.digest, digest)
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

    # --- rankings -------------------------------------------------------------------------------

    async def _fetch(self, model: ModelDigest, digest: RankingDigest) -> None:
        """Get a ranking from any node that says something about its shards.

        Raises:
            LinkError: Nobody gives it.
        """
        known = self._mesh.view.models.get(model)
        holders = known.holders if known else ()
        said = "no node has it"
        for view in holders:
            claims = tuple(q for q in view.held[model].qualities if q.ranking == digest)
            if not claims or view.node == self._mesh.me:
                continue
            try:
                data = await self._ask(view.node, digest)
                take = partial(self._library.take, digest, data, claims)
                await trio.to_thread.run_sync(take)
            except MeshError as exc:
                said = f"{view.member.name}: {exc}"
                log.warning("ranking_not_fetched", node=view.member.name, reason=str(exc))
            else:
                log.info("ranking_fetched", node=view.member.name, ranking=digest)
                return
        raise LinkError(f"the ranking of its experts cannot be fetched: {said}")

    async def _ask(self, node: NodeId, digest: RankingDigest) -> bytes:
        stream = await self._mesh.open_stream(node, RANKING)
        async with stream:
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                await send_frame(stream, digest.encode())
                data = await receive_frame(stream, bytes_max=RANKING_BYTES_MAX)
                if not data:
                    raise PeerError("it does not have that ranking any more")
                return data
        raise LinkError("it did not send the ranking in time")

    async def _serve(self, peer: Peer, stream: trio.abc.Stream) -> None:
        """Give a peer the ranking that it asks for, or nothing when that is not here."""
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            asked = await receive_frame(stream, bytes_max=REQUEST_BYTES_MAX)
            digest = RankingDigest(asked.decode("ascii", "replace"))
            is_named = _DIGEST.fullmatch(digest) is not None  # it becomes the name of a file
            data = await trio.to_thread.run_sync(self._library.read, digest) if is_named else None
            log.debug("ranking_asked", node=show_id(peer.node), here=data is not None)
            await send_frame(stream, data or b"")


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

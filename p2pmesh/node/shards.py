"""This node's expert shards: their rankings come from peers, their files are cut here.

A shard is an ordinary llama-server on a file of its own. Before it starts, the ranking that orders
the experts is fetched from any node that says it has it, and the file is written, unless both are
here. Rankings are named by their digest, so it does not matter who sends one.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from p2pmesh.models.parts import PartId, Shard, ShardQuality
from p2pmesh.models.rankings import neurons_bytes
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.store import ModelFile
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.mesh import Mesh
from p2pmesh.transport.base import Handlers, Service, link_errors
from p2pmesh.transport.handshake import receive_frame, send_frame

NEURONS = b"neurons:"  # before the digest of a file with the scores of neurons
REQUEST_BYTES_MAX = 72  # that, and a digest in hex
ANSWER_TIMEOUT_S = 30.0  # for at most 2 MiB, and for each piece of more
PIECE_BYTES = 2**20

_DIGEST = re.compile(rb"[0-9a-f]{64}")
_BROKEN = "the connection broke before all was there"

log = structlog.get_logger(__name__)


class _Source(NamedTuple):
    """A node, and what it says about the shards by one ranking."""

    node: NodeId
    ranking: RankingDigest
    claims: tuple[ShardQuality, ...]


class Shards:
    """Runs the shards that the plan has on this node, and gives its rankings to others.

    Args:
        mesh: The ways to other nodes, and what they say that they have.
        engines: What runs here.
        library: The rankings and files of shards here.
        on_fetched: Called when a ranking has come, which others may lack when its giver has left.
    """

    def __init__(
        self,
        mesh: Mesh,
        engines: EngineManager,
        library: ShardLibrary,
        on_fetched: Callable[[], None],
    ) -> None:
        self._mesh, self._engines, self._library = mesh, engines, library
        self._on_fetched = on_fetched

    def handlers(self) -> Handlers:
        """The service for those who lack a ranking."""
        return {RANKING: Service(self._serve, Needs(Role.SERVE))}

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
        while lacks := self._library.lacks(file, part.digest, shard):
            get = self._ask_ranking if lacks == "ranking" else self._ask_neurons
            trio.from_thread.run(self._fetch, part.digest, shard, lacks, get)
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

    async def _fetch(
        self, model: ModelDigest, shard: Shard, what: str, get: Callable[[_Source], Awaitable[None]]
    ) -> None:
        """Get the ranking of a shard, or its neurons, from any node that says to have measured it.

        Raises:
            LinkError: Nobody gives it.
        """
        known = self._mesh.view.models.get(model)
        said = "no node has it"
        for view in known.holders if known else ():
            claims = tuple(q for q in view.held[model].qualities if q.ranking == shard.ranking)
            if not claims or view.node == self._mesh.me:
                continue
            try:
                await get(_Source(view.node, RankingDigest(shard.ranking), claims))
            except MeshError as exc:
                said = f"{view.member.name}: {exc}"
                log.warning("not_fetched", what=what, node=view.member.name, reason=str(exc))
            else:
                log.info("fetched", what=what, node=view.member.name, ranking=shard.ranking)
                return
        raise LinkError(f"the {what} of its experts cannot be fetched: {said}")

    async def _ask_ranking(self, source: _Source) -> None:
        stream = await self._mesh.open_stream(source.node, RANKING)
        async with stream:
            with _patience():
                await send_frame(stream, source.ranking.encode())
                data = await receive_frame(stream, bytes_max=RANKING_BYTES_MAX)
        if not data:
            raise PeerError("it does not have that ranking any more")
        take = partial(self._library.take, source.ranking, data, source.claims)
        await trio.to_thread.run_sync(take)
        self._on_fetched()

    async def _ask_neurons(self, source: _Source) -> None:
        ranking = self._library.ranking(source.ranking)
        assert ranking is not None, "it was fetched before"
        assert ranking.neurons is not None, "else nothing is lacking"
        stream = await self._mesh.open_stream(source.node, RANKING)
        async with stream:
            with _patience():
                await send_frame(stream, NEURONS + ranking.neurons.digest.encode())
                size = await receive_frame(stream, bytes_max=REQUEST_BYTES_MAX)
            left = neurons_bytes(ranking)
            if size != b"%d" % left:
                raise PeerError("it does not have the neurons of that ranking")
            with self._library.taking_neurons(ranking) as take:
                while left:
                    with _patience():  # for all of a piece: others may have it and be faster
                        piece = await _receive(stream, min(left, PIECE_BYTES))
                    await trio.to_thread.run_sync(take, piece)
                    left -= len(piece)

    async def _serve(self, peer: Peer, stream: trio.abc.Stream) -> None:
        """Give a peer the ranking or the neurons that it asks for, or nothing."""
        with _patience():
            asked = await receive_frame(stream, bytes_max=REQUEST_BYTES_MAX)
        named = asked.removeprefix(NEURONS)
        if not _DIGEST.fullmatch(named):  # it becomes the name of a file
            await send_frame(stream, b"")
        elif named == asked:
            read = partial(self._library.read, RankingDigest(named.decode()))
            data = await trio.to_thread.run_sync(read)
            with _patience():
                await send_frame(stream, data or b"")
        else:
            await self._send_neurons(stream, self._library.neurons(named.decode()))
        log.debug("ranking_asked", node=show_id(peer.node), asked=asked)

    async def _send_neurons(self, stream: trio.abc.Stream, path: Path | None) -> None:
        if path is None:
            await send_frame(stream, b"")
            return
        async with await trio.open_file(path, "rb") as file:
            await send_frame(stream, b"%d" % (await trio.Path(path).stat()).st_size)
            while piece := await file.read(PIECE_BYTES):
                with _patience(), link_errors(_BROKEN):
                    await stream.send_all(piece)


async def _receive(stream: trio.abc.Stream, size: int) -> bytes:
    """Receive exactly so many bytes; raises LinkError when the connection breaks before."""
    received = bytearray()
    while len(received) < size:
        with link_errors(_BROKEN):
            some = await stream.receive_some(size - len(received))
        if not some:
            raise LinkError(_BROKEN)
        received += some
    return bytes(received)


@contextmanager
def _patience() -> Iterator[None]:
    """Give the other side so much time for each step.

    Raises:
        LinkError: It took longer.
    """
    try:
        with trio.fail_after(ANSWER_TIMEOUT_S):
            yield
    except trio.TooSlowError as exc:
        raise LinkError("the other side does not go on") from exc


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

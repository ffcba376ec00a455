"""What it takes to make shards: rankings, and the scores of neurons that they name.

They are named by their digests, so it does not matter who sends one. A node gives what it has to
whoever asks. It gets what other holders of its models claim to have as soon as they claim it, not
when a shard is to start: a claim counts only once several nodes can make such shards
(`models/claims.py`), and who made a ranking may leave.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog
import trio

from p2pmesh.errors import LinkError, MeshError, PeerError
from p2pmesh.identity.credentials import DAY_S, Role
from p2pmesh.identity.hello import RANKING, Needs, Peer
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.claims import agreed
from p2pmesh.models.importance import RANKING_BYTES_MAX, RankingDigest
from p2pmesh.models.parts import Shard, ShardKind, ShardQuality
from p2pmesh.models.rankings import neurons_bytes
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.store import ModelFile
from p2pmesh.node.mesh import Mesh
from p2pmesh.state.views import NodeView
from p2pmesh.transport.base import Handlers, Service, link_errors
from p2pmesh.transport.handshake import receive_frame, send_frame

NEURONS = b"neurons:"  # before the digest of a file with the scores of neurons
REQUEST_BYTES_MAX = 72  # that, and a digest in hex
ANSWER_TIMEOUT_S = 30.0  # for at most 2 MiB, and for each piece of more
PIECE_BYTES = 2**20
PAUSE_S = 1.0  # whatever others claim, and however often they change it
RETRY_S = 60.0  # of a node that failed, and of others while one is slow
FROM_ONE_MAX = 16  # files of one model that one node fills a disk with in a day

_DIGEST = re.compile(rb"[0-9a-f]{64}")
_BROKEN = "the connection broke before all was there"

log = structlog.get_logger(__name__)


class _Offer(NamedTuple):
    """What nodes claim to have for the shards of a model, and what they say of these."""

    model: ModelDigest
    kind: ShardKind
    ranking: RankingDigest
    claims: tuple[ShardQuality, ...]


class Rankings:
    """Gives others what this node has, and gets what they have.

    Args:
        mesh: The ways to other nodes, and what they claim to have.
        library: What is here.
        file_of: Returns the file of a model, if it is here.
        on_fetched: Called when something has come, which the mesh is to be told.
    """

    def __init__(
        self,
        mesh: Mesh,
        library: ShardLibrary,
        file_of: Callable[[ModelDigest], ModelFile | None],
        on_fetched: Callable[[], None],
    ) -> None:
        self._mesh, self._library = mesh, library
        self._file_of, self._on_fetched = file_of, on_fetched
        self._done: set[_Offer] = set()
        self._due: dict[tuple[NodeId, _Offer], float] = {}
        self._asked: dict[NodeId, tuple[_Offer, float]] = {}  # and since when
        self._given: Counter[tuple[NodeId, ModelDigest]] = Counter()
        self._counted_from_s = 0.0

    def handlers(self) -> Handlers:
        """The service for those who lack a ranking."""
        return {RANKING: Service(self._serve, Needs(Role.SERVE))}

    async def run(self) -> None:
        """Get what others claim to have for wanted models that are here, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                seen = self._mesh.changes.count
                self._ask_around(nursery)
                await trio.sleep(PAUSE_S)
                with trio.move_on_after(RETRY_S):
                    await self._mesh.changes.wait(seen)

    def _ask_around(self, nursery: trio.Nursery) -> None:
        """Ask each node for one of the things that it offers, and one node at a time for each."""
        now = trio.current_time()
        if now - self._counted_from_s >= DAY_S:
            self._given.clear()
            self._counted_from_s = now
        offers = [(giver, offer) for offer, givers in self._offers() for giver in givers]
        self._done.intersection_update({offer for _, offer in offers})
        known = {(giver.node, offer) for giver, offer in offers}
        self._due = {one: due for one, due in self._due.items() if one in known}
        for giver, offer in offers:
            if self._may_ask(giver.node, offer, now):
                self._asked[giver.node] = offer, now
                nursery.start_soon(self._try, giver, offer)

    def _may_ask(self, node: NodeId, offer: _Offer, now: float) -> bool:
        if offer in self._done or node in self._asked or self._due.get((node, offer), 0) > now:
            return False
        is_asked_elsewhere = any(
            one == offer and now - since < RETRY_S for one, since in self._asked.values()
        )
        return not is_asked_elsewhere and self._given[node, offer.model] < FROM_ONE_MAX

    def _offers(self) -> Iterator[tuple[_Offer, list[NodeView]]]:
        """Yield what others claim to have for wanted models that are here, and who they are."""
        for digest, model in self._mesh.view.models.items():
            if model.wishes and self._file_of(digest) is not None:
                yield from self._offers_for(digest)

    def _offers_for(self, model: ModelDigest) -> Iterator[tuple[_Offer, list[NodeView]]]:
        known = self._mesh.view.models.get(model)
        others = [one for one in known.holders if one.node != self._mesh.me] if known else []
        said = {one.node: one.held[model].qualities for one in others}
        claims = agreed(said.values())
        for kind, ranking in sorted({(one.kind, one.ranking) for one in claims}):
            about = tuple(sorted(one for one in claims if one[:2] == (kind, ranking)))
            givers = [
                one for one in others if any(q[:2] == (kind, ranking) for q in said[one.node])
            ]
            yield _Offer(model, kind, RankingDigest(ranking), about), givers

    async def _try(self, giver: NodeView, offer: _Offer) -> None:
        file = self._file_of(offer.model)
        assert file is not None, "a file that was here is remembered"
        try:
            await self._get_all(giver, offer, file)
        except MeshError as exc:
            self._due[giver.node, offer] = trio.current_time() + RETRY_S
            log.info("not_fetched", node=giver.member.name, reason=str(exc))
        else:
            self._done.add(offer)
        finally:
            del self._asked[giver.node]
        self._mesh.changes.notify()  # it may be asked for something else

    async def obtain(self, model: ModelDigest, file: ModelFile, shard: Shard) -> None:
        """Get what the shard of a model takes that is not here, from any node that claims it.

        Raises:
            LinkError: Nobody gives it.
            ModelError: The ranking is of another model.
            LocalError: The system does not let the files be read.
        """
        what = await self._lacking(model, file, shard.kind, shard.ranking)
        if not what:
            return
        said = "no node has it"
        for offer, givers in self._offers_for(model):
            if offer[1:3] != (shard.kind, shard.ranking):
                continue
            for giver in givers:
                try:
                    await self._get_all(giver, offer, file)
                except MeshError as exc:
                    said = f"{giver.member.name}: {exc}"
                    log.warning("not_fetched", node=giver.member.name, reason=str(exc))
                else:
                    return
        raise LinkError(f"the {what} of its experts cannot be fetched: {said}")

    async def _lacking(
        self, model: ModelDigest, file: ModelFile, kind: ShardKind, ranking: str
    ) -> str:
        return await trio.to_thread.run_sync(self._library.lacks, file, model, kind, ranking)

    async def _get_all(self, giver: NodeView, offer: _Offer, file: ModelFile) -> None:
        """Get from one node what is not here, and believe what is said of it; raises MeshError."""
        while what := await self._lacking(offer.model, file, offer.kind, offer.ranking):
            await (self._get_neurons if what == "neurons" else self._get_ranking)(giver, offer)
            self._given[giver.node, offer.model] += 1
            log.info("fetched", what=what, node=giver.member.name, ranking=offer.ranking)
        await trio.to_thread.run_sync(self._library.adopt, offer.ranking, offer.claims)
        self._on_fetched()

    # --- the exchange ---------------------------------------------------------------------------

    async def _get_ranking(self, giver: NodeView, offer: _Offer) -> None:
        stream = await self._mesh.open_stream(giver.node, RANKING)
        async with stream:
            with _patience():
                await send_frame(stream, offer.ranking.encode())
                data = await receive_frame(stream, bytes_max=RANKING_BYTES_MAX)
        if not data:
            raise PeerError("it does not have that ranking any more")
        await trio.to_thread.run_sync(self._library.take, offer.ranking, data)

    async def _get_neurons(self, giver: NodeView, offer: _Offer) -> None:
        ranking = self._library.ranking(offer.ranking)
        if ranking is None or ranking.neurons is None:
            raise LinkError("the ranking was deleted meanwhile")
        stream = await self._mesh.open_stream(giver.node, RANKING)
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

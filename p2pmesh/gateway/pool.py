"""Connections to engines and owners, kept for the next request.

Rules: a connection carries one request at a time and is kept only when its answer was read to the
end. An idle one may have been closed at the other end; that shows when it is used, and whoever
uses it then takes a fresh one. A stream to a peer serves every model of that peer. Streams to one
peer are opened a few at a time, because the peer listens to few strangers of one address at once;
who waits for its turn takes a stream that comes back meanwhile. Knows nothing of clients or
retries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import h11
import trio

from p2pmesh.errors import LinkError, MeshError
from p2pmesh.gateway.headers import Header
from p2pmesh.gateway.limits import PEER_STREAMS_MAX, POOL_IDLE_MAX
from p2pmesh.gateway.route import Target
from p2pmesh.gateway.scan import Body
from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import ReplicaKey

# To an engine: under the 5 s after which llama-server closes an idle connection itself.
ENGINE_IDLE_TIMEOUT_S = 4.0
# To a peer: a new stream costs two handshakes; under the 75 s that its gateway keeps one.
PEER_IDLE_TIMEOUT_S = 60.0
PRUNE_INTERVAL_S = 4.0
# Per engine or peer: as many as one of them answers at once in practice, and a burst on top.
IDLE_PER_REPLICA_MAX = 64
# To a process on this machine, or a new stream on a link that exists.
CONNECT_DEADLINE_S = 5.0
# Handshakes with one peer at once. It lets in four unproven connections of one address, which
# several nodes behind one router share, and one of them is for this node's gossip.
OPENING_PER_PEER_MAX = 3
RECEIVE_BYTES = 64 * 1024
# Heads of engines are small; a peer must not fill our memory with one.
HEAD_BYTES_MAX = 64 * 1024
# Bodies up to this size travel in one piece with the head.
JOIN_BYTES_MAX = 64 * 1024

Connect = Callable[[Target], Awaitable[trio.abc.Stream]]

# Whatever a connection may raise: `OSError` holds those of ssl, `MeshError` those of peers.
_BROKEN = (
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    h11.RemoteProtocolError,
    MeshError,
)


class LostError(LinkError):
    """The connection ended while the answer was awaited; the replica may have died of it."""


@dataclass(slots=True, eq=False)
class _Peer:
    """The streams to one peer, and those who wait to open another.

    Attributes:
        streams: Open ones, idle or in use.
        opening: Handshakes in progress.
        failures: How many handshakes failed.
        reason: Why the last one did.
    """

    streams: int = 0
    opening: int = 0
    failures: int = 0
    reason: str = ""
    turn: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    @property
    def is_full(self) -> bool:
        """Whether the next one has to wait for its turn."""
        return (
            self.opening >= OPENING_PER_PEER_MAX or self.streams + self.opening >= PEER_STREAMS_MAX
        )

    @property
    def is_unused(self) -> bool:
        """Whether nothing has to be remembered of it."""
        return not (self.streams or self.opening or len(self.turn))


class Upstream:
    """One connection to a replica. Every failure of it is a `LinkError`.

    Attributes:
        path: What the present request asks for.
        at_work: Whether the replica has said that it works on the present request.
    """

    def __init__(
        self,
        target: Target,
        stream: trio.abc.Stream,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.key = _key(target)
        self._on_close = on_close
        self.idle_until = 0.0
        self.path = ""
        self.at_work = False
        self._idle_s = ENGINE_IDLE_TIMEOUT_S if target.local else PEER_IDLE_TIMEOUT_S
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)

    def request(
        self, method: str, path: str, headers: Sequence[Header], body: Body
    ) -> Iterator[bytes | memoryview]:
        """The pieces of a whole request, to be sent one after the other.

        Args:
            method: Its method.
            path: What it asks for.
            headers: With a content-length that fits `body`.
            body: The bytes of its body; may be empty.
        """
        self.path = path
        self.at_work = False
        head = self._http.send(h11.Request(method=method, target=path, headers=list(headers)))
        assert head is not None, "only ConnectionClosed has no bytes"
        if body:
            self._http.send_with_data_passthrough(
                h11.Data(data=cast("bytes", body))
            )  # it takes the length only
        self._http.send(h11.EndOfMessage())
        if len(body) <= JOIN_BYTES_MAX:
            yield head + bytes(body)
            return
        yield head
        for start in range(0, len(body), JOIN_BYTES_MAX):
            yield memoryview(body)[start : start + JOIN_BYTES_MAX]

    async def send(self, piece: bytes | memoryview) -> None:
        """Send a piece of a request, waiting as long as it takes."""
        try:
            await self._stream.send_all(piece)
        except _BROKEN as exc:
            raise LinkError(f"the request could not be sent: {_words(exc)}") from exc

    def next_event(self) -> h11.Event | type[h11.NEED_DATA]:
        """The next part of the answer that is already here, or NEED_DATA."""
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as exc:
            raise LostError(f"the answer is broken: {_words(exc)}") from exc
        if isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            raise LostError("the connection was closed before the answer ended")
        self.at_work = self.at_work or isinstance(event, h11.InformationalResponse)
        return event  # type: ignore[return-value]  # PAUSED was raised; h11 types it loosely

    async def receive(self) -> None:
        """Wait for more bytes of the answer."""
        try:
            data = await self._stream.receive_some(RECEIVE_BYTES)
            self._http.receive_data(bytes(data))
        except _BROKEN as exc:
            raise LostError(f"the connection broke: {_words(exc)}") from exc

    def recycle(self) -> bool:
        """Make ready for another request; False when the connection cannot have one."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        if self._http.trailing_data != (b"", False):
            return False
        self._http.start_next_cycle()
        self.idle_until = trio.current_time() + self._idle_s
        return True

    @property
    def is_stale(self) -> bool:
        """Whether the engine is seen to have closed an idle connection, or says what nobody asked.

        Only a socket can be looked at without waiting; TLS hides the end of a peer's stream.
        """
        return isinstance(self._stream, trio.SocketStream) and self._stream.socket.is_readable()

    async def aclose(self) -> None:
        """Close at once, which makes the other end stop working on it. Never waits."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
        await trio.aclose_forcefully(self._stream)


def _key(target: Target) -> ReplicaKey | NodeId:
    """Return the key of a connection's far end: one engine, or a peer with all its models."""
    return target.key if target.local else target.node


def _words(exc: BaseException) -> str:
    return str(exc) or type(exc).__name__


class Pool:
    """Idle connections by engine or peer, the last used first."""

    def __init__(self, connect: Connect, idle_max: int = POOL_IDLE_MAX) -> None:
        self._connect = connect
        self._idle_max = idle_max
        # By age: all of them, the one that has been idle longest first.
        self._idle: OrderedDict[int, Upstream] = OrderedDict()
        self._by_key: dict[ReplicaKey | NodeId, list[Upstream]] = {}
        self._peers: dict[NodeId, _Peer] = {}
        self.filled = trio.Event()

    def __len__(self) -> int:
        return len(self._idle)

    async def take(self, target: Target) -> Upstream | None:
        """An idle connection to this replica that has not timed out. Never waits."""
        key = _key(target)
        while idle := self._by_key.get(key):
            upstream = idle[-1]
            if upstream.idle_until <= trio.current_time():
                return None
            self._forget(upstream)
            if not upstream.is_stale:
                return upstream
            await upstream.aclose()
        return None

    async def open(self, target: Target) -> Upstream:
        """A fresh connection, or one that came back while this waited for its turn.

        Raises:
            LinkError: The replica cannot be reached, as it turned out now or while this waited.
        """
        if target.local:
            return Upstream(target, await self._dial(target))
        peer = self._peers.setdefault(target.node, _Peer())
        failures = peer.failures
        try:
            while peer.is_full:
                await peer.turn.park()
                if peer.failures != failures:
                    raise LinkError(peer.reason)
                if (idle := await self.take(target)) is not None:
                    return idle
            return await self._open_stream(target, peer)
        finally:
            if peer.is_unused and self._peers.get(target.node) is peer:
                del self._peers[target.node]

    async def _open_stream(self, target: Target, peer: _Peer) -> Upstream:
        peer.opening += 1
        try:
            stream = await self._dial(target)
        except LinkError as exc:
            peer.failures += 1
            peer.reason = str(exc)
            peer.turn.unpark_all()  # all would find out the same, a few at a time
            raise
        finally:
            peer.opening -= 1
            peer.turn.unpark()
        peer.streams += 1

        def on_close() -> None:
            peer.streams -= 1
            peer.turn.unpark()
            if peer.is_unused and self._peers.get(target.node) is peer:
                del self._peers[target.node]

        return Upstream(target, stream, on_close)

    async def _dial(self, target: Target) -> trio.abc.Stream:
        try:
            with trio.fail_after(CONNECT_DEADLINE_S):
                return await self._connect(target)
        except _BROKEN as exc:
            where = "the local engine" if target.local else target.node_name
            raise LinkError(f"{where} cannot be reached: {_words(exc)}") from exc

    async def release(self, upstream: Upstream) -> None:
        """Keep a connection whose answer was read to the end, or close it. Never waits."""
        idle = self._by_key.setdefault(upstream.key, [])
        if len(idle) >= IDLE_PER_REPLICA_MAX or not upstream.recycle():
            if not idle:
                del self._by_key[upstream.key]
            await upstream.aclose()
            return
        idle.append(upstream)
        self._idle[id(upstream)] = upstream
        if isinstance(upstream.key, bytes) and (peer := self._peers.get(upstream.key)):
            peer.turn.unpark()
        self.filled.set()
        if len(self._idle) > self._idle_max:
            await self._close_oldest()

    async def prune(self) -> None:
        """Close what has been idle too long."""
        now = trio.current_time()
        for upstream in [one for one in self._idle.values() if one.idle_until <= now]:
            if id(upstream) in self._idle:  # closing gives others a turn, and they may take it
                self._forget(upstream)
                await upstream.aclose()

    async def run(self) -> None:
        """Prune as long as there is something to prune; at the end close all."""
        try:
            while True:
                self.filled = trio.Event()
                if not self._idle:
                    await self.filled.wait()
                await trio.sleep(PRUNE_INTERVAL_S)
                await self.prune()
        finally:
            with trio.CancelScope(shield=True):  # closing forcefully does not wait
                while self._idle:
                    await self._close_oldest()

    async def close_peers(self) -> None:
        """Close the idle streams to peers: this node leaves the mesh that they belong to."""
        for upstream in [one for one in self._idle.values() if isinstance(one.key, bytes)]:
            if id(upstream) in self._idle:  # closing gives others a turn, and they may take it
                self._forget(upstream)
                await upstream.aclose()

    async def _close_oldest(self) -> None:
        upstream = next(iter(self._idle.values()))
        self._forget(upstream)
        await upstream.aclose()

    def _forget(self, upstream: Upstream) -> None:
        del self._idle[id(upstream)]
        idle = self._by_key[upstream.key]
        idle.remove(upstream)
        if not idle:
            del self._by_key[upstream.key]

"""Gossip channels: websocket messages over an authenticated byte stream.

trio-websocket brings framing, size limits and closing; its handshake carries no meaning here, as
both sides are known already. What a link costs is bounded below it: messages are paced above, but
the library answers pings by itself, and reads a byte at a time if they come so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Iterator

import h11
import trio
import trio_websocket
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection

from p2pmesh.config import Address
from p2pmesh.errors import LinkError, MeshError, PeerError
from p2pmesh.identity.hello import Peer
from p2pmesh.transport.base import DIAL_TIMEOUT_S, SEND_TIMEOUT_S, link_errors
from p2pmesh.transport.frames import Frames
from p2pmesh.transport.pace import Pace
from p2pmesh.wire.messages import MESSAGE_BYTES_MAX
from p2pmesh.wire.text import plain_text

PATH = "/gossip"
CLOSE_TIMEOUT_S = 1.0  # a polite close is worth this much waiting
# Reads that go on with a message, however little comes: 5 % of a core, or 2 MiB each second, after
# 4 MiB: a snapshot of a mesh of a thousand has less. Messages are paced by their number, above.
READS_PER_S, READS_BURST = 150.0, 256
READ_BYTES_MAX = 16 * 1024  # TLS brings no more in one piece
# Close codes of RFC 6455 for frames out of order, data of a wrong kind, no UTF-8, too long.
BREACHES = frozenset([1002, 1003, 1007, 1009])


class PacedStream(trio.abc.Stream):
    """The stream under a websocket: read at a bounded rate, and not beyond a breach.

    Attributes:
        breach: How the peer broke the protocol, once it did; the stream is broken then.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.breach: PeerError | None = None
        self._stream = stream
        self._frames = Frames()
        self._reads = Pace(READS_PER_S, READS_BURST)
        self._wait_until = -math.inf

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Some bytes, when it is time for them; see `trio.abc.ReceiveStream`."""
        if self._wait_until > trio.current_time():
            await trio.sleep_until(self._wait_until)
        data = await self._stream.receive_some(max_bytes)
        now = trio.current_time()
        try:
            if not self._frames.read(data, now):
                self._wait_until = self._reads.take(now)
        except PeerError as exc:
            # The library takes this well; an error of ours would end its task and the link unheard.
            self.breach = exc
            raise trio.BrokenResourceError(str(exc)) from exc
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`."""
        await self._stream.aclose()


class WebSocketChannel:
    """A `Channel` over one websocket."""

    def __init__(
        self,
        websocket: WebSocketConnection,
        stream: PacedStream,
        *,
        peer: Peer,
        remote: Address,
        outgoing: bool,
    ) -> None:
        self._websocket, self._stream = websocket, stream
        self.peer = peer
        self.remote = remote
        self.outgoing = outgoing

    async def send(self, message: bytes) -> None:
        """Send one message; see `Channel.send`."""
        with _channel_errors(self._stream), trio.fail_after(SEND_TIMEOUT_S):
            await self._websocket.send_message(message)

    async def receive(self) -> bytes:
        """The next message; see `Channel.receive`."""
        with _channel_errors(self._stream):
            message = await self._websocket.get_message()
        if not isinstance(message, bytes):
            raise PeerError("a text message on a gossip link")
        return message


@contextlib.asynccontextmanager
async def open_channel(
    stream: trio.abc.Stream, *, peer: Peer, remote: Address, outgoing: bool
) -> AsyncIterator[WebSocketChannel]:
    """Run the websocket protocol on `stream` for the length of the block.

    Raises:
        LinkError: The stream broke, or the handshake took too long. In an exception group, as
            this holds a nursery: one per link, so that whatever a peer's bytes provoke in the
            library ends this link and nothing else.
        PeerError: The other side does not speak the protocol; in a group too.
    """
    try:
        async with PacedStream(stream) as paced, trio.open_nursery() as nursery:
            with _channel_errors(paced), trio.fail_after(DIAL_TIMEOUT_S):
                websocket = await _handshake(nursery, paced, remote, outgoing=outgoing)
            yield WebSocketChannel(websocket, paced, peer=peer, remote=remote, outgoing=outgoing)
            with trio.move_on_after(CLOSE_TIMEOUT_S):
                await websocket.aclose(1000, "")
            nursery.cancel_scope.cancel()
    except* (UnicodeError, h11.ProtocolError, HandshakeError) as group:
        # The first two escape from the library's own task.
        raise PeerError("the other side broke the websocket protocol") from group


async def _handshake(
    nursery: trio.Nursery, stream: trio.abc.Stream, remote: Address, *, outgoing: bool
) -> WebSocketConnection:
    if outgoing:
        return await trio_websocket.wrap_client_stream(
            nursery,
            stream,  # type: ignore[arg-type]  # any trio stream does; it says sockets only
            remote.host,
            PATH,
            max_message_size=MESSAGE_BYTES_MAX,
            receive_buffer_size=READ_BYTES_MAX,
        )
    request = await trio_websocket.wrap_server_stream(
        nursery,
        stream,
        max_message_size=MESSAGE_BYTES_MAX,
        receive_buffer_size=READ_BYTES_MAX,
    )
    return await request.accept()


@contextlib.contextmanager
def _channel_errors(stream: PacedStream) -> Iterator[None]:
    try:
        with link_errors("the link broke"):
            yield
    except LinkError as exc:
        if stream.breach is not None:
            raise stream.breach from exc
        raise
    except (ConnectionClosed, HandshakeError) as exc:
        raise stream.breach or _as_mesh_error(exc) from exc


def _as_mesh_error(exc: ConnectionClosed | HandshakeError) -> MeshError:
    if isinstance(exc, ConnectionClosed) and (not exc.reason or exc.reason.code not in BREACHES):
        said = exc.reason and (plain_text(exc.reason.reason or "") or exc.reason.name)
        return LinkError(f"the link was closed: {said or 'without a word'}")
    return PeerError("the other side broke the websocket protocol")

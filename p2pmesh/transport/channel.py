"""Gossip channels: websocket messages over an authenticated byte stream.

trio-websocket brings framing, size limits and closing; its handshake carries no meaning here, as
both sides are known already.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import h11
import trio
import trio_websocket
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection

from p2pmesh.config import Address
from p2pmesh.errors import LinkError, PeerError
from p2pmesh.identity.hello import Peer
from p2pmesh.transport.base import DIAL_TIMEOUT_S, SEND_TIMEOUT_S, link_errors
from p2pmesh.wire.messages import MESSAGE_BYTES_MAX
from p2pmesh.wire.text import plain_text

PATH = "/gossip"
CLOSE_TIMEOUT_S = 1.0  # a polite close is worth this much waiting
# Close codes of RFC 6455 for frames out of order, data of a wrong kind, no UTF-8, too long.
BREACHES = frozenset([1002, 1003, 1007, 1009])


class WebSocketChannel:
    """A `Channel` over one websocket."""

    def __init__(
        self, websocket: WebSocketConnection, *, peer: Peer, remote: Address, outgoing: bool
    ) -> None:
        self._websocket = websocket
        self.peer = peer
        self.remote = remote
        self.outgoing = outgoing

    async def send(self, message: bytes) -> None:
        """Send one message; see `Channel.send`."""
        with _channel_errors(), trio.fail_after(SEND_TIMEOUT_S):
            await self._websocket.send_message(message)

    async def receive(self) -> bytes:
        """The next message; see `Channel.receive`."""
        with _channel_errors():
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
        async with stream, trio.open_nursery() as nursery:
            with _channel_errors(), trio.fail_after(DIAL_TIMEOUT_S):
                websocket = await _handshake(nursery, stream, remote, outgoing=outgoing)
            yield WebSocketChannel(websocket, peer=peer, remote=remote, outgoing=outgoing)
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
        )
    request = await trio_websocket.wrap_server_stream(
        nursery, stream, max_message_size=MESSAGE_BYTES_MAX
    )
    return await request.accept()


@contextlib.contextmanager
def _channel_errors() -> Iterator[None]:
    try:
        with link_errors("the link broke"):
            yield
    except ConnectionClosed as exc:
        if exc.reason and exc.reason.code in BREACHES:
            raise PeerError("the other side broke the websocket protocol") from exc
        said = exc.reason and (plain_text(exc.reason.reason or "") or exc.reason.name)
        raise LinkError(f"the link was closed: {said or 'without a word'}") from exc
    except HandshakeError as exc:
        raise PeerError("the other side broke the websocket protocol") from exc

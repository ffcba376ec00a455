"""Serves the console: hypercorn's connections behind an accept loop of our own.

hypercorn 0.18 dies as a whole of four malformed websocket handshakes, waits without end for a
client that stops reading, and leaves HTTP/2 clients hanging (tests/contract/test_hypercorn.py).
So each of its connections runs here inside an error boundary, on a stream whose writes have a
deadline, and only plain HTTP/1.1 reaches the application. Knows nothing of routes or the node.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from typing import cast

import h11
import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import (
    ASGIFramework,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    ConnectionState,
    LifespanState,
    Scope,
)
from quart_trio import QuartTrio

CONNECTIONS_MAX = 128  # a page takes one to six; twice the feed's subscribers
SEND_TIMEOUT_S = 10.0  # for one write: longer is no browser on a poor network but a stuck one
LINGER_S = 0.5  # for a client to read our last answer and close its half
GRACE_S = 1.0  # for requests in progress when the node stops

_log = structlog.get_logger(__name__)


class GuardedStream:
    """A socket stream for hypercorn on which nothing waits for ever; its maker closes it.

    Closing is half-closing here, and then reading on for `LINGER_S`: bytes of the client that
    nobody read would make the system reset the connection and lose our last answer.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.socket = stream.socket  # hypercorn asks it for both addresses
        self._stream = stream
        self._closing_at: float | None = None
        self._reading = trio.CancelScope()

    async def send_all(self, data: bytes) -> None:
        """Send everything within `SEND_TIMEOUT_S`.

        Raises:
            trio.BrokenResourceError: The other side does not read; the connection is gone.
        """
        with trio.move_on_after(SEND_TIMEOUT_S):
            await self._stream.send_all(data)
            return
        self.socket.close()
        raise trio.BrokenResourceError("the client does not read")

    async def receive_some(self, max_bytes: int) -> bytes:
        """Receive bytes; b"" at the end. Until closing, the deadline is hypercorn's idle timer."""
        with trio.CancelScope() as self._reading:
            if self._closing_at is not None:
                self._reading.deadline = self._closing_at
            data = await self._stream.receive_some(max_bytes)
            while data and self._closing_at is not None:
                data = await self._stream.receive_some(max_bytes)
            return bytes(data)
        return b""

    async def send_eof(self) -> None:
        """As `aclose`: the other half is closed in time whatever the client does."""
        await self.aclose()

    async def aclose(self) -> None:
        """Half-close without a checkpoint: hypercorn calls this in tasks already cancelled."""
        if self._closing_at is None:
            self._closing_at = trio.current_time() + LINGER_S
            self._reading.deadline = self._closing_at
            with contextlib.suppress(OSError):  # the client was faster
                self.socket.shutdown(trio.socket.SHUT_WR)


class _Connection(TCPServer):
    """hypercorn's connection, whose idle timer does not outlive its client."""

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()


class _Server:
    """The connections of one console."""

    def __init__(self, app: QuartTrio, connections_max: int) -> None:
        self._connections_max = connections_max
        self._config = _config()
        self._context = WorkerContext(None)
        self._app = ASGIWrapper(_plain_http_only(app))
        self._streams: set[trio.SocketStream] = set()
        self._emptied = trio.Event()

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve one connection; whatever goes wrong in it ends here."""
        if len(self._streams) >= self._connections_max:
            _log.warning("connection_refused", reason="too many", limit=self._connections_max)
            await trio.aclose_forcefully(stream)
            return
        self._streams.add(stream)
        try:
            await _Connection(
                self._app,
                self._config,
                self._context,
                ConnectionState(LifespanState()),
                cast("trio.SSLStream[trio.SocketStream]", GuardedStream(stream)),
            ).run()
        except* Exception as group:  # noqa: BLE001 - the boundary of one client
            _log.warning("connection_failed", error=repr(_first(group)))
        finally:
            stream.socket.close()
            self._streams.discard(stream)
            if not self._streams:
                self._emptied.set()

    async def finish(self) -> None:
        """Let answers in progress end, for `GRACE_S`; then close the sockets under the rest.

        Closing first is what ends a write: hypercorn shields its own from cancellation.
        """
        await self._context.terminated.set()
        with trio.move_on_after(GRACE_S):
            while self._streams:
                self._emptied = trio.Event()
                await self._emptied.wait()
        for stream in self._streams:
            stream.socket.close()


async def serve(
    app: QuartTrio,
    listeners: Sequence[trio.SocketListener],
    *,
    connections_max: int = CONNECTIONS_MAX,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` until cancelled, then stop within little more than `GRACE_S`.

    Args:
        app: A fresh application; quart's can be started once.
        listeners: Bound sockets; closed at the end.
        connections_max: More at once are refused.
        task_status: Started when connections are accepted.
    """
    stopping = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_serve_until, _Server(app, connections_max), app, listeners, stopping)
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            stopping.set()


async def _serve_until(
    server: _Server,
    app: QuartTrio,
    listeners: Sequence[trio.SocketListener],
    stopping: trio.Event,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    # Shielded so that answers in progress are finished; `finish` is what bounds it.
    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery, trio.open_nursery() as connections:
            app.nursery = await nursery.start(_background)
            await app.startup()
            async with trio.open_nursery() as accepting:
                accept = partial(trio.serve_listeners, handler_nursery=connections)
                await accepting.start(accept, server.handle, list(listeners))
                task_status.started()
                await stopping.wait()
                accepting.cancel_scope.cancel()
            await app.shutdown()
            app.nursery.cancel_scope.cancel()
            await server.finish()
            connections.cancel_scope.cancel()


async def _background(*, task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """Hold the nursery that the application starts its own tasks in."""
    async with trio.open_nursery() as nursery:
        task_status.started(nursery)
        await trio.sleep_forever()


def _config() -> Config:
    config = Config()
    config.alpn_protocols = ["http/1.1"]
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    return config


def _plain_http_only(app: ASGIFramework) -> ASGIFramework:
    """Keep websockets away, and other versions than HTTP/1 (2 without TLS, say): it has neither."""

    async def plain(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] == "websocket":
            # Bytes that came right behind the handshake have been answered with an error already.
            with contextlib.suppress(h11.LocalProtocolError):
                await send({"type": "websocket.close", "code": 1000, "reason": None})
        elif scope["type"] == "http" and scope["http_version"] not in ("1.0", "1.1"):
            await send(
                {
                    "type": "http.response.start",
                    "status": HTTPStatus.HTTP_VERSION_NOT_SUPPORTED,
                    "headers": [(b"content-length", b"0")],
                }
            )
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await app(scope, receive, _ending_whole(send))

    return plain


def _ending_whole(send: ASGISendCallable) -> ASGISendCallable:
    """Finish what the last message of an answer sets off, although quart cancels its sender.

    Otherwise hypercorn neither closes the connection when asked to nor starts its idle timer.
    """

    async def whole(message: ASGISendEvent) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        with trio.move_on_after(SEND_TIMEOUT_S if last else math.inf, shield=last):
            await send(message)

    return whole


def _first(group: BaseException) -> BaseException:
    """The innermost first failure: what a log line can hold of a nursery's group."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group

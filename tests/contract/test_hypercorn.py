"""hypercorn's known failures, against our guard and, to notice their end, without it.

When a test of `..._without_the_guard` fails, hypercorn was cured: p2pmesh/console/serve.py may
become simpler.
"""

from __future__ import annotations

from functools import partial

import pytest
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from quart import Response, websocket
from quart_trio import QuartTrio

from p2pmesh.console.api import create_app
from tests.console.fake import FakeNode
from tests.console.loopback import alive, connect, get, read_all, start

STOP_S = 2.0
HANDSHAKE = (
    b"GET /api/status HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
PLAIN = b"Connection: Upgrade\r\n"
MALFORMED = {
    "a byte after the handshake": HANDSHAKE + PLAIN + b"\r\n" + b"x",
    "a protocol that is not ASCII": (
        HANDSHAKE + PLAIN + b"Sec-WebSocket-Protocol: \xff\xfe\r\n\r\n"
    ),
    "an extension that is not ASCII": (
        HANDSHAKE + PLAIN + b"Sec-WebSocket-Extensions: \xff\xfe\r\n\r\n"
    ),
    "a connection token that is not ASCII": HANDSHAKE + b"Connection: Upgrade, \xff\r\n\r\n",
}
malformed = pytest.mark.parametrize("handshake", MALFORMED.values(), ids=MALFORMED.keys())


@malformed
async def test_a_malformed_handshake_ends_its_own_connection_only(
    nursery: trio.Nursery, handshake: bytes
) -> None:
    port = await start(create_app(FakeNode()), nursery)
    async with connect(port) as stream:
        await stream.send_all(handshake)
        assert b" 101 " not in await read_all(stream)
    assert await alive(port)
    nursery.cancel_scope.cancel()


@malformed
async def test_a_malformed_handshake_kills_hypercorn_without_the_guard(handshake: bytes) -> None:
    app = QuartTrio(__name__)

    async def echo() -> None:
        while True:
            await websocket.send(await websocket.receive())

    app.add_websocket("/api/status", view_func=echo)
    config = Config()
    config.errorlog = None
    unguarded = partial(
        TCPServer,
        ASGIWrapper(app),
        config,
        WorkerContext(None),
        ConnectionState(LifespanState()),
    )
    with pytest.raises(BaseExceptionGroup), trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            await nursery.start(trio.serve_listeners, unguarded, [listener])
            async with connect(listener.socket.getsockname()[1]) as stream:
                await stream.send_all(handshake)
                await trio.sleep_forever()


def _flooding_app() -> QuartTrio:
    app = create_app(FakeNode())

    class Flood:
        def __aiter__(self) -> Flood:
            return self

        async def __anext__(self) -> bytes:
            await trio.lowlevel.checkpoint()
            return b"x" * 2**20

    async def flood() -> Response:
        response = Response(Flood())
        response.timeout = None
        return response

    app.add_url_rule("/flood", "flood", flood)
    return app


async def test_a_client_that_stops_reading_does_not_hold_up_the_stop() -> None:
    async with trio.open_nursery() as nursery:
        port = await start(_flooding_app(), nursery)
        stuck = await trio.open_tcp_stream("127.0.0.1", port)
        await stuck.send_all(get("/flood"))
        await stuck.receive_some(1)
        assert await alive(port)
        await trio.sleep(0.2)  # until the buffers between both ends are full
        before = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - before < STOP_S
    await stuck.aclose()


async def test_an_idle_connection_is_closed_after_an_answer(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Config, "keep_alive_timeout", 0.2)
    port = await start(create_app(FakeNode()), nursery)
    async with connect(port) as idle:
        await idle.send_all(get("/api/status"))
        assert b"amber-otter" in await read_all(idle)
    nursery.cancel_scope.cancel()


async def test_a_client_that_stops_reading_is_dropped_in_time(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pmesh.console.serve.SEND_TIMEOUT_S", 0.2)
    port = await start(_flooding_app(), nursery)
    async with connect(port) as stuck:
        await stuck.send_all(get("/flood"))
        await trio.sleep(0.6)
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
            while await stuck.receive_some():
                pass
            raise trio.BrokenResourceError("ended without its last chunk")
    assert await alive(port)
    nursery.cancel_scope.cancel()

from __future__ import annotations

import json

import pytest
import trio
import trio.testing

from p2pmesh.console.api import BODY_BYTES_MAX, create_app
from p2pmesh.console.serve import GRACE_S
from tests.console.fake import TOKEN, FakeNode, three_nodes
from tests.console.loopback import (
    ANSWER_S,
    alive,
    connect,
    get,
    read_all,
    read_until,
    request,
    start,
)

STOP_S = 2.0  # what stopping a console may take


async def test_two_requests_on_one_connection(nursery: trio.Nursery) -> None:
    port = await start(create_app(FakeNode()), nursery)
    async with connect(port) as stream:
        for _ in range(2):
            await stream.send_all(get("/api/models"))
            answer = await read_until(stream, b"}]}")
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert b"server:" not in head.lower()
            assert json.loads(body) == {"models": three_nodes()["models"]}
    nursery.cancel_scope.cancel()


async def test_the_stream_starts_with_a_snapshot_and_follows_changes(nursery: trio.Nursery) -> None:
    node = FakeNode()
    port = await start(create_app(node), nursery)
    async with connect(port) as stream:
        await stream.send_all(get("/api/events"))
        first = await read_until(stream, b"\n\n")
        assert b"content-type: text/event-stream" in first.lower()
        assert b"amber-otter" in first or b"amber-otter" in await read_until(stream, b"amber-otter")
        status = three_nodes()
        status["mesh"]["name"] = "brave-heron"
        node.set_status(status)
        assert b"brave-heron" in await read_until(stream, b"brave-heron")
    nursery.cancel_scope.cancel()


async def test_a_reader_that_leaves_gives_its_place_back(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pmesh.console.feed.SUBSCRIBERS_MAX", 1)
    port = await start(create_app(FakeNode()), nursery)
    async with connect(port) as stream:
        await stream.send_all(get("/api/events"))
        await read_until(stream, b"event: snapshot")
        async with connect(port) as second:
            await second.send_all(get("/api/events", "Connection: close"))
            assert (await read_all(second)).startswith(b"HTTP/1.1 503")
    with trio.fail_after(ANSWER_S):
        while True:
            async with connect(port) as third:
                await third.send_all(get("/api/events"))
                if (await read_until(third, b"\r\n")).startswith(b"HTTP/1.1 200"):
                    break
            await trio.testing.wait_all_tasks_blocked()
    nursery.cancel_scope.cancel()


async def test_stopping_ends_open_streams_whole_and_soon() -> None:
    async with trio.open_nursery() as nursery:
        port = await start(create_app(FakeNode()), nursery)
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(get("/api/events"))
        await read_until(stream, b"event: snapshot")
        before = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - before < STOP_S
    assert (await read_all(stream)).endswith(b"0\r\n\r\n")  # the chunked body has its end
    await stream.aclose()


async def test_stopping_while_a_request_is_answered_lets_it_finish() -> None:
    node = FakeNode()
    async with trio.open_nursery() as nursery:
        port = await start(create_app(node), nursery)
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(request("POST", "/api/stop", f"Authorization: Bearer {TOKEN}"))
        await node.stopped.wait()
        before = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - before < STOP_S
    answer = await read_all(stream)
    assert answer.startswith(b"HTTP/1.1 202")
    assert answer.endswith(b'{"stopping":true}')
    await stream.aclose()


async def test_idle_and_half_sent_requests_do_not_hold_up_the_stop() -> None:
    async with trio.open_nursery() as nursery:
        port = await start(create_app(FakeNode()), nursery)
        half = await trio.open_tcp_stream("127.0.0.1", port)
        await half.send_all(b"GET / HTTP/1.1\r\nHost: loc")
        idle = await trio.open_tcp_stream("127.0.0.1", port)
        await idle.send_all(get("/api/status"))
        await read_until(idle, b"amber-otter")
        assert await alive(port)
        before = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - before < STOP_S
    await half.aclose()
    await idle.aclose()


@pytest.mark.parametrize(
    ("length", "status"),
    [(f"Content-Length: {2 * BODY_BYTES_MAX}", 413), ("Transfer-Encoding: chunked", 411)],
)
async def test_a_long_or_endless_body_is_refused_and_the_connection_ends(
    nursery: trio.Nursery, length: str, status: int
) -> None:
    port = await start(create_app(FakeNode()), nursery)
    body = b"x" * 2 * BODY_BYTES_MAX
    chunk = f"{len(body):x}\r\n".encode() if status == 411 else b""
    head = request("POST", "/api/stop", f"Authorization: Bearer {TOKEN}", length)
    async with connect(port) as stream:
        await stream.send_all(head + chunk + body)
        answer = await read_until(stream, b"}}")
        assert answer.startswith(f"HTTP/1.1 {status}".encode())
        assert b"connection: close" in answer.lower()
        await read_all(stream)
    assert await alive(port)
    nursery.cancel_scope.cancel()


async def test_connections_are_bounded(nursery: trio.Nursery) -> None:
    port = await start(create_app(FakeNode()), nursery, connections_max=2)
    async with connect(port) as first, connect(port) as second:
        for stream in (first, second):
            await stream.send_all(get("/api/status"))
            await read_until(stream, b"amber-otter")
        async with connect(port) as third:
            assert await read_all(third) == b""
    with trio.fail_after(ANSWER_S):
        while not await _answers(port):
            await trio.testing.wait_all_tasks_blocked()
    nursery.cancel_scope.cancel()


async def _answers(port: int) -> bool:
    try:
        return await alive(port)
    except trio.BrokenResourceError:
        return False


@pytest.mark.parametrize(
    "junk",
    [
        b"\x00\xff" * 500,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"POST /api/stop HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 9,
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    ],
)
async def test_junk_ends_its_own_connection_only(nursery: trio.Nursery, junk: bytes) -> None:
    port = await start(create_app(FakeNode()), nursery)
    async with connect(port) as stream:
        await stream.send_all(junk)
        await stream.send_eof()
        answer = await read_all(stream)
        assert not answer.startswith(b"HTTP/1.1 200")
    assert await alive(port)
    nursery.cancel_scope.cancel()


async def test_an_old_client_that_sends_no_host_is_served(nursery: trio.Nursery) -> None:
    port = await start(create_app(FakeNode()), nursery)
    async with connect(port) as stream:
        await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
        assert (await read_all(stream)).startswith(b"HTTP/1.1 200")
    nursery.cancel_scope.cancel()


async def test_http_2_without_tls_is_refused(nursery: trio.Nursery) -> None:
    port = await start(create_app(FakeNode()), nursery)
    async with connect(port) as stream:
        await stream.send_all(
            get("/api/status", "Connection: Upgrade", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
        )
        with trio.move_on_after(GRACE_S):
            answer = await read_until(stream, b"amber-otter")
            assert b"amber-otter" not in answer
    assert await alive(port)
    nursery.cancel_scope.cancel()


async def test_websockets_are_refused(nursery: trio.Nursery) -> None:
    port = await start(create_app(FakeNode()), nursery)
    async with connect(port) as stream:
        await stream.send_all(
            get(
                "/api/events",
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            )
        )
        assert (await read_until(stream, b"\r\n\r\n")).startswith(b"HTTP/1.1 403")
    assert await alive(port)
    nursery.cancel_scope.cancel()

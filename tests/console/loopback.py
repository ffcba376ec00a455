"""A console on a real loopback socket, and a client that speaks plain bytes to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio
from quart_trio import QuartTrio

from p2pmesh.console.serve import serve

ANSWER_S = 5.0  # no answer on loopback takes longer, however busy the machine


async def start(app: QuartTrio, nursery: trio.Nursery, **options: Any) -> int:
    """Serve `app` in `nursery`; its port."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port: int = listener.socket.getsockname()[1]
    await nursery.start(partial(serve, **options), app, [listener])
    return port


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[trio.SocketStream]:
    """A connection to the console, closed at the end."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        yield stream


def get(path: str, *lines: str) -> bytes:
    """A GET request as bytes."""
    return request("GET", path, *lines)


def request(method: str, path: str, *lines: str, body: bytes = b"") -> bytes:
    """A request as bytes, with the host that a local browser sends."""
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", *lines]
    if body:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode() + body


async def read_until(stream: trio.SocketStream, mark: bytes) -> bytes:
    """What arrives up to and with `mark`, or up to the end."""
    received = b""
    with trio.fail_after(ANSWER_S):
        while mark not in received:
            part = await stream.receive_some()
            if not part:
                break
            received += part
    return received


async def read_all(stream: trio.SocketStream) -> bytes:
    """What arrives until the server closes."""
    received = b""
    with trio.fail_after(ANSWER_S):
        while part := await stream.receive_some():
            received += part
    return received


async def alive(port: int) -> bool:
    """Whether the console answers a plain request."""
    async with connect(port) as stream:
        await stream.send_all(get("/api/status", "Connection: close"))
        return (await read_all(stream)).startswith(b"HTTP/1.1 200")

"""A load generator that costs little: whole requests as bytes, answers read only as far as needed.

It keeps connections alive as clients do, opens a new one when the other end closes, and times from
the first byte sent to the last byte received. Opening is not timed: every arm of a comparison
reopens at its own rate, and what is compared is answering.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

CHAT = "/v1/chat/completions"
RECEIVE_BYTES = 64 * 1024
# Of one request: an engine under 64 connections on a small machine answers within this.
DEADLINE_S = 60.0

_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: close", re.IGNORECASE)
_SERVED_BY = re.compile(rb"\r\nx-p2pmesh-served-by: ([^\r]*)", re.IGNORECASE)
_LAST_CHUNK = b"\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The endpoint that requests go to.

    Attributes:
        key: What to show there; empty for nothing.
    """

    host: str
    port: int
    key: str = field(default="", repr=False)

    def request(self, path: str, body: object = None) -> bytes:
        """A whole request; a GET when there is no body."""
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {self.host}"]
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        if content:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        return "\r\n".join([*lines, "", ""]).encode() + content


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The durations of one run of requests.

    Attributes:
        latencies_s: Of each request, sorted.
        elapsed_s: Of all together.
        served_by: Every node that said it answered.
    """

    latencies_s: tuple[float, ...]
    elapsed_s: float
    served_by: frozenset[str]

    @property
    def requests_per_s(self) -> float:
        """The rate of the run."""
        return len(self.latencies_s) / self.elapsed_s

    def percentile_ms(self, percent: float) -> float:
        """The latency that so many percent of the requests did not pass."""
        last = len(self.latencies_s) - 1
        return self.latencies_s[round(last * percent / 100)] * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """The durations of one run of streams.

    Attributes:
        events: Of all streams together.
        elapsed_s: Of all together.
        first_s: From request to first event, the median.
    """

    events: int
    elapsed_s: float
    first_s: float


class Connection:
    """A kept-alive connection to one place."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stream: trio.SocketStream | None = None

    async def open(self) -> trio.SocketStream:
        """The connection, made if there is none."""
        if self._stream is None:
            self._stream = await trio.open_tcp_stream(self._place.host, self._place.port)
        return self._stream

    async def aclose(self) -> None:
        """Close it if there is one."""
        if self._stream is not None:
            await self._stream.aclose()
            self._stream = None

    async def exchange(self, request: bytes) -> tuple[bytes, bytes, float]:
        """Head and body of the answer, and how long it took in seconds.

        Raises:
            RuntimeError: The answer is not a 200 with a length.
        """
        stream = await self.open()
        with trio.fail_after(DEADLINE_S):
            began = time.perf_counter()
            await stream.send_all(request)
            head, body = await _head(stream)
            length = _LENGTH.search(head)
            if not head.startswith(b"HTTP/1.1 200") or length is None:
                raise RuntimeError(f"not the answer hoped for: {(head + body)[:500]!r}")
            parts, missing = [body], int(length[1]) - len(body)
            while missing > 0:
                parts.append(await _more(stream))
                missing -= len(parts[-1])
            took_s = time.perf_counter() - began
        if _CLOSE.search(head):
            await self.aclose()
        return head, b"".join(parts), took_s

    async def stream(self, request: bytes) -> tuple[int, float]:
        """Count the events of a streamed answer; also the seconds to the first."""
        stream = await self.open()
        with trio.fail_after(DEADLINE_S):
            began = time.perf_counter()
            await stream.send_all(request)
            head, data = await _head(stream)
            if not head.startswith(b"HTTP/1.1 200") or _LENGTH.search(head):
                raise RuntimeError(f"not the stream hoped for: {(head + data)[:500]!r}")
            data = data or await _more(stream)
            first_s = time.perf_counter() - began
            events, tail = data.count(b"data: "), data
            while not tail.endswith(_LAST_CHUNK):
                data = await _more(stream)
                # A prefix cut in two is found in neither piece alone.
                seam = tail[-5:] + data[:5]
                events += data.count(b"data: ") + seam.count(b"data: ")
                tail = (tail + data)[-len(_LAST_CHUNK) :]
        if _CLOSE.search(head):
            await self.aclose()
        return events, first_s


async def _more(stream: trio.SocketStream) -> bytes:
    data = await stream.receive_some(RECEIVE_BYTES)
    if not data:
        raise RuntimeError("the connection was closed in the middle of an answer")
    return bytes(data)


async def _head(stream: trio.SocketStream) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        data += await _more(stream)
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n", rest


async def get_json(place: Place, path: str) -> Any:
    """The JSON at a path."""
    connection = Connection(place)
    try:
        _, body, _ = await connection.exchange(place.request(path))
    finally:
        await connection.aclose()
    return json.loads(body)


async def ask_many(place: Place, body: object, *, connections: int, requests: int) -> Sample:
    """Ask over so many connections at once until so many requests are answered."""
    request = place.request(CHAT, body)
    latencies_s: list[float] = []
    served_by: set[str] = set()

    async def one(connection: Connection, count: int) -> None:
        for _ in range(count):
            head, _, took_s = await connection.exchange(request)
            latencies_s.append(took_s)
            named = _SERVED_BY.search(head)
            if named:
                served_by.add(named[1].decode().partition("/")[0])

    pool = [Connection(place) for _ in range(connections)]
    for connection in pool:
        await connection.open()
    try:
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for connection in pool:
                nursery.start_soon(one, connection, max(1, requests // connections))
        elapsed_s = time.perf_counter() - began
    finally:
        for connection in pool:
            await connection.aclose()
    return Sample(
        latencies_s=tuple(sorted(latencies_s)),
        elapsed_s=elapsed_s,
        served_by=frozenset(served_by),
    )


async def stream_many(place: Place, body: object, *, connections: int) -> Streamed:
    """One stream on each of so many connections, all at once."""
    request = place.request(CHAT, body)
    found: list[tuple[int, float]] = []

    async def one() -> None:
        connection = Connection(place)
        try:
            found.append(await connection.stream(request))
        finally:
            await connection.aclose()

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(one)
    return Streamed(
        events=sum(events for events, _ in found),
        elapsed_s=time.perf_counter() - began,
        first_s=median([first_s for _, first_s in found]),
    )


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)

"""What a hostile or broken program does to a port, and how a node's answers are checked."""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from tests.mesh.nodes import Node

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
PORTS = ("api", "console", "peer")
TIMEOUT_S = 60.0

_HANDSHAKE = (
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
_POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
# A TLS 1.2 record that announces a ClientHello of 512 bytes, most of which never come.
HALF_TLS = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)
JUNK: Mapping[str, bytes] = {
    "nothing": b"",
    "one byte": b"\x00",
    "random bytes": random.Random(1).randbytes(200_000),
    "a huge line": b"A" * 2_000_000,
    "endless headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000,
    "half of TLS": HALF_TLS,
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "no version": b"GET /\r\n\r\n",
    "a header that is none": b"GET / HTTP/1.1\r\nHost: localhost\r\n\x00\xff: \x01\r\n\r\n",
    "a length below zero": _POST + b"Content-Length: -1\r\n\r\n",
    "two lengths": _POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a length beyond all memory": _POST + b"Content-Length: 99999999999999999999\r\n\r\n",
    "a chunk without end": _POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
    "a body that is no JSON": _POST + b"Content-Length: 3\r\n\r\n{\xff}",
    "a body nested too deep": _POST + b"Content-Length: 100000\r\n\r\n" + b"[" * 100_000,
    "a byte after a handshake": _HANDSHAKE + b"Connection: Upgrade\r\n\r\nx",
    "a protocol that is not ASCII": (
        _HANDSHAKE + b"Connection: Upgrade\r\nSec-WebSocket-Protocol: \xff\xfe\r\n\r\n"
    ),
    "an extension that is not ASCII": (
        _HANDSHAKE + b"Connection: Upgrade\r\nSec-WebSocket-Extensions: \xff\xfe\r\n\r\n"
    ),
    "a connection token that is not ASCII": _HANDSHAKE + b"Connection: Upgrade, \xff\r\n\r\n",
    "a hello of 4 GiB": b"\xff\xff\xff\xff" + b"x" * 1000,
}


@contextmanager
def connected(node: Node, port: str, *, receive_bytes: int = 0) -> Iterator[socket.socket]:
    """A TCP connection to one of a node's ports.

    Args:
        node: Whose.
        port: One of `PORTS`.
        receive_bytes: How much the system takes for us while we do not read; 0 is its default.
    """
    host, _, number = str(node.me[port]).rpartition(":")
    with socket.socket() as one:
        one.settimeout(TIMEOUT_S)
        if receive_bytes:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        one.connect((host, int(number)))
        yield one


def throw(node: Node, port: str, junk: bytes) -> None:
    """Send junk and hang up; the node may hang up first."""
    with connected(node, port) as one:
        try:
            one.sendall(junk)
            one.shutdown(socket.SHUT_WR)
            while one.recv(65536):
                pass
        except OSError as exc:  # it hung up, which is right; only waiting for ever is not
            if isinstance(exc, TimeoutError):
                raise


def reset(one: socket.socket) -> None:
    """Close so that the other side sees a reset instead of an end."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def chat_request(question: str, **more: Any) -> bytes:
    """A whole chat request as it goes over the wire."""
    body = json.dumps({"messages": [{"role": "user", "content": question}], **more}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to a chat request."""

    status: int
    headers: Mapping[str, str]
    text: str


def ask(node: Node, question: str = QUESTION, *, timeout_s: float = TIMEOUT_S) -> Reply:
    """Ask a node; the text is the answer's, or the error's."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    host, _, port = str(node.me["api"]).rpartition(":")
    with closing(http.client.HTTPConnection(host, int(port), timeout=timeout_s)) as connection:
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        response = connection.getresponse()
        answer = json.loads(response.read())
        headers = {name.lower(): value for name, value in response.getheaders()}
    if response.status != 200:
        return Reply(response.status, headers, str(answer["error"]["message"]))
    return Reply(200, headers, str(answer["choices"][0]["message"]["content"]))


def answers(*nodes: Node) -> bool:
    """Whether all of these answer correctly, and their consoles too."""
    return all(
        ask(node).text == ANSWER and {one["state"] for one in node.status()["nodes"]} == {"live"}
        for node in nodes
    )


@dataclass(frozen=True, slots=True)
class Held:
    """What a node's process holds."""

    descriptors: int
    threads: int
    resident_bytes: int


def held(node: Node) -> Held:
    """What the node itself, without its engines, holds now."""
    process = psutil.Process(node.process.pid)
    with process.oneshot():
        return Held(process.num_fds(), process.num_threads(), process.memory_info().rss)

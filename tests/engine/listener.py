"""A second kind of engine: a program that listens and never speaks HTTP, as ggml-rpc-server."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import trio

from p2pmesh.engine.argv import passed_on
from p2pmesh.engine.confinement import UNKNOWN, Access
from p2pmesh.engine.exit_reason import exit_reason

# It names its address before it listens there.
PROGRAM = """
import socket
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
print(f"  endpoint       : 127.0.0.1:{listener.getsockname()[1]}", flush=True)
listener.listen()
while True:
    connection, _ = listener.accept()
    with connection:
        connection.send(connection.recv(1))
"""


class Listener:
    """Ready when it listens, healthy while it lives."""

    name = "a/b"
    labels: Mapping[str, str] = {"model": "m"}
    listening = r"endpoint +: ([0-9.]+):(\d+)"
    endpoint: tuple[str, int] | None = None
    api_key = "key"
    access = Access()
    confinement = UNKNOWN

    def __init__(
        self, program: str = PROGRAM, *, argv: Sequence[str] = (), load_s: float = 20.0
    ) -> None:
        self.argv = argv or (sys.executable, "-c", program)
        self.environ: Mapping[str, str] = passed_on(os.environ)
        self._load_s = load_s

    def prepare(self) -> float:
        return self._load_s

    def progress(self, resident_bytes: int) -> str:
        return f"starting, {resident_bytes} bytes"

    async def is_ready(self, host: str, port: int) -> bool:
        try:
            stream = await trio.open_tcp_stream(host, port)
        except OSError:
            return False
        await stream.aclose()
        return True

    async def is_healthy(self, host: str, port: int) -> bool:
        return True

    def exit_reason(self, lines: Sequence[str], exit_code: int | None) -> str:
        return exit_reason(lines, exit_code)


class Echo(Listener):
    """Healthy while it answers."""

    async def is_healthy(self, host: str, port: int) -> bool:
        async with await trio.open_tcp_stream(host, port) as stream:
            await stream.send_all(b"x")
            return bool(await stream.receive_some(1) == b"x")

"""ggml-rpc-server as a kind of engine: one stage of a pipeline, on loopback.

It computes what its one client, the head, tells it to, and knows nothing of models. Its ports
cannot be chosen by the system (it refuses port 0), and it says where it listens only once the
first client is there, since its output waits in a buffer. So the port is chosen here.

Invariant: it is never connected to beside its client. It serves one at a time, and others wait in
a queue of two, where the questions of a health check would soon keep out the head itself.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence

import trio

from p2pmesh.engine.argv import passed_on
from p2pmesh.engine.confinement import Access, Confinement
from p2pmesh.engine.exit_reason import exit_reason
from p2pmesh.engine.rpc_builds import (
    ANSWER_BYTES,
    HELLO_BYTES,
    NUMBER,
    REQUEST,
    Command,
    RpcBuild,
)
from p2pmesh.errors import EngineError

HOST = "127.0.0.1"
START_S = 30.0  # 0.1 s on a CPU; a driver may compile kernels first
CPU = "CPU"  # what llama.cpp calls the device of a machine without an accelerator

_HELLO = REQUEST.pack(Command.HELLO, HELLO_BYTES) + bytes(HELLO_BYTES)
_ANSWER_BYTES = NUMBER.size + ANSWER_BYTES[Command.HELLO]


class RpcServer:
    """One stage's engine. See `supervisor.EngineKind` for what is not said here.

    Attributes:
        build: How it talks.
        devices: llama.cpp's names of the devices that it offers, in order.
    """

    listening = r"(?!)"
    api_key = ""

    def __init__(
        self,
        command: Sequence[str],
        build: RpcBuild,
        *,
        name: str,
        in_use: Callable[[], bool],
        confinement: Confinement,
        devices: Sequence[str] = (),
        threads: int | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Nothing is started yet.

        Args:
            command: The program, as `Engine.rpc_command` names it.
            build: What `rpc_builds.known_build` knows about it.
            name: What its log is called after.
            in_use: Whether a head is connected to it, or about to be.
            confinement: How far it is to be confined, as `Engine` says that it can be.
            devices: What to compute on; empty means the CPU.
            threads: Threads of the CPU; None leaves the choice to it, which is half of them.
            environ: Where its few variables are taken from.
        """
        self.build = build
        self.devices = tuple(devices) or (CPU,)
        self.name = name
        self.labels: Mapping[str, str] = {"stage": name}
        self.environ: Mapping[str, str] = passed_on(environ)
        self.endpoint: tuple[str, int] | None = None
        self.argv: Sequence[str] = ()
        self.confinement = confinement
        self._command = tuple(command)
        self.access = Access()
        self._in_use = in_use
        self._flags = ["--device", ",".join(self.devices)]
        if threads is not None:
            self._flags += ["--threads", str(threads)]

    def prepare(self) -> float:
        """Choose a free port. If another program is quicker there, this one ends and tries anew."""
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        self.endpoint = HOST, port
        self.argv = [*self._command, "--host", HOST, "--port", str(port), *self._flags]
        self.access = Access(bind=port, accelerators=self.devices != (CPU,))
        return START_S

    def progress(self, resident_bytes: int) -> str:
        """Return that it starts: weights come later, from the head."""
        return f"starting, {resident_bytes / 1e6:,.0f} MB"

    async def is_ready(self, host: str, port: int) -> bool:
        """Whether it answers a HELLO.

        Raises:
            EngineError: It speaks another protocol than its build does.
        """
        try:
            answer = await _greet(host, port)
        except (OSError, trio.BrokenResourceError):
            return False
        if len(answer) < _ANSWER_BYTES:
            return False
        spoken = tuple(answer[NUMBER.size : NUMBER.size + 3])
        if spoken != self.build.protocol:
            said = ".".join(map(str, spoken))
            raise EngineError(f"the stage's engine speaks RPC {said}, not {self.build.name}'s")
        return True

    async def is_healthy(self, host: str, port: int) -> bool:
        """Whether it answers, or has a head that would notice: it answers nobody else then."""
        return self._in_use() or await self.is_ready(host, port)

    def exit_reason(self, lines: Sequence[str], exit_code: int | None) -> str:
        """Return its first complaint and how it ended."""
        return exit_reason(lines, exit_code)


async def _greet(host: str, port: int) -> bytes:
    """Return what it answers to a HELLO, as far as it comes."""
    answer = b""
    async with await trio.open_tcp_stream(host, port) as stream:
        await stream.send_all(_HELLO)
        while len(answer) < _ANSWER_BYTES:
            chunk = await stream.receive_some(_ANSWER_BYTES - len(answer))
            if not chunk:
                break
            answer += chunk
    return answer

"""ggml-rpc-server under supervision: the real one, and one that speaks another protocol."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import trio

from p2pmesh.engine import supervisor as supervisor_module
from p2pmesh.engine.confined import confinement_of
from p2pmesh.engine.confinement import UNKNOWN
from p2pmesh.engine.rpc_builds import Command
from p2pmesh.engine.rpc_server import HOST, RpcServer
from p2pmesh.errors import EngineError
from tests.engine.rpc_frames import BUILD, CAPS, HELLO_ANSWER, answer, request
from tests.engine.samples import lives, native
from tests.engine.supervised import is_ready, supervised


def stage(*, in_use: bool = False, program: str = "") -> RpcServer:
    command = program or str(native() / "ggml-rpc-server")
    environ = {"PATH": "/usr/bin", "SECRET": "s"}
    return RpcServer(
        (command,),
        BUILD,
        name="m-stage",
        in_use=lambda: in_use,
        confinement=confinement_of((command,)),
        environ=environ,
    )


async def received(stream: trio.SocketStream) -> bytes:
    """The answer to a HELLO, which comes in two pieces or one."""
    data = b""
    while len(data) < 36:
        chunk = await stream.receive_some(36 - len(data))
        assert chunk, data
        data += chunk
    return data


async def test_it_starts_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with supervised(tmp_path, stage()) as watched:
        status = await watched.wait(is_ready)
        assert status.pid is not None
        process = psutil.Process(status.pid)
        assert {c.laddr[:2] for c in process.net_connections()} == {(HOST, status.port)}
        assert process.environ()["GGML_NO_BACKTRACE"] == "1"
        assert "SECRET" not in process.environ()
    assert watched.states() == ["loading", "ready", "stopping", "stopped"]
    assert not lives(status.pid)
    assert "Starting RPC server v7.0.0" in watched.engine.log_path.read_text()


async def test_it_is_asked_beside_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a head is connected, dozens of health checks leave its queue empty."""
    monkeypatch.setattr(supervisor_module, "HEALTH_INTERVAL_S", 0.01)
    async with supervised(tmp_path, stage(in_use=True)) as watched:
        status = await watched.wait(is_ready)
        async with await trio.open_tcp_stream(status.host, status.port) as head:
            await head.send_all(request(Command.HELLO, CAPS))
            assert await received(head) == answer(HELLO_ANSWER[:4] + bytes(24))
            await trio.sleep(0.5)  # of real time, for the checks
            assert len(psutil.Process(status.pid).net_connections()) == 2  # listener and head
        assert watched.states() == ["loading", "ready"]
        with trio.fail_after(5):
            async with await trio.open_tcp_stream(status.host, status.port) as head:
                await head.send_all(request(Command.HELLO, CAPS))
                assert len(await received(head)) == 36


async def test_an_idle_one_that_was_stopped_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "HEALTH_INTERVAL_S", 0.1)
    monkeypatch.setattr(supervisor_module, "HEALTH_PATIENCE_S", (0.3, 0.3))
    async with supervised(tmp_path, stage()) as watched:
        status = await watched.wait(is_ready)
        psutil.Process(status.pid).suspend()
        await watched.wait(lambda s: s.state == "loading")
        psutil.Process(status.pid).resume()
        assert (await watched.wait(is_ready)).pid == status.pid


async def test_a_client_that_hangs_up_before_the_answer_ends_nothing(tmp_path: Path) -> None:
    async with supervised(tmp_path, stage()) as watched:
        status = await watched.wait(is_ready)
        process = psutil.Process(status.pid)
        process.suspend()
        async with await trio.open_tcp_stream(status.host, status.port) as client:
            await client.send_all(request(Command.HELLO, CAPS) + request(Command.DEVICE_COUNT) * 9)
        process.resume()
        async with await trio.open_tcp_stream(status.host, status.port) as client:
            await client.send_all(request(Command.HELLO, CAPS))
            assert await received(client) == answer(HELLO_ANSWER[:4] + bytes(24))
        assert watched.engine.status.pid == status.pid


class Unlucky(RpcServer):
    """Its first port is taken by another program in the last moment."""

    taken: socket.socket | None = None

    def prepare(self) -> float:
        start_s = super().prepare()
        if self.taken is None:
            assert self.endpoint is not None
            self.taken = socket.create_server(self.endpoint)
        return start_s


async def test_a_port_that_another_took_is_changed(tmp_path: Path) -> None:
    command = (str(native() / "ggml-rpc-server"),)
    here = confinement_of(command)
    kind = Unlucky(command, BUILD, name="m-stage", in_use=bool, confinement=here)
    async with supervised(tmp_path, kind) as watched:
        status = await watched.wait(is_ready)
    assert kind.taken is not None
    with kind.taken:
        assert status.port != kind.taken.getsockname()[1]
    details = [status.detail for status in watched.history]
    assert any("Failed to create server socket" in detail for detail in details)


@asynccontextmanager
async def saying(said: bytes) -> AsyncIterator[int]:
    """A program that says this to whoever connects, and hangs up."""

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(33)
            await stream.send_all(said)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host=HOST))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_another_protocol_never_becomes_ready() -> None:
    kind = stage(program="rpc")
    async with saying(answer(bytes((7, 0, 1, 0)) + bytes(24))) as port:
        with pytest.raises(EngineError, match=r"speaks RPC 7\.0\.1, not b11434's"):
            await kind.is_ready(HOST, port)


async def test_what_says_too_little_or_nothing_is_not_ready() -> None:
    kind = stage(program="rpc")
    async with saying(answer(HELLO_ANSWER)) as port:
        assert await kind.is_ready(HOST, port)
        assert await kind.is_healthy(HOST, port)
    assert not await kind.is_ready(HOST, port)
    assert not await kind.is_healthy(HOST, port)
    assert await stage(program="rpc", in_use=True).is_healthy(HOST, port)
    async with saying(answer(HELLO_ANSWER)[:35]) as port:
        assert not await kind.is_ready(HOST, port)


def test_devices_and_threads_are_flags() -> None:
    kind = RpcServer(
        ("rpc", "-x"),
        BUILD,
        name="n",
        in_use=bool,
        confinement=UNKNOWN,
        devices=("CUDA0", "CUDA1"),
        threads=3,
    )
    kind.prepare()
    assert kind.endpoint is not None
    where = ["--host", "127.0.0.1", "--port", str(kind.endpoint[1])]
    assert kind.argv == ["rpc", "-x", *where, "--device", "CUDA0,CUDA1", "--threads", "3"]
    assert kind.devices == ("CUDA0", "CUDA1")

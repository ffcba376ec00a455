"""The two ends of a pipeline's tunnel, with real engines at both."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gguf
import psutil
import pytest
import trio
from trio.testing import memory_stream_pair

from p2pmesh.engine import rpc_relay, rpc_sender
from p2pmesh.engine.rpc_builds import Command
from p2pmesh.engine.rpc_filter import Allowance, RpcFilter
from p2pmesh.engine.rpc_relay import WAITING_MAX, HeadPort, StagePort, cpu_s
from p2pmesh.engine.rpc_server import HOST
from p2pmesh.engine.rpc_weights import Weights
from p2pmesh.errors import EngineError, LinkError, PeerError
from tests.engine.pipelines import Pipeline, pipeline, stage_node
from tests.engine.rpc_frames import (
    BUILD,
    CAPS,
    HELLO_ANSWER,
    MAP_CUSTOM1,
    MB,
    answer,
    graph,
    index,
    request,
    tensor,
)
from tests.engine.samples import MODEL
from tests.engine.supervised import is_ready

LAYERS = 6
QUESTION = request(Command.GET_ALIGNMENT, index(0))
GREETED = answer(HELLO_ANSWER[:4] + bytes(24))


# --- real pipelines -----------------------------------------------------------------------------


def size_mib(model: Path, *names: str) -> float:
    """What the tensors whose names begin so take."""
    tensors = gguf.GGUFReader(model).tensors
    return sum(float(t.n_bytes) for t in tensors if t.name.startswith(names)) / MB


def assert_placed(split: Pipeline, model: Path, layers: tuple[int, ...]) -> None:
    """Each stage has the weights of its own layers, and the head all others, the output too."""
    buffers, first = split.buffers(), LAYERS - sum(layers)
    assert len(buffers) == len(layers) + 1
    for number, (count, port) in enumerate(zip(layers, split.ports, strict=True)):
        names = [f"blk.{layer}." for layer in range(first, first + count)]
        names += ["output_norm"] if number == len(layers) - 1 else []
        place = f"RPC0[{HOST}:{port.port}]"
        assert buffers[place] == pytest.approx(size_mib(model, *names), abs=0.02), place
        first += count
    kept = [f"blk.{layer}." for layer in range(LAYERS - sum(layers))]
    expected = size_mib(model, "token_embd", "output.", *kept)
    assert buffers["CPU_Mapped"] == pytest.approx(expected, abs=0.02)


@pytest.mark.full
async def test_a_split_model_says_what_it_says_alone(tmp_path: Path) -> None:
    async with pipeline(tmp_path / "alone", ()) as alone:
        expected = await alone.ask()
    assert len(expected) > 20
    for layers in ((3,), (2, 3)):
        async with pipeline(tmp_path / f"{len(layers)}", layers) as split:
            assert await split.ask() == expected
            assert_placed(split, MODEL, layers)
            for stage, port in zip(split.stages, split.ports, strict=True):
                assert stage.open == 1
                assert stage.port.in_use
                assert stage.port.traffic == port.traffic
                assert stage.port.traffic.to_stage_bytes > 2 * MB
            assert not any(port.lost.is_set() for port in split.ports)
        for stage in split.stages:
            assert (stage.failures, stage.open, stage.port.in_use) == ([], 0, False)
            assert stage.port.allowance.used_bytes == 0


class Recorder(RpcFilter):
    """A filter that keeps what went in and came out, in order, by connection."""

    sessions: ClassVar[list[list[tuple[bool, bytes, bytes]]]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps: list[tuple[bool, bytes, bytes]] = []
        self.sessions.append(self.steps)

    def from_head(self, data: bytes | bytearray) -> bytes | bytearray:
        out = super().from_head(data)
        self.steps.append((True, bytes(data), bytes(out)))
        return out

    def from_stage(self, data: bytes | bytearray) -> bytes | bytearray:
        out = super().from_stage(data)
        self.steps.append((False, bytes(data), bytes(out)))
        return out


async def test_a_real_session_passes_in_any_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the head says arrives unchanged: this build has no capabilities to take away."""
    monkeypatch.setattr(rpc_sender, "SMALL_BYTES", 1 << 40)  # nothing is offered
    monkeypatch.setattr(Recorder, "sessions", [])
    monkeypatch.setattr(rpc_relay, "RpcFilter", Recorder)
    async with pipeline(tmp_path, (1,)) as split:
        await split.ask(max_tokens=4)
    assert len(Recorder.sessions) > 5
    for steps in Recorder.sessions:
        said = b"".join(data for is_head, data, _ in steps if is_head)
        passed = b"".join(out for is_head, _, out in steps if is_head)
        assert passed == said
    longest = max(Recorder.sessions, key=len)
    to_head = b"".join(out for is_head, _, out in longest if not is_head)
    for size in (7, 300, 1 << 20):
        relay, passed_on, answered = RpcFilter(BUILD, Allowance(64 * MB)), bytearray(), bytearray()
        for is_head, data, _ in longest:
            for at in range(0, len(data), size):
                if is_head:
                    passed_on += relay.from_head(data[at : at + size])
                else:
                    answered += relay.from_stage(data[at : at + size])
        assert answered == to_head
        assert passed_on == b"".join(data for is_head, data, _ in longest if is_head)


def tied(path: Path) -> Path:
    """The small model without an output of its own."""
    reader = gguf.GGUFReader(MODEL)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for name, kept in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, sub = kept.types[0], kept.types[-1]
            is_list = kind == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, kept.contents(), kind, sub if is_list else None)
    for each in reader.tensors:
        if each.name != "output.weight":
            writer.add_tensor(each.name, each.data, raw_dtype=each.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


async def test_tied_embeddings_stay_with_the_head(tmp_path: Path) -> None:
    model = tied(tmp_path / "tied.gguf")
    async with pipeline(tmp_path / "alone", (), model=model) as alone:
        expected = await alone.ask()
    async with pipeline(tmp_path / "split", (4,), model=model) as split:
        assert await split.ask() == expected
        assert_placed(split, model, (4,))


@pytest.mark.full
async def test_a_killed_stage_ends_the_answer_and_comes_back_by_itself(tmp_path: Path) -> None:
    async with pipeline(tmp_path, (3,)) as split:
        expected = await split.ask()
        (stage,), (port,) = split.stages, split.ports
        first = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(split.stream, first)
            await first.wait()
            psutil.Process(stage.engine.engine.status.pid).kill()
            with trio.fail_after(2):
                await port.lost.wait()
            with trio.fail_after(5):
                await split.head.wait(lambda status: status.state == "loading")
        assert port.reason == "the stage closed the connection"
        assert isinstance(stage.failures[0], EngineError)
        await split.head.wait(is_ready)
        assert await split.ask() == expected


@pytest.mark.full
async def test_a_killed_head_leaves_its_stages_alive(tmp_path: Path) -> None:
    """Its memory there is free again before the next one comes, which needs nearly all of it."""
    async with pipeline(tmp_path, (3,), allowed_bytes=16 * MB) as split:
        (stage,), (port,) = split.stages, split.ports
        assert stage.port.allowance.free_bytes < stage.port.allowance.used_bytes
        pid, old = stage.engine.engine.status.pid, split.head.engine.status.pid
        first = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(split.stream, first)
            await first.wait()
            psutil.Process(old).kill()
        await split.head.wait(lambda status: is_ready(status) and status.pid != old)
        assert len(await split.ask()) > 20
        assert stage.engine.engine.status.pid == pid
        assert not port.lost.is_set()


@pytest.mark.full
async def test_a_stopped_stage_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_relay, "STALL_S", 1.0)
    async with pipeline(tmp_path, (3,)) as split:
        (stage,), (port,) = split.stages, split.ports
        first = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(split.stream, first)
            await first.wait()
            process = psutil.Process(stage.engine.engine.status.pid)
            process.suspend()
            with trio.fail_after(4):
                await port.lost.wait()
        process.resume()
    assert [str(exc) for exc in stage.failures] == ["the stage's engine stands still since 1 s"]


async def test_memory_beyond_the_plan_keeps_a_head_from_loading(tmp_path: Path) -> None:
    async with pipeline(tmp_path, (3,), allowed_bytes=4 * MB, wait=False) as split:
        (stage,) = split.stages
        pid = stage.engine.engine.status.pid
        await split.head.wait(lambda status: status.detail.startswith("starting again"))
        detail = split.head.engine.status.detail
        assert "failed to allocate RPC0" in detail, detail
        assert stage.port.allowance.refused_bytes > 0
        assert stage.failures == []
        assert stage.engine.engine.status.pid == pid


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\nHost: stage\r\n\r\n",
        request(Command.HELLO, CAPS) + request(200),
        request(Command.HELLO, CAPS) + graph(tensor(op=MAP_CUSTOM1)),
        request(Command.HELLO, CAPS)[:20],
    ],
    ids=["http", "command", "function", "half"],
)
async def test_junk_never_arrives_and_the_stage_lives(tmp_path: Path, junk: bytes) -> None:
    async with stage_node(tmp_path) as stage:
        pid = stage.engine.engine.status.pid
        near, far = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.serve, far)
            greeting = request(Command.HELLO, CAPS)
            if junk.startswith(greeting):  # a head waits for answers
                await near.send_all(greeting)
                assert await near.receive_some(99) == GREETED
                junk = junk.removeprefix(greeting)
            await near.send_all(junk)
            await near.send_eof()
            while await near.receive_some():
                pytest.fail("junk is not answered")
        is_half = len(junk) == 20
        assert [type(exc) for exc in stage.failures] == ([] if is_half else [PeerError])
        near, far = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.serve, far)
            await near.send_all(request(Command.HELLO, CAPS))
            with trio.fail_after(5):
                assert await near.receive_some(99) == GREETED
            await near.aclose()
        assert stage.engine.engine.status.pid == pid


# --- a stage's end ------------------------------------------------------------------------------

Program = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def program(handle: Program) -> AsyncIterator[int]:
    """A program in place of ggml-rpc-server: the port where it listens."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host=HOST))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def a_stage() -> StagePort:
    return StagePort(BUILD, Allowance(MB), tuple)


async def greets(stream: trio.SocketStream) -> None:
    """Answers a HELLO, and whatever comes then with nothing."""
    async with stream:
        await stream.receive_some(33)
        await stream.send_all(GREETED)
        while await stream.receive_some():
            pass


async def test_connections_wait_for_their_turn() -> None:
    """The second one begins when the first has ended at the engine, not only at the head."""
    order: list[str] = []

    async def slow(stream: trio.SocketStream) -> None:
        order.append("open")
        async with stream:
            await stream.receive_some(33)
            await stream.send_all(GREETED)
            while await stream.receive_some():
                pass
            await trio.sleep(0.05)  # it frees what the connection took
            order.append("closed")

    stage = a_stage()
    async with program(slow) as port, trio.open_nursery() as nursery:
        for _ in range(2):
            near, far = memory_stream_pair()
            await near.send_all(request(Command.HELLO, CAPS))
            await near.send_eof()
            nursery.start_soon(stage.serve, far, HOST, port, float)
    assert order == ["open", "closed"] * 2
    assert not stage.in_use


async def test_a_head_cannot_queue_without_end() -> None:
    stage = a_stage()
    async with program(greets) as port, trio.open_nursery() as nursery:
        for _ in range(WAITING_MAX):
            nursery.start_soon(stage.serve, memory_stream_pair()[1], HOST, port, float)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(PeerError, match="more connections than a stage can serve"):
            await stage.serve(memory_stream_pair()[1], HOST, port, float)
        assert stage.in_use
        nursery.cancel_scope.cancel()
    assert not stage.in_use


async def test_an_engine_that_is_not_there_or_leaves_is_an_error_of_the_engine() -> None:
    async def leaves(stream: trio.SocketStream) -> None:
        await stream.aclose()

    stage = a_stage()
    async with program(leaves) as port:
        with pytest.raises(EngineError, match=r"closed the connection|broke"):
            await stage.serve(memory_stream_pair()[1], HOST, port, float)
    with pytest.raises(EngineError, match="nothing listens there"):
        await stage.serve(memory_stream_pair()[1], HOST, port, float)


async def test_an_engine_that_works_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As long as CPU time passes; one that only waits is given up."""
    monkeypatch.setattr(rpc_relay, "STALL_S", 0.05)
    monkeypatch.setattr(rpc_relay, "WATCH_INTERVAL_S", 0.01)
    near, far = memory_stream_pair()
    await near.send_all(request(Command.HELLO, CAPS))
    asked = trio.Event()
    ticks = iter(range(30))

    def cpu() -> float:
        tick = next(ticks, 30)
        if tick == 30:
            asked.set()
        return float(tick)

    async def still(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with program(still) as port:
        with pytest.raises(EngineError, match="stands still"), trio.fail_after(10):
            await a_stage().serve(far, HOST, port, cpu)
    assert asked.is_set()


async def test_an_idle_connection_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_relay, "STALL_S", 0.02)
    monkeypatch.setattr(rpc_relay, "WATCH_INTERVAL_S", 0.01)
    near, far = memory_stream_pair()
    stage = a_stage()
    async with program(greets) as port, trio.open_nursery() as nursery:
        nursery.start_soon(stage.serve, far, HOST, port, float)
        await near.send_all(request(Command.HELLO, CAPS))
        assert await near.receive_some(99) == GREETED
        await trio.sleep(0.2)  # of real time: ten stalls
        await near.send_all(request(Command.GET_ALIGNMENT, index(0)))
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.005):
            await near.receive_some()
        nursery.cancel_scope.cancel()
    assert stage.traffic.to_head_bytes == len(GREETED)


def test_cpu_time_is_that_of_the_process() -> None:
    before = cpu_s(os.getpid())
    assert before > 0
    sum(range(2_000_000))
    assert cpu_s(os.getpid()) > before
    assert cpu_s(None) == 0
    assert cpu_s(2**22 + 1) == 0


# --- the head's end -----------------------------------------------------------------------------


async def test_a_connection_of_the_head_is_a_stream_to_the_stage() -> None:
    ends: list[trio.abc.Stream] = []

    async def open_stream() -> trio.abc.Stream:
        near, far = memory_stream_pair()
        ends.append(far)
        return near

    port = HeadPort(open_stream, lambda: [os.getpid()], BUILD, Weights(tuple))
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run)
        for number in (1, 2):
            async with await trio.open_tcp_stream(HOST, port.port) as head:
                await head.send_all(QUESTION)
                while len(ends) < number:
                    await trio.testing.wait_all_tasks_blocked(0.01)
                assert await ends[-1].receive_some(99) == QUESTION
                await ends[-1].send_all(b"answer")
                assert await head.receive_some(99) == b"answer"
            assert await ends[-1].receive_some(99) == b"", "its end is passed on"
        assert not port.lost.is_set()
        assert port.traffic == rpc_relay.Traffic(to_stage_bytes=2 * len(QUESTION), to_head_bytes=12)
        async with await trio.open_tcp_stream(HOST, port.port) as head:
            await head.send_all(QUESTION)
            while len(ends) < 3:
                await trio.testing.wait_all_tasks_blocked(0.01)
            await ends[-1].aclose()
            assert await head.receive_some(99) == b""
            await port.lost.wait()
            assert port.reason == "the stage closed the connection"
        nursery.cancel_scope.cancel()
    with pytest.raises(OSError, match="all attempts to connect"):
        await trio.open_tcp_stream(HOST, port.port)


async def test_a_stage_out_of_reach_is_lost_with_the_reason() -> None:
    async def open_stream() -> trio.abc.Stream:
        raise LinkError("b has no address")

    port = HeadPort(open_stream, lambda: [os.getpid()], BUILD, Weights(tuple))
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run)
        async with await trio.open_tcp_stream(HOST, port.port) as head:
            assert await head.receive_some(99) == b""
        await port.lost.wait()
        assert port.reason == "b has no address"
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may not tell")
async def test_another_process_is_refused() -> None:
    """A user of the same machine cannot reach a stage through the head's port."""
    opened: list[None] = []

    async def open_stream() -> trio.abc.Stream:
        opened.append(None)
        return memory_stream_pair()[0]

    async with trio.open_nursery() as nursery:
        command = [sys.executable, "-c", "input()"]
        engine = await nursery.start(partial(trio.run_process, command, stdin=subprocess.PIPE))
        port = HeadPort(open_stream, lambda: [engine.pid], BUILD, Weights(tuple))
        await nursery.start(port.run)
        async with await trio.open_tcp_stream(HOST, port.port) as head:
            with trio.fail_after(5):
                assert await head.receive_some(99) == b""
        nursery.cancel_scope.cancel()
    assert opened == []
    assert not port.lost.is_set()


async def test_before_there_is_a_head_nobody_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_relay, "OWNER_S", 0.05)
    port = HeadPort(trio.sleep_forever, list, BUILD, Weights(tuple))
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run)
        async with await trio.open_tcp_stream(HOST, port.port) as head:
            assert await head.receive_some(99) == b""
        nursery.cancel_scope.cancel()
    assert not port.lost.is_set()

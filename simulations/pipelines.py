"""Pipelines of real engines, for measurements: straight, or with both ends of the tunnel here.

    straight     llama-server ──TCP──► ggml-rpc-server
    in process   llama-server ──TCP──► HeadPort ══socket pair══► StagePort ──TCP──► ggml-rpc-server

The tunnel in this process has no TLS. What goes through it can be counted and delayed.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import trio

from p2pmesh.engine.argv import Launch, RemoteStage
from p2pmesh.engine.confinement import UNKNOWN
from p2pmesh.engine.find import Engine
from p2pmesh.engine.rpc_builds import known_build
from p2pmesh.engine.rpc_filter import Allowance
from p2pmesh.engine.rpc_relay import CHUNK_BYTES, HeadPort, StagePort, cpu_s
from p2pmesh.engine.rpc_server import HOST, RpcServer
from p2pmesh.engine.rpc_weights import Weights
from p2pmesh.engine.server import LlamaServer
from simulations.engines import EngineProcess, engine_process
from simulations.load import Place

ALLOWED_BYTES = 4 * 2**30  # memory of a stage; what is measured here needs less
CHUNKS_MAX = 64  # on their way in one direction; more of them wait at the sender
# The system's timers are exact to a millisecond or two; what is left is waited for actively.
TIMER_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunnel:
    """What is special about the tunnel and the ends of one pipeline.

    Attributes:
        own: The files of the model that the stages have.
        one_way_s: How long bytes travel in either direction.
        output_on_head: Whether the head keeps the output layer, as heads of nodes do.
    """

    own: tuple[Path, ...] = ()
    one_way_s: float = 0.0
    output_on_head: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A pipeline that is ready.

    Attributes:
        place: Where its head listens.
        load_s: From the head's start, with its stages ready, to its first answer.
        ports: The head's ends of the tunnel.
    """

    place: Place
    load_s: float
    ports: tuple[HeadPort, ...] = ()

    @property
    def tunnel_bytes(self) -> int:
        """All that went through the tunnel so far, in both directions."""
        return sum(port.traffic.to_stage_bytes + port.traffic.to_head_bytes for port in self.ports)


@asynccontextmanager
async def straight_pipeline(
    engine: Engine, launch: Launch, layers: Sequence[int], logs: Path
) -> AsyncIterator[Pipeline]:
    """A head that reaches its stages without a tunnel; `launch` is its own part."""
    async with AsyncExitStack() as stack:
        ports = []
        for number in range(len(layers)):
            kind = _stage_kind(engine, f"straight-{number}", launch.threads, lambda: True)
            process = await stack.enter_async_context(engine_process(kind, logs))
            ports.append((await process.ready()).port)
        head = _head_kind(engine, launch, ports, layers)
        yield await _ready(stack, head, logs, [])


@asynccontextmanager
async def own_pipeline(
    engine: Engine, launch: Launch, layers: Sequence[int], logs: Path, tunnel: Tunnel
) -> AsyncIterator[Pipeline]:
    """A head and its stages, with both ends of the tunnel in this process."""
    build = known_build(engine.version, engine.rpc)
    weights = Weights(lambda: tuple(map(Path, launch.model_paths)))
    heads: list[EngineProcess] = []
    async with AsyncExitStack() as stack:
        far_ends = []
        for number in range(len(layers)):
            far_end = StagePort(build, Allowance(ALLOWED_BYTES), lambda: tunnel.own)
            in_use = partial(_in_use, far_end)
            kind = _stage_kind(engine, f"stage-{number}", launch.threads, in_use)
            process = await stack.enter_async_context(engine_process(kind, logs))
            await process.ready()
            far_ends.append((far_end, process))
        # Ends behind the head and before the stages: a stage that ends first is a failure to it.
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        ports = [
            HeadPort(
                partial(_open, nursery, far_end, process, tunnel.one_way_s),
                lambda: [pid for head in heads for pid in head.pids],
                build,
                weights,
            )
            for far_end, process in far_ends
        ]
        for port in ports:
            await nursery.start(port.run)
        head = _head_kind(engine, launch, [port.port for port in ports], layers)
        if not tunnel.output_on_head:
            head.argv = _without(head.argv, "--override-tensor")
        yield replace(await _ready(stack, head, logs, heads), ports=tuple(ports))


async def _ready(
    stack: AsyncExitStack, kind: LlamaServer, logs: Path, heads: list[EngineProcess]
) -> Pipeline:
    began_s = time.perf_counter()
    head = await stack.enter_async_context(engine_process(kind, logs))
    heads.append(head)
    place = await head.ready()
    return Pipeline(place=place, load_s=time.perf_counter() - began_s)


def _stage_kind(
    engine: Engine, name: str, threads: int | None, in_use: Callable[[], bool]
) -> RpcServer:
    return RpcServer(
        engine.rpc_command,
        known_build(engine.version, engine.rpc),
        name=name,
        in_use=in_use,
        confinement=engine.rpc_confinement or UNKNOWN,
        threads=threads,
    )


def _head_kind(
    engine: Engine, launch: Launch, ports: Sequence[int], layers: Sequence[int]
) -> LlamaServer:
    stages = tuple(
        RemoteStage(endpoint=f"{HOST}:{port}", layers=count)
        for port, count in zip(ports, layers, strict=True)
    )
    return LlamaServer(engine, replace(launch, stages=stages))


def _in_use(port: StagePort) -> bool:
    return port.in_use


def _without(argv: Sequence[str], flag: str) -> list[str]:
    at = argv.index(flag)
    return [*argv[:at], *argv[at + 2 :]]


async def _open(
    nursery: trio.Nursery, port: StagePort, stage: EngineProcess, one_way_s: float
) -> trio.abc.Stream:
    """A stream to a stage, as a node opens it."""
    near, far = await _delayed_pair(nursery, one_way_s) if one_way_s else _pair()
    nursery.start_soon(_serve, port, stage, far)
    return near


async def _serve(port: StagePort, stage: EngineProcess, stream: trio.SocketStream) -> None:
    status = stage.supervisor.status
    async with stream:
        await port.serve(stream, status.host, status.port, partial(cpu_s, status.pid))


def _pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    near, far = trio.socket.socketpair()
    return trio.SocketStream(near), trio.SocketStream(far)


async def _delayed_pair(
    nursery: trio.Nursery, one_way_s: float
) -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two streams, of which each hears the other so much later."""
    (near, near_inside), (far, far_inside) = _pair(), _pair()
    nursery.start_soon(_carry_both, near_inside, far_inside, one_way_s)
    return near, far


async def _carry_both(one: trio.SocketStream, other: trio.SocketStream, one_way_s: float) -> None:
    async with one, other, trio.open_nursery() as nursery:
        nursery.start_soon(carry, one, other, one_way_s)
        nursery.start_soon(carry, other, one, one_way_s)


async def carry(source: trio.SocketStream, sink: trio.SocketStream, one_way_s: float) -> None:
    """Pass on what comes, and its end, each piece `one_way_s` after it came."""
    arrived, due = trio.open_memory_channel[tuple[float, bytes]](CHUNKS_MAX)

    async def take() -> None:
        async with arrived:
            while data := await _receive(source):
                await arrived.send((trio.current_time() + one_way_s, bytes(data)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        try:
            async for due_s, data in due:
                await _sleep_until(due_s)
                await sink.send_all(data)
            await _sleep_until(trio.current_time() + one_way_s)
            await sink.send_eof()
        except trio.BrokenResourceError:  # nobody is left to hear it
            nursery.cancel_scope.cancel()


async def _receive(stream: trio.SocketStream) -> bytes | bytearray:
    try:
        return await stream.receive_some(CHUNK_BYTES)
    except trio.BrokenResourceError:  # a connection may be cut as well as ended
        return b""


async def _sleep_until(due_s: float) -> None:
    await trio.sleep_until(due_s - TIMER_S)
    while trio.current_time() < due_s:
        await trio.lowlevel.checkpoint()


def even_layers(layers: int, count: int) -> list[int]:
    """Return the layers of the stages behind the head when `count` nodes share them evenly."""
    bounds = [layers * number // count for number in range(1, count + 1)]
    return [end - first for first, end in pairwise(bounds)]

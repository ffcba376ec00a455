"""The two ends of a pipeline's tunnel: RPC of llama.cpp over streams of the mesh.

    llama-server ──TCP──► HeadPort ══stream══► StagePort ──TCP──► ggml-rpc-server
    (the head)            one stream for each connection          (a stage)

A head opens a dozen connections one after the other while it starts, and keeps the last. Each is a
stream of its own, whose end is the connection's end. What comes is passed on at once and in order:
nothing waits for more. Both ends are on loopback; what arrives at a stage went through
`rpc_filter`, and a head's port is for the head's own process.

Neither llama-server nor ggml-rpc-server has time-outs. A dead stage makes the head abort, a stopped
one makes it wait for ever; so a stage's end watches that something moves while an answer is owed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import psutil
import structlog
import trio

from p2pmesh.engine.rpc_builds import RpcBuild
from p2pmesh.engine.rpc_filter import Allowance, RpcFilter
from p2pmesh.engine.rpc_offers import Offer, OfferAnswer
from p2pmesh.engine.rpc_sender import Bytes, WeightsSender
from p2pmesh.engine.rpc_server import HOST
from p2pmesh.engine.rpc_weights import Place, TensorReader, Weights, has_digest
from p2pmesh.errors import EngineError, LinkError, LocalError, MeshError, PeerError
from p2pmesh.models.tensors import layer_of
from p2pmesh.transport.base import link_errors

CHUNK_BYTES = 256 * 1024
# ggml-rpc-server serves one client at a time; its head opens one after the other.
WAITING_MAX = 4
CLOSE_S = 2.0  # an engine that is not stopped sees the end of its connection within 1 ms
# A graph of the largest batch takes seconds, in which CPU time passes: drivers wait actively.
STALL_S = 10.0
WATCH_INTERVAL_S = 0.5
OWNER_S = 2.0  # a head connects after 50 ms; by then its process id is known

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Traffic:
    """The bytes that went through one end.

    Attributes:
        to_stage_bytes: From the head, over the stream.
        to_head_bytes: From the stage, over the stream.
        own_bytes: Weights that the stage took from its own file instead.
    """

    to_stage_bytes: int = 0
    to_head_bytes: int = 0
    own_bytes: int = 0


class StagePort:
    """The stage's end: joins streams of the head with the stage's engine, one at a time.

    Attributes:
        traffic: What went through so far.
        allowance: The plan's memory; all connections share it.
    """

    def __init__(
        self,
        build: RpcBuild,
        allowance: Allowance,
        model_paths: Callable[[], Sequence[Path]],
        *,
        devices: int = 1,
    ) -> None:
        """Nothing is connected yet.

        Args:
            build: See `RpcFilter`.
            allowance: Likewise.
            model_paths: The files of the unit's model on this node; empty while it has none.
            devices: See `RpcFilter`.
        """
        self.traffic = Traffic()
        self.allowance = allowance
        self._build = build
        self._model_paths = model_paths
        self._devices = devices
        self._turn = trio.Lock()
        self._visitors = 0

    @property
    def in_use(self) -> bool:
        """Whether a head is connected, or waits for the one before it to go."""
        return self._visitors > 0

    async def serve(
        self, stream: trio.abc.Stream, host: str, port: int, cpu_s: Callable[[], float]
    ) -> None:
        """Join one stream with one connection to the stage's engine, to the end of either.

        Args:
            stream: The caller closes it.
            host: Where the engine listens.
            port: Likewise.
            cpu_s: The CPU time that the engine has taken so far.

        Raises:
            PeerError: The head sent what it may not; the engine never saw it.
            LinkError: The stream broke.
            EngineError: The engine ended or stands still.
        """
        if self._visitors >= WAITING_MAX:
            raise PeerError("the head opens more connections than a stage can serve")
        self._visitors += 1
        try:
            async with self._turn, await _connect(host, port) as engine:
                relay = RpcFilter(self._build, self.allowance, devices=self._devices)
                weights = Weights(self._model_paths)
                try:
                    await _Joined(stream, engine, relay, weights, self.traffic).run(cpu_s)
                finally:
                    relay.close()
        finally:
            self._visitors -= 1


class _Joined:
    """One connection of a head to a stage's engine."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        engine: trio.SocketStream,
        relay: RpcFilter,
        weights: Weights,
        traffic: Traffic,
    ) -> None:
        self._stream = stream
        self._engine = engine
        self._relay = relay
        self._weights = weights
        self._answering = trio.Lock()  # engine's answers and those to offers share the stream
        self._traffic = traffic
        self._sending = False  # to the engine, which has not taken all of it yet
        self._head_ended = False

    async def run(self, cpu_s: Callable[[], float]) -> None:
        await _first_of(self._to_stage, self._to_head, lambda: self._watch(cpu_s))

    async def _to_stage(self) -> None:
        while True:
            with link_errors("the head's connection broke"):
                data = await self._stream.receive_some(CHUNK_BYTES)
            if not data:
                break
            self._traffic.to_stage_bytes += len(data)
            if passed := self._relay.from_head(data):
                await self._send(passed)
            if self._relay.offer is not None:
                await self._settle(self._relay.offer)
        self._head_ended = True
        with _engine_errors():
            await self._engine.send_eof()
        # The engine frees what the connection took, and then hangs up: `_to_head` ends.
        await trio.sleep(CLOSE_S)

    async def _send(self, data: bytes | bytearray) -> None:
        self._sending = True
        with _engine_errors():
            await self._engine.send_all(data)
        self._sending = False

    async def _settle(self, offer: Offer) -> None:
        """Answer an offer, and give the engine the tensor if this node has it.

        No byte of the file gets to the engine before the head has named their digest, because what
        the engine has, the head can read.
        """
        tensor = offer.tensor
        place = await self._weights.find(tensor.name, tensor.size)
        if place is not None and await has_digest(place, offer.digest):
            await self._answer(self._relay.answer_offer(OfferAnswer.HAVE))
            await self._send(tensor.frame())
            await self._send_own(place, offer.digest)
        else:
            has_file = await self._weights.are_here()
            answer = OfferAnswer.SEND if has_file else OfferAnswer.NO_FILE
            await self._answer(self._relay.answer_offer(answer))

    async def _send_own(self, place: Place, digest: bytes) -> None:
        """Give the engine a tensor of this node's file."""
        reader = TensorReader(place)
        while reader.left:
            try:
                data = await reader.read()
            except LocalError as exc:
                raise EngineError(f"the stage lost its model's file: {exc}") from exc
            await self._send(data)
            self._traffic.own_bytes += len(data)
        if reader.digest() != digest:
            raise EngineError(f"{place.path} changed while it was loaded")

    async def _answer(self, data: bytes | bytearray) -> None:
        self._traffic.to_head_bytes += len(data)
        async with self._answering:
            with link_errors("the head's connection broke"):
                await self._stream.send_all(data)

    async def _to_head(self) -> None:
        while True:
            with _engine_errors():
                data = await self._engine.receive_some(CHUNK_BYTES)
            if not data:
                break
            if passed := self._relay.from_stage(data):
                await self._answer(passed)
        if not self._head_ended:
            raise EngineError("the stage's engine closed the connection")

    async def _watch(self, cpu_s: Callable[[], float]) -> None:
        """Raise once nothing has moved for long although the engine has something to do."""
        seen: object = None
        since_s = trio.current_time()
        while True:
            await trio.sleep(WATCH_INTERVAL_S)
            is_busy = self._relay.owed is not None or self._sending
            now = (astuple(self._traffic), cpu_s())
            if not is_busy or now != seen:
                seen, since_s = now, trio.current_time()
            elif trio.current_time() - since_s >= STALL_S:
                raise EngineError(f"the stage's engine stands still since {STALL_S:.0f} s")


class HeadPort:
    """The head's end: a loopback port that stands for one stage on another node.

    Attributes:
        port: Where it listens on 127.0.0.1; 0 before `run` has started.
        lost: Set when the way to the stage broke while the head used it: the head is lost too.
        reason: Why, for a person; empty before.
        traffic: What went through so far.
        layers: Those of which the stage has weights.
    """

    def __init__(
        self,
        open_stream: Callable[[], Awaitable[trio.abc.Stream]],
        pids: Callable[[], Collection[int]],
        build: RpcBuild,
        weights: Weights,
    ) -> None:
        """Nothing listens yet.

        Args:
            open_stream: Opens a new stream to the stage; raises `MeshError`.
            pids: The processes that may connect: the head's, once it runs.
            build: What the head and the stage run.
            weights: Of the model that the head loads.
        """
        self.port = 0
        self.lost = trio.Event()
        self.reason = ""
        self.traffic = Traffic()
        self.layers: set[int] = set()
        self._open_stream = open_stream
        self._pids = pids
        self._build = build
        self._weights = weights

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled; started once the port is known."""
        listeners = await trio.open_tcp_listeners(0, host=HOST)
        self.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._accept, listeners)
            task_status.started()

    async def _accept(self, head: trio.SocketStream) -> None:
        async with head:
            if not await self._is_ours(head):
                log.warning("rpc_stranger_refused", port=self.port)
                return
            try:
                await self._join(head, await self._open_stream())
            except MeshError as exc:
                self.reason = self.reason or str(exc)
                self.lost.set()

    async def _join(self, head: trio.SocketStream, stream: trio.abc.Stream) -> None:
        answering = trio.Lock()  # the stage's answers, and those given here
        sender = WeightsSender(
            self._build,
            self._weights,
            send=partial(self._send, stream),
            reply=partial(_reply, head, answering),
            seen=self._see,
            spared=self._spare,
        )
        try:
            await _first_of(
                lambda: self._to_stage(head, sender),
                lambda: self._to_head(head, answering, stream, sender),
            )
        finally:
            with trio.move_on_after(CLOSE_S), contextlib.suppress(trio.BrokenResourceError):
                await stream.aclose()

    async def _send(self, stream: trio.abc.Stream, data: Bytes) -> None:
        self.traffic.to_stage_bytes += len(data)
        with link_errors("the connection to the stage broke"):
            await stream.send_all(data)

    def _see(self, name: str) -> None:
        layer = layer_of(name)
        if layer is not None:
            self.layers.add(layer)

    def _spare(self, size: int) -> None:
        self.traffic.own_bytes += size

    async def _to_stage(self, head: trio.SocketStream, sender: WeightsSender) -> None:
        with contextlib.suppress(_HeadGoneError):
            while True:
                with _head_may_go():
                    data = await head.receive_some(CHUNK_BYTES)
                if not data:
                    return
                await sender.from_engine(data)

    async def _to_head(
        self,
        head: trio.SocketStream,
        answering: trio.Lock,
        stream: trio.abc.Stream,
        sender: WeightsSender,
    ) -> None:
        with contextlib.suppress(_HeadGoneError):
            while True:
                with link_errors("the connection to the stage broke"):
                    data = await stream.receive_some(CHUNK_BYTES)
                if not data:
                    raise LinkError("the stage closed the connection")
                self.traffic.to_head_bytes += len(data)
                if passed := sender.from_stage(data):
                    await _reply(head, answering, passed)

    async def _is_ours(self, head: trio.SocketStream) -> bool:
        """Whether one of the head's processes is at the other end, as far as the system can say."""
        with trio.move_on_after(OWNER_S):
            while not self._pids():  # noqa: ASYNC110 - another task's status
                await trio.sleep(WATCH_INTERVAL_S / 10)
        try:
            ends = (head.socket.getpeername()[1], self.port)
        except OSError:  # gone already
            return False
        return await trio.to_thread.run_sync(_is_connected, tuple(self._pids()), ends)


def cpu_s(pid: int | None) -> float:
    """Return the CPU time that a process has taken so far; 0 when there is none to ask."""
    try:
        times = psutil.Process(pid).cpu_times() if pid is not None else None
    except (psutil.Error, OSError):
        return 0.0
    return float(times.user + times.system) if times else 0.0


class _HeadGoneError(Exception):
    """The head's own connection ended, by whatever means."""


@contextlib.contextmanager
def _head_may_go() -> Iterator[None]:
    try:
        yield
    except trio.BrokenResourceError as exc:
        raise _HeadGoneError from exc


async def _reply(head: trio.SocketStream, answering: trio.Lock, data: Bytes) -> None:
    async with answering:
        with _head_may_go():
            await head.send_all(data)


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Turn what the system says about the connection to an engine into an `EngineError`."""
    try:
        with link_errors("the connection to the stage's engine broke"):
            yield
    except LinkError as exc:
        raise EngineError(str(exc)) from exc


async def _connect(host: str, port: int) -> trio.SocketStream:
    with _engine_errors(), trio.fail_after(CLOSE_S):
        return await trio.open_tcp_stream(host, port)


async def _first_of(*tasks: Callable[[], Awaitable[None]]) -> None:
    """Run tasks until one of them ends, and raise what it raised; the others are cancelled."""
    failure: MeshError | None = None

    async def run(task: Callable[[], Awaitable[None]]) -> None:
        nonlocal failure
        try:
            await task()
        except MeshError as exc:
            failure = failure or exc
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(run, task)
    if failure is not None:
        raise failure


def _is_connected(pids: Collection[int], ends: tuple[int, int]) -> bool:
    """Whether one of the processes has a connection between these two ports of loopback.

    True as well where the system does not let this node see the connections of its own children.
    """
    for pid in pids:
        try:
            connections = psutil.Process(pid).net_connections("tcp4")
        except psutil.NoSuchProcess:
            continue
        except (psutil.Error, OSError):
            return True
        established = (c for c in connections if c.status == psutil.CONN_ESTABLISHED)
        if any((c.laddr.port, c.raddr.port) == ends for c in established):
            return True
    return False

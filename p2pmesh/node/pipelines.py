"""This node's parts of pipelines: the stages that it runs for others' heads, and the heads.

A stage is an engine that computes what the head of its unit sends; a head is a llama-server that
reaches the other stages through ports on loopback, one for each. The ways between them are streams
of the mesh for `rpc`, one for each connection that the head opens. Whoever sends graphs to a stage
may run code there, so only a peer with the right `stage` gets one, or any that serves where engines
are confined; and only to a stage whose unit has that peer for its head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog
import trio

from p2pmesh.engine.argv import Launch, RemoteStage
from p2pmesh.engine.confinement import UNKNOWN
from p2pmesh.engine.rpc_builds import RpcBuild, known_build
from p2pmesh.engine.rpc_filter import Allowance
from p2pmesh.engine.rpc_relay import HeadPort, StagePort, cpu_s
from p2pmesh.engine.rpc_server import HOST, RpcServer
from p2pmesh.engine.rpc_weights import Weights
from p2pmesh.engine.server import LlamaServer, ServerProgram
from p2pmesh.errors import EngineError, LinkError, PeerError
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import RPC, Needs, Peer
from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import PartId, StageName, parse_part, parse_stage
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.mesh import Mesh
from p2pmesh.placement.pipeline import Stage
from p2pmesh.transport.base import Handlers, Service
from p2pmesh.transport.handshake import receive_frame, send_frame

REQUEST_BYTES_MAX = 256  # the name of a part
ANSWER_BYTES_MAX = 256
ANSWER_TIMEOUT_S = 5.0
YES = b"yes"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage that runs here."""

    head: NodeId
    port: StagePort


class Pipelines:
    """Runs the stages and heads that the plan has on this node.

    Args:
        mesh: The ways to other nodes.
        engines: What runs here.
    """

    def __init__(self, mesh: Mesh, engines: EngineManager) -> None:
        self._mesh, self._engines = mesh, engines
        self._stages: dict[PartId, _Stage] = {}
        self._heads: set[PartId] = set()
        self._nursery: trio.Nursery | None = None

    def handlers(self) -> Handlers:
        """The service that heads use."""
        stage = not self._engines.engine.confines_stages
        return {RPC: Service(self._serve, Needs(Role.SERVE, stage=stage))}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the ports of heads open, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    # --- stages ---------------------------------------------------------------------------------

    def start_stage(
        self,
        part: PartId,
        stages: Sequence[Stage],
        *,
        threads: int,
        model_paths: Callable[[], Sequence[Path]],
    ) -> None:
        """Start the engine of a stage that is no head.

        Args:
            part: Which one.
            stages: Of its unit, the head first.
            threads: Of the CPU.
            model_paths: The files of its model here, from which it takes its weights; empty while
                this node has none, and the head sends them.

        Raises:
            EngineError: The engine here cannot be a stage.
        """
        engine, number = self._engines.engine, _number(part)
        build = known_build(engine.version, engine.rpc)
        port = StagePort(build, Allowance(stages[number].need_bytes), model_paths)
        kind = RpcServer(
            engine.rpc_command,
            build,
            name=f"{part.digest[:8]}-stage-{number}",
            in_use=lambda: port.in_use,
            confinement=engine.rpc_confinement or UNKNOWN,
            threads=threads,
        )
        self._stages[part] = _Stage(stages[0].node, port)
        ranges = tuple(stage.range for stage in stages)
        self._engines.start(part, kind, beside=partial(self._forget, part), stages=ranges)

    async def _forget(self, part: PartId) -> None:
        try:
            await trio.sleep_forever()
        finally:
            del self._stages[part]

    async def _serve(self, peer: Peer, stream: trio.abc.Stream) -> None:
        """Join one stream of a head with the engine of its stage."""
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                asked = await receive_frame(stream, bytes_max=REQUEST_BYTES_MAX)
        except trio.TooSlowError as exc:
            raise LinkError("the head did not say which stage it wants") from exc
        part = parse_part(asked.decode("ascii", "replace"))
        stage = None if part is None else self._stages.get(part)
        status = None if part is None else self._engines.status(part)
        if part is None or stage is None or stage.head != peer.node or status is None:
            await send_frame(stream, b"this node runs no such stage for you")
            return
        await send_frame(stream, YES)
        self._engines.begin(part)
        try:
            await stage.port.serve(stream, status.host, status.port, partial(cpu_s, status.pid))
        except EngineError as exc:
            # It neither answers nor ends: no head gets anywhere with it.
            log.warning("stage_stalled", part=str(part), reason=str(exc))
            self._engines.cut(part)
        finally:
            self._engines.end(part)

    # --- heads ----------------------------------------------------------------------------------

    def start_head(
        self, part: PartId, stages: Sequence[Stage], launch: Launch, check: Callable[[], None]
    ) -> None:
        """Start the head of a unit whose other stages are ready; nothing while it starts already.

        Args:
            part: Which one.
            stages: Of its unit, the head first.
            launch: How it serves the model, apart from the other stages.
            check: See `LlamaServer`.

        Raises:
            EngineError: The engine here cannot be a head.
        """
        if self._nursery is None or part in self._heads:
            return
        build = known_build(self._engines.engine.version, self._engines.engine.rpc)
        self._heads.add(part)
        self._nursery.start_soon(self._run_head, part, tuple(stages), build, launch, check)

    async def _run_head(
        self,
        part: PartId,
        stages: tuple[Stage, ...],
        build: RpcBuild,
        launch: Launch,
        check: Callable[[], None],
    ) -> None:
        """Run a head with its ports: they end together, also when the way to a stage breaks."""
        ended = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                weights = Weights(lambda: tuple(map(Path, launch.model_paths)))
                ports = [
                    HeadPort(
                        partial(self._open, stage.node, _part(part, number)),
                        self._pids(part),
                        build,
                        weights,
                    )
                    for number, stage in enumerate(stages)
                    if number
                ]
                for port in ports:
                    await nursery.start(port.run)
                remote = tuple(
                    RemoteStage(endpoint=f"{HOST}:{port.port}", layers=_layers(stage))
                    for port, stage in zip(ports, stages[1:], strict=True)
                )
                kind = _Head(
                    self._engines.engine,
                    replace(launch, stages=remote),
                    check=check,
                    shares=tuple(zip(ports, stages[1:], strict=True)),
                )
                self._engines.start(
                    part,
                    kind,
                    beside=partial(_until_lost, ports, ended),
                    stages=tuple(stage.range for stage in stages),
                )
                await ended.wait()
                for port in ports:
                    if port.reason:
                        log.warning("stage_lost", part=str(part), reason=port.reason)
                nursery.cancel_scope.cancel()
        finally:
            self._heads.discard(part)
            self._mesh.changes.notify()

    def _pids(self, part: PartId) -> Callable[[], Sequence[int]]:
        """Return a function for the processes that may use a head's ports."""

        def pids() -> Sequence[int]:
            pid = self._engines.pid(part)
            return () if pid is None else (pid,)

        return pids

    async def _open(self, node: NodeId, part: PartId) -> trio.abc.Stream:
        """Open a stream to a stage.

        Raises:
            LinkError: Its node does not answer.
            PeerError: It does not let this node have it.
        """
        stream = await self._mesh.open_stream(node, RPC)
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                await send_frame(stream, str(part).encode())
                answer = await receive_frame(stream, bytes_max=ANSWER_BYTES_MAX)
            if answer != YES:
                raise PeerError(f"the stage refused: {answer.decode('ascii', 'replace')[:200]}")
        except trio.TooSlowError as exc:
            await trio.aclose_forcefully(stream)
            raise LinkError("the stage did not answer in time") from exc
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream


class _Head(LlamaServer):
    """A llama-server whose layers are where the plan has them, or which is not ready.

    Args:
        shares: The ports to the other stages, with what each of these was planned to have.
    """

    def __init__(
        self,
        engine: ServerProgram,
        launch: Launch,
        *,
        check: Callable[[], None],
        shares: Sequence[tuple[HeadPort, Stage]],
    ) -> None:
        super().__init__(engine, launch, check=check)
        self._shares = shares

    async def is_ready(self, host: str, port: int) -> bool:
        """Whether it has answered, with the help of all stages.

        Raises:
            EngineError: It put layers where they were not planned.
        """
        if not await super().is_ready(host, port):
            return False
        for number, (way, stage) in enumerate(self._shares, 1):
            planned = range(stage.first_layer, stage.last_layer + 1)
            # The last ones may be for drafts, of which llama-server loads nothing.
            if not way.layers or not way.layers.issubset(planned):
                found = ", ".join(str(layer + 1) for layer in sorted(way.layers)) or "none"
                raise EngineError(
                    f"stage {number} got the layers {found} instead of {planned[0] + 1} to"
                    f" {planned[-1] + 1}"
                )
        return True


async def _until_lost(ports: Sequence[HeadPort], ended: trio.Event) -> None:
    """Return when the way to any stage has broken."""

    async def wait(port: HeadPort) -> None:
        await port.lost.wait()
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for port in ports:
                nursery.start_soon(wait, port)
    finally:
        ended.set()


def _layers(stage: Stage) -> int:
    return stage.last_layer - stage.first_layer + 1


def _number(part: PartId) -> int:
    stage = parse_stage(part.name)
    assert stage is not None, "a stage has a stage's name"
    return stage.number


def _part(head: PartId, number: int) -> PartId:
    """Return another stage of a head's unit."""
    stage = parse_stage(head.name)
    assert stage is not None, "a head has a stage's name"
    return PartId(head.digest, str(StageName(stage.unit, number)))

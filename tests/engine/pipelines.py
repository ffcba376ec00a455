"""Pipelines of real engines inside one test: stages, head, and streams of memory between them."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import trio
from trio.testing import memory_stream_pair

from p2pmesh.engine.argv import Launch, RemoteStage
from p2pmesh.engine.confined import confinement_of
from p2pmesh.engine.rpc_filter import Allowance
from p2pmesh.engine.rpc_relay import HeadPort, StagePort, cpu_s
from p2pmesh.engine.rpc_server import RpcServer
from p2pmesh.engine.rpc_weights import Weights
from p2pmesh.engine.server import LlamaServer
from p2pmesh.errors import MeshError
from tests.engine.rpc_frames import BUILD, MB
from tests.engine.samples import MODEL, Plain, native
from tests.engine.supervised import Watched, is_ready, supervised

DEADLINE_S = 30.0
# Of every engine: flash attention on a CPU rounds a long prompt by how many threads share it.
THREADS = 2


@dataclass
class StageNode:
    """One stage: its engine, its end of the tunnel, and what went wrong there."""

    port: StagePort
    engine: Watched
    failures: list[MeshError] = field(default_factory=list)
    open: int = 0

    async def serve(self, stream: trio.abc.Stream) -> None:
        """As a node does with a stream of the head."""
        status = self.engine.engine.status
        self.open += 1
        try:
            async with stream:
                await self.port.serve(stream, status.host, status.port, partial(cpu_s, status.pid))
        except MeshError as exc:
            self.failures.append(exc)
        finally:
            self.open -= 1


@asynccontextmanager
async def stage_node(
    logs: Path, allowed_bytes: int = 64 * MB, own: Sequence[Path] = ()
) -> AsyncIterator[StageNode]:
    """A stage that is ready, on a node with these files of the model."""
    port = StagePort(BUILD, Allowance(allowed_bytes), lambda: own)
    command = (str(native() / "ggml-rpc-server"),)
    kind = RpcServer(
        command,
        BUILD,
        name="stage",
        in_use=lambda: port.in_use,
        confinement=confinement_of(command),
        threads=THREADS,
    )
    async with supervised(logs, kind) as watched:
        await watched.wait(is_ready)
        yield StageNode(port, watched)


@dataclass
class Pipeline:
    """A head and its stages."""

    head: Watched
    ports: list[HeadPort]
    stages: list[StageNode]
    key: str

    async def ask(self, **body: object) -> str:
        """The text that the head answers a completion with."""
        return str((await self.choice(**body))["text"])

    async def choice(self, **body: object) -> dict[str, Any]:
        """The text that the head answers a completion with, and what else it says about it."""
        return await trio.to_thread.run_sync(partial(self._ask, body), abandon_on_cancel=True)

    async def stream(self, first: trio.Event) -> int:
        """Return how many lines of a very long answer came until it ended, by whatever means."""
        return await trio.to_thread.run_sync(
            self._stream, partial(trio.from_thread.run_sync, first.set), abandon_on_cancel=True
        )

    def _stream(self, on_first: Callable[[], None]) -> int:
        count = 0
        body: dict[str, object] = {"max_tokens": 900, "ignore_eos": True, "stream": True}
        with self._post(body) as answer, suppress(OSError, HTTPException):
            for line in answer:
                count += line.startswith(b"data: {")
                if count == 3:
                    on_first()
        return count

    def _ask(self, body: dict[str, object]) -> dict[str, Any]:
        with self._post(body) as answer:
            return dict(json.load(answer)["choices"][0])

    def _post(self, body: dict[str, object]) -> HTTPResponse:
        status = self.head.engine.status
        request = urllib.request.Request(
            f"http://{status.host}:{status.port}/v1/completions",
            data=json.dumps(
                {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 24, **body}
            ).encode(),
            headers={"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"},
        )
        answer = urllib.request.urlopen(request, timeout=DEADLINE_S)
        assert isinstance(answer, HTTPResponse)
        return answer

    def buffers(self) -> dict[str, float]:
        """Where the weights are, in MiB, as the head says."""
        lines = self.head.engine.log_path.read_text()
        found = re.findall(r"(\S+) model buffer size += +([\d.]+) MiB", lines)
        return {name: float(size) for name, size in found}


@asynccontextmanager
async def pipeline(
    logs: Path,
    layers: Sequence[int],
    *,
    model: Path = MODEL,
    own: Sequence[Path] = (),
    allowed_bytes: int = 64 * MB,
    wait: bool = True,
) -> AsyncIterator[Pipeline]:
    """A head whose stages have these layers; without any, one engine that serves alone.

    `own` are the files of the model that the stages' nodes have.
    """
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        stages, ports = [], []
        heads: list[Watched] = []

        def pids() -> list[int]:
            return [pid for head in heads if (pid := head.engine.status.pid)]

        for number in range(len(layers)):
            stage = await stack.enter_async_context(
                stage_node(logs / f"{number}", allowed_bytes, own)
            )

            async def open_stream(stage: StageNode = stage) -> trio.abc.Stream:
                near, far = memory_stream_pair()
                nursery.start_soon(stage.serve, far)
                return near

            port = HeadPort(open_stream, pids, BUILD, Weights(lambda: (model,)))
            await nursery.start(port.run)
            stages.append(stage)
            ports.append(port)
        launch = Launch(
            model_paths=(model,),
            alias="head",
            context=1024,
            threads=THREADS,
            stages=tuple(
                RemoteStage(endpoint=f"127.0.0.1:{port.port}", layers=count)
                for port, count in zip(ports, layers, strict=True)
            ),
        )
        kind = LlamaServer(Plain((str(native() / "llama-server"),)), launch)
        # It says where the weights are, and computes each prompt anew, as a head does.
        kind.argv = [*kind.argv, "--verbosity", "4", "--cache-ram", "0"]
        async with _watched(logs, kind, heads) as head:
            if wait:
                await head.wait(is_ready)
            yield Pipeline(head, ports, stages, kind.api_key)


@asynccontextmanager
async def _watched(logs: Path, kind: LlamaServer, heads: list[Watched]) -> AsyncIterator[Watched]:
    async with supervised(logs, kind) as head:
        heads.append(head)
        yield head

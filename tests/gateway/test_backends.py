"""The protocol over one real engine: a gateway before the embedded engine and its model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from p2pmesh.engine.argv import Launch
from p2pmesh.engine.server import LlamaServer
from p2pmesh.engine.supervisor import EngineStatus, Supervisor
from p2pmesh.gateway.backends import Backends
from p2pmesh.gateway.route import ServedModel, Target
from p2pmesh.gateway.serve import Gateway
from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.catalogue import Catalogue, Named
from p2pmesh.models.parts import PartId, ReplicaKey
from tests.engine.samples import EMBEDDED, MODEL, Plain
from tests.gateway.fake import CHAT, HttpCaller, field_of

DIGEST = ModelDigest("d" * 64)
NODE = NodeId(b"n" * 16)


class OneEngine:
    """A node with one engine and no peers."""

    def __init__(self, logs: Path) -> None:
        launch = Launch(model_paths=(MODEL,), alias=MODEL.stem, context=16384, slots=2)
        server = LlamaServer(Plain(EMBEDDED), launch)
        self.engine = Supervisor(server, logs=logs, on_change=self._take)
        self._changed = trio.Event()

    def _take(self, status: EngineStatus) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def models(self) -> Sequence[ServedModel]:
        state = self.engine.status.state
        return [
            ServedModel(
                digest=DIGEST, id=MODEL.stem, gives=frozenset({"chat"}), state=state, size_bytes=1
            )
        ]

    def catalogue(self) -> Catalogue:
        return Catalogue([Named(digest=DIGEST, stem=MODEL.stem, name="Tiny")])

    def targets(self, digest: ModelDigest) -> Sequence[Target]:
        if self.engine.status.state != "ready":
            return []
        return [
            Target(
                node=NODE,
                node_name="lonely",
                part=PartId(DIGEST),
                model_id=MODEL.stem,
                local=True,
                slots=2,
            )
        ]

    async def connect(self, target: Target) -> trio.abc.Stream:
        return await trio.open_tcp_stream(self.engine.status.host, self.engine.status.port)

    def engine_key(self, part: PartId) -> str | None:
        return self.engine.status.api_key

    async def lost(self, target: Target) -> None:
        await trio.sleep_forever()

    def begin(self, part: PartId) -> None:
        """Nobody drains this engine."""

    def end(self, part: PartId) -> None:
        """As above."""

    def failed(self, replica: ReplicaKey) -> None:
        """Nothing here follows from it."""

    async def changed(self) -> None:
        await self._changed.wait()


@asynccontextmanager
async def serving(logs: Path) -> AsyncIterator[tuple[OneEngine, Gateway, int]]:
    node = OneEngine(logs)
    backends: Backends = node
    gateway = Gateway(backends)
    with trio.fail_after(90):
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: node.engine.run(task_status=task_status))
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            await nursery.start(gateway.serve, listeners)
            yield node, gateway, listeners[0].socket.getsockname()[1]
            nursery.cancel_scope.cancel()


def question(text: str, **options: Any) -> bytes:
    asked = {"messages": [{"role": "user", "content": text}], "temperature": 0}
    return json.dumps(asked | options).encode()


async def wait_idle(node: OneEngine) -> None:
    """Until every slot of the engine is free.

    llama-server looks after its clients only when nothing was said for a second, and an answer
    about its slots is something said: who asks more often keeps an abandoned request alive.
    """
    key = f"Bearer {node.engine.status.api_key}"
    with trio.fail_after(10):
        while True:
            stream = await trio.open_tcp_stream(node.engine.status.host, node.engine.status.port)
            async with stream:
                head, body = await HttpCaller(stream).ask("GET", "/slots", b"", authorization=key)
            assert head.status_code == 200, body
            if not any(slot["is_processing"] for slot in json.loads(body)):
                return
            await trio.sleep(1.2)


async def test_a_real_answer_streamed_and_not_while_the_engine_is_still_loading(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as (_, _gateway, port):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            caller = HttpCaller(stream)
            asked = question("What is the capital of France?")
            head, body = await caller.ask("POST", CHAT, asked)
            assert head.status_code == 200
            answer = json.loads(body)["choices"][0]["message"]["content"]
            assert answer == "The capital of France is Paris."
            assert field_of(head, "x-p2pmesh-served-by") == "lonely/whole"

            asked = question("What is the capital of France?", stream=True, model="Tiny")
            head, body = await caller.ask("POST", CHAT, asked)
            events = [line[6:] for line in body.split(b"\n\n") if line.startswith(b"data: ")]
            assert events.pop() == b"[DONE]"
            pieces = [json.loads(event)["choices"][0]["delta"] for event in events]
            text = "".join(piece.get("content") or "" for piece in pieces)
            assert text == "The capital of France is Paris."


@pytest.mark.parametrize("stream_it", [True, False])
async def test_a_client_that_leaves_frees_the_slot(tmp_path: Path, *, stream_it: bool) -> None:
    async with serving(tmp_path) as (node, gateway, port):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        caller = HttpCaller(stream)
        await caller.ask("POST", CHAT, question("Hello", max_tokens=1))
        endless = question("Tell me a story", stream=stream_it, max_tokens=100_000, ignore_eos=True)
        await caller.send("POST", CHAT, endless)
        if stream_it:
            await caller.event()
        await trio.sleep(0.2)
        assert gateway.statistics().in_flight == {DIGEST: 1}
        await stream.aclose()
        await wait_idle(node)
        assert gateway.statistics().in_flight == {}


async def test_an_engine_that_is_killed_is_waited_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as (node, gateway, port):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            caller = HttpCaller(stream)
            await caller.ask("POST", CHAT, question("Hello", max_tokens=1))
            assert node.engine.status.pid is not None
            psutil.Process(node.engine.status.pid).kill()
            asked = question("What is the capital of France?")
            head, body = await caller.ask("POST", CHAT, asked)
            assert head.status_code == 200, body
            assert b"The capital of France is Paris." in body
            assert gateway.statistics().failures == 0

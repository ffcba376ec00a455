"""An engine under supervision in a test, and what it went through."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from p2pmesh.engine.argv import Launch
from p2pmesh.engine.server import LlamaServer
from p2pmesh.engine.supervisor import EngineKind, EngineStatus, Supervisor
from tests.engine.samples import EMBEDDED, MODEL, Plain

DEADLINE_S = 30.0  # of any single step, on a machine that is busy with something else


@dataclass
class Watched:
    """A supervised engine and the statuses it went through."""

    engine: Supervisor = field(init=False)
    history: list[EngineStatus] = field(default_factory=list)
    changed: trio.Event = field(default_factory=trio.Event)

    def take(self, status: EngineStatus) -> None:
        self.history.append(status)
        self.changed.set()
        self.changed = trio.Event()

    async def wait(self, condition: Callable[[EngineStatus], bool]) -> EngineStatus:
        """The next status, from the present one on, for which `condition` holds."""
        with trio.fail_after(DEADLINE_S):
            while not condition(self.engine.status):
                await self.changed.wait()
        return self.engine.status

    def states(self) -> list[str]:
        """The states without immediate repetition."""
        states = [status.state for status in self.history]
        return [s for i, s in enumerate(states) if i == 0 or s != states[i - 1]]


def tiny(
    command: tuple[str, ...] = EMBEDDED, model: Path = MODEL, alias: str = "tiny"
) -> LlamaServer:
    """The small model in the embedded engine."""
    return LlamaServer(Plain(command), Launch(model_paths=(model,), alias=alias, context=512))


@asynccontextmanager
async def supervised(logs: Path, kind: EngineKind) -> AsyncIterator[Watched]:
    watched = Watched()
    engine = Supervisor(kind, logs=logs, on_change=watched.take)
    watched.engine = engine
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: engine.run(task_status=task_status))
        yield watched
        nursery.cancel_scope.cancel()


def is_ready(status: EngineStatus) -> bool:
    return status.state == "ready"


def ask(status: EngineStatus, key: str) -> str:
    request = urllib.request.Request(
        f"http://{status.host}:{status.port}/v1/chat/completions",
        data=json.dumps(
            {
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "temperature": 0,
            }
        ).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])

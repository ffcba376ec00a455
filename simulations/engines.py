"""Engines of our own, for measurements: started like a node's, and asked directly."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from p2pmesh.engine.argv import Launch, RemoteStage, server_argv
from p2pmesh.engine.confined import confinement_of
from p2pmesh.engine.confinement import Confinement
from p2pmesh.engine.supervisor import EngineKind, EngineStatus, Supervisor
from simulations.load import Place

READY_S = 60.0  # of a small model, on a machine that is busy with something else


@dataclass(frozen=True, slots=True)
class Command:
    """An engine that is only a command."""

    command: tuple[str, ...]

    @property
    def confinement(self) -> Confinement:
        """As a node would have it."""
        return confinement_of(self.command)


def launch_of(command: Sequence[str]) -> tuple[Command, Launch]:
    """Return the launch behind an engine's command line; checked by making it again.

    Raises:
        RuntimeError: It says more than this understands, so a second engine would differ.
    """
    start = command.index("--model")
    flags = command[start:]

    def value(flag: str) -> str:
        return flags[flags.index(flag) + 1]

    engine = Command(tuple(command[:start]))
    launch = Launch(
        model_paths=(Path(value("--model")),),
        alias=value("--alias"),
        context=int(value("--ctx-size")),
        slots=int(value("--parallel")),
        threads=int(value("--threads")) if "--threads" in flags else None,
        stages=_stages(value("--rpc"), value("--tensor-split")) if "--rpc" in flags else (),
    )
    if server_argv(engine, launch) != list(command):
        raise RuntimeError(f"cannot start a second engine like {command}")
    return engine, launch


def _stages(endpoints: str, split: str) -> tuple[RemoteStage, ...]:
    layers = [int(count) for count in split.split(",")]
    layers[-1] -= 1  # the output, which counts as one
    return tuple(
        RemoteStage(endpoint=endpoint, layers=count)
        for endpoint, count in zip(endpoints.split(","), layers, strict=True)
    )


class EngineProcess:
    """An engine under supervision."""

    def __init__(self, kind: EngineKind, logs: Path) -> None:
        """Nothing is started yet."""
        self.supervisor = Supervisor(kind, logs=logs, on_change=self._take)
        self._name = kind.name
        self._changed = trio.Event()

    def _take(self, _: EngineStatus) -> None:
        self._changed.set()
        self._changed = trio.Event()

    @property
    def pids(self) -> tuple[int, ...]:
        """Its process, if there is one at present."""
        pid = self.supervisor.status.pid
        return () if pid is None else (pid,)

    async def ready(self) -> Place:
        """Wait until it answers; where it listens.

        Raises:
            RuntimeError: It does not answer in time; with what it said.
        """
        with trio.move_on_after(READY_S):
            while self.supervisor.status.state != "ready":
                await self._changed.wait()
        status = self.supervisor.status
        if status.state != "ready":
            raise RuntimeError(f"{self._name} does not answer: {status.state}, {status.detail}")
        return Place(host=status.host, port=status.port, key=status.api_key)


@asynccontextmanager
async def engine_process(kind: EngineKind, logs: Path) -> AsyncIterator[EngineProcess]:
    """An engine that is being started; stopped at the end of the block."""
    process = EngineProcess(kind, logs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.supervisor.run)
        yield process
        nursery.cancel_scope.cancel()

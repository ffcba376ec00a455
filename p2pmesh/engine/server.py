"""llama-server as a kind of engine; the embedded engine understands the same flags.

It is ready when it has answered a request for one token, not when its port is open; while it
loads, the memory that it holds says how far it is.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Protocol

from p2pmesh.engine import probe
from p2pmesh.engine.argv import Command, Launch, environment_of, server_argv
from p2pmesh.engine.confinement import Access, Confinement
from p2pmesh.engine.exit_reason import exit_reason

# Present and older forms: "listening on http://127.0.0.1:1234", "listening, hostname: …, port: 1".
LISTENING = r"listening(?: on https?://|, hostname: )([0-9.]+|\[[0-9a-f:]+\])(?::|, port: )(\d+)"

# A spinning disk reads 100 MB/s; the constant covers drivers that compile kernels at first use.
LOAD_BASE_S = 60.0
LOAD_BYTES_PER_S = 50_000_000


class ServerProgram(Command, Protocol):
    """The part of an engine that serving a model needs."""

    @property
    def confinement(self) -> Confinement:
        """Return how far it is to be confined."""


class LlamaServer:
    """One model served by llama-server. See `supervisor.EngineKind` for what is not said here.

    Attributes:
        launch: What it serves, API key included.
    """

    listening = LISTENING
    endpoint: tuple[str, int] | None = None

    def __init__(
        self,
        engine: ServerProgram,
        launch: Launch,
        *,
        check: Callable[[], None] = lambda: None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Nothing is looked at yet: that is `prepare`.

        Args:
            engine: The program to start.
            launch: What it is to serve; an empty API key is replaced by a random one.
            check: Called in a thread before each start; what it raises keeps the engine from
                starting.
            environ: Where the engine's few variables are taken from.
        """
        self.name = launch.alias
        self.labels: Mapping[str, str] = {"model": launch.alias}
        self.confinement = engine.confinement
        self._engine = engine
        self._check = check
        self._size_bytes = 0
        self._take(replace(launch, api_key=launch.api_key or secrets.token_urlsafe(24)))
        self.environ: Mapping[str, str] = environment_of(self.launch, environ)
        self.api_key = self.launch.api_key

    def _take(self, launch: Launch) -> None:
        """Be started for `launch` from now on, which has the same secrets."""
        self.launch = launch
        self.argv: Sequence[str] = server_argv(self._engine, launch)
        self.access = access_of(launch)

    def prepare(self) -> float:
        """Check the model and return how long a load of its size may take."""
        self._check()
        self._size_bytes = _size_of(self.launch.model_paths)
        return LOAD_BASE_S + self._size_bytes / LOAD_BYTES_PER_S

    def progress(self, resident_bytes: int) -> str:
        """Return how much of the model is in memory, as far as the system can tell."""
        tenths = min(resident_bytes, self._size_bytes) * 10 // max(self._size_bytes, 1)
        return f"loading {self._size_bytes / 1e6:,.0f} MB, {tenths * 10} % in memory"

    async def is_ready(self, host: str, port: int) -> bool:
        """Whether it answers a first request."""
        return await probe.ask_token(host, port, self.launch)

    async def is_healthy(self, host: str, port: int) -> bool:
        """Whether it says so; threads of their own answer that, also while it computes."""
        return await probe.ask_health(host, port)

    def exit_reason(self, lines: Sequence[str], exit_code: int | None) -> str:
        """Return its first complaint and how it ended."""
        return exit_reason(lines, exit_code)


def access_of(launch: Launch) -> Access:
    """Return what a launch needs of the machine; a head computes on the CPU alone."""
    return Access(
        files=launch.model_paths,
        bind=launch.port,
        connect=tuple(int(stage.endpoint.rpartition(":")[2]) for stage in launch.stages),
        accelerators=not launch.stages and launch.devices != ("none",),
    )


def _size_of(paths: Iterable[PurePath]) -> int:
    """The bytes to load; files that are not there are the engine's to complain about."""
    return sum(Path(path).stat().st_size for path in paths if Path(path).exists())

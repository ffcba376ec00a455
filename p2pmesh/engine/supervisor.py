"""Supervision of one engine process, of whatever kind.

    loading ──is ready──► ready
      ▲  └─gave up─► failed │
      │ after a pause  │    │ ended, or stopped answering
      └────────────────┴────┘
    from anywhere, on cancel: stopping ──► stopped

An engine that is silent for some seconds is `loading`, so that requests go elsewhere; it is put
down only when it stays silent, and ready again when it answers.

A start that fails is tried again after `RETRY_S`; when those pauses are used up the engine is
`failed`, with the reason, and tried again after ever longer pauses. Being ready for `STABLE_S`
wins all tries back. A load that passes its deadline has failed at once.

All that is special to a program is its `EngineKind`: what to start, when it is ready, whether it
answers, why it ended. The process itself belongs to `launcher.py`, which lets no engine outlive
the node. When `run` returns, cancelled or not, the engine and its launcher are gone.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
import structlog
import trio

from p2pmesh.engine import launcher
from p2pmesh.engine.argv import readable
from p2pmesh.engine.confined import confined
from p2pmesh.engine.confinement import UNKNOWN, Access, Confinement
from p2pmesh.errors import EngineError, MeshError

State = Literal["loading", "ready", "failed", "stopping", "stopped"]

# Pauses between tries: quick ones for a passing trouble, then `failed` and rare ones, so that a
# broken file costs nearly nothing and a repaired driver is still noticed.
RETRY_S = (0.5, 1.0, 2.0)
RETRY_FAILED_S = (60.0, 120.0, 300.0, 600.0, 1800.0)
STABLE_S = 30.0

HEALTH_INTERVAL_S = 2.0
# Two questions in a row without an answer: together with the interval, a stopped engine is not
# ready after 4 to 6 s. Two, as the first may be lost to a moment in which this node itself stood
# still. Engines answer them while they compute.
HEALTH_PATIENCE_S = (2.5, 1.5)
# A machine that swaps, or was suspended, has caught up by then. Loading anew takes longer.
HANG_S = 12.0

TERMINATE_S = 3.0  # an engine ends within 0.1 s unless it is in the middle of a long batch
KILL_S = 2.0
PROBE_PAUSE_S = 0.05
PROGRESS_INTERVAL_S = 0.5

_LAUNCHER = (sys.executable, "-I", "-S", launcher.__file__)
_log = structlog.get_logger(__name__)


class EngineKind(Protocol):
    """All that is special to a program: what to start, and what its state means.

    Attributes:
        name: What its log file is called after.
        labels: Fields of each log event about it.
        argv: The whole command line; read before each start.
        access: What it needs of this machine; read before each start.
        confinement: How far it is kept from the rest of this machine.
        environ: All of its environment.
        listening: A regular expression for the line in which the program says where it listens;
            its two groups are host and port.
        endpoint: Host and port that `prepare` chose; None when only the program says them.
        api_key: What its callers must show; empty when it asks for none.
    """

    name: str
    labels: Mapping[str, str]
    argv: Sequence[str]
    access: Access
    confinement: Confinement
    environ: Mapping[str, str]
    listening: str
    endpoint: tuple[str, int] | None
    api_key: str

    def prepare(self) -> float:
        """Look before each start, in a thread, and return in how many seconds it must be ready.

        Raises:
            MeshError: It cannot be started; another try soon would end the same way.
        """

    def progress(self, resident_bytes: int) -> str:
        """Return for a person what a program is doing that has this much memory and loads."""

    async def is_ready(self, host: str, port: int) -> bool:
        """Whether it does now what it was started for; asked until the deadline.

        Raises:
            EngineError: It never will.
        """

    async def is_healthy(self, host: str, port: int) -> bool:
        """Whether it answers; may wait for ever. That its process lives is known without."""

    def exit_reason(self, lines: Sequence[str], exit_code: int | None) -> str:
        """Return for a person why it ended by itself.

        Args:
            lines: The last lines of its output, oldest first.
            exit_code: Negative for a signal; None when nobody knows.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """The state of one engine process, for everybody else.

    Attributes:
        state: See the diagram above.
        host: Where it listens; empty while unknown.
        port: Likewise; 0 while unknown.
        api_key: What its callers must show.
        pid: The engine's process id while there is one.
        detail: What it is doing, or why it ended, for a person.
        since_s: trio's clock at the last change of state.
        confinement: How far the engine is kept from the rest of this machine.
    """

    state: State
    host: str
    port: int
    api_key: str = field(repr=False)
    pid: int | None
    detail: str
    since_s: float
    confinement: Confinement = UNKNOWN


# A process that is gone or not ours, or no descriptor left to read /proc with.
_UNKNOWN = (psutil.Error, OSError)


@dataclass(slots=True)
class _Life:
    """One start of the engine, from the launcher's first line to its last."""

    process: trio.Process
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=launcher.LAST_WORDS_LINES))
    listening: trio.Event = field(default_factory=trio.Event)
    host: str = ""
    port: int = 0
    engine: psutil.Process | None = None
    exit_code: int | None = None
    over: bool = False
    end: _End | None = None
    ready_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a life.

    Attributes:
        reason: Why it ended, for a person.
        ready_s: How long the engine had been ready.
        hopeless: Whether another try would take as long and end the same way.
    """

    reason: str
    ready_s: float = 0.0
    hopeless: bool = False


class Supervisor:
    """Keeps one engine running until cancelled.

    Attributes:
        status: The present status; the same that `on_change` was last called with.
        log_path: Where the engine's output goes.
    """

    def __init__(
        self, kind: EngineKind, *, logs: Path, on_change: Callable[[EngineStatus], None]
    ) -> None:
        """Nothing is started yet: that is `run`.

        Args:
            kind: What to keep running.
            logs: The directory of the log file; made when it is missing.
            on_change: Called with every new status, from the supervising task; must not block.
        """
        self._kind = kind
        self._on_change = on_change
        self._log = _log.bind(**kind.labels)
        safe_name = re.sub(r"[^\w.@-]", "_", kind.name)[:100]
        self.log_path = logs / f"engine-{safe_name}.log"
        self.status = EngineStatus(
            state="loading",
            host="",
            port=0,
            api_key=kind.api_key,
            pid=None,
            detail="waiting to start",
            since_s=0.0,
            confinement=kind.confinement,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Supervise until cancelled; by then the engine is gone, whatever it was doing."""
        self.status = replace(self.status, since_s=trio.current_time())
        task_status.started()
        failures = 0
        try:
            while True:
                end = await self._live()
                failures = 1 if end.ready_s >= STABLE_S else failures + 1
                if end.hopeless:
                    failures = max(failures, len(RETRY_S) + 1)
                await self._pause(failures, end.reason)
        finally:
            self._become("stopped", "")

    def say(self, detail: str) -> None:
        """Tell what is being prepared, while the engine does not run yet."""
        if self.status.state == "loading" and self.status.pid is None:
            self._become("loading", detail)

    async def _pause(self, failures: int, reason: str) -> None:
        self._log.warning("engine_ended", why=reason, failures=failures)
        rare = failures - len(RETRY_S) - 1
        if rare < 0:
            self._become("loading", f"starting again: {reason}")
            await trio.sleep(RETRY_S[failures - 1])
        else:
            self._become("failed", reason)
            await trio.sleep(RETRY_FAILED_S[min(rare, len(RETRY_FAILED_S) - 1)])

    async def _live(self) -> _End:
        """Start the engine once and stay with it to its end."""
        self._become("loading", "starting")
        try:
            load_s = await trio.to_thread.run_sync(self._kind.prepare)
            life = _Life(await self._spawn())
            if self._kind.endpoint is not None:
                life.host, life.port = self._kind.endpoint
                life.listening.set()
        except MeshError as exc:
            return _End(str(exc), hopeless=True)
        except OSError as exc:
            return _End(f"the engine cannot be started: {exc.strerror}")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hear, life, nursery.cancel_scope)
                await self._attend(life, load_s)
                nursery.cancel_scope.cancel()
        finally:
            is_cancelled = not life.over and life.end is None
            # At once, so that nobody sends more requests there.
            self._become("stopping" if is_cancelled else "loading", "ending the engine")
            with trio.CancelScope(shield=True):  # each wait inside has a deadline
                await _put_down(life)
        reason = self._kind.exit_reason(tuple(life.lines), life.exit_code)
        end = life.end if life.end is not None else _End(reason)
        ready_s = 0.0 if life.ready_since_s is None else trio.current_time() - life.ready_since_s
        return replace(end, ready_s=ready_s)

    async def _spawn(self) -> trio.Process:
        await trio.to_thread.run_sync(partial(self.log_path.parent.mkdir, 0o700, True, True))
        command = await trio.to_thread.run_sync(self._command)
        # A process group of its own: Ctrl-C in the terminal is for the node alone.
        options: dict[str, Any] = {"process_group": 0}
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        process = await trio.lowlevel.open_process(
            [*_LAUNCHER, str(self.log_path), self._kind.listening, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._kind.environ,
            **options,
        )
        self._log.info(
            "engine_started",
            launcher=process.pid,
            command=readable(self._kind.argv),
            confinement=str(self._kind.confinement),
        )
        return process

    def _command(self) -> Sequence[str]:
        """Return what starts the engine, confined as far as it is said to be."""
        kind = self._kind
        if kind.confinement.level == "none":
            return kind.argv
        return confined(kind.argv, kind.access, kind.environ)

    async def _hear(self, life: _Life, watcher: trio.CancelScope) -> None:
        """Take in what the launcher says; its silence is the engine's end."""
        assert life.process.stdout is not None
        buffer = b""
        async for chunk in life.process.stdout:
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                self._take(life, line.decode("utf-8", "replace"))
        life.over = True
        watcher.cancel()

    def _take(self, life: _Life, line: str) -> None:
        match line.split(" "):
            case ["pid", pid] if pid.isdigit():
                with contextlib.suppress(*_UNKNOWN):  # it may be gone already
                    life.engine = psutil.Process(int(pid))
            case ["listening", host, port] if port.isdigit():
                life.host, life.port = host, int(port)
                life.listening.set()
            case ["exit", code] if code.removeprefix("-").isdigit():
                life.exit_code = int(code)
            case _:
                life.lines.append(line.removeprefix("log "))

    async def _attend(self, life: _Life, load_s: float) -> None:
        life.end = await self._watch(life, load_s)

    async def _watch(self, life: _Life, load_s: float) -> _End:
        """Return when the engine must be put down; `_hear` cancels this when it ends by itself."""
        try:
            with trio.fail_after(load_s):
                await self._wait_listening(life)
                await self._wait_ready(life)
        except trio.TooSlowError:
            return _End(f"it did not load within {load_s:.0f} s", hopeless=True)
        except EngineError as exc:
            await trio.sleep(PROBE_PAUSE_S)  # if it died under the question, its own reason counts
            return _End(str(exc))
        life.ready_since_s = trio.current_time()
        healthy = True
        while healthy:
            self._become("ready", "", life)
            self._log.info("engine_ready", pid=self.status.pid, port=life.port)
            await self._wait_silent(life)
            self._log.warning("engine_silent", pid=self.status.pid)
            self._become("loading", "it does not answer at the moment", life)
            healthy = await self._is_healthy(life, HANG_S)
        return _End("it stopped answering")

    async def _wait_listening(self, life: _Life) -> None:
        while not life.listening.is_set():
            self._become("loading", self._kind.progress(_resident_bytes(life)), life)
            with trio.move_on_after(PROGRESS_INTERVAL_S):
                await life.listening.wait()

    async def _wait_ready(self, life: _Life) -> None:
        while True:
            if await self._kind.is_ready(life.host, life.port):
                return
            await trio.sleep(PROBE_PAUSE_S)

    async def _wait_silent(self, life: _Life) -> None:
        """Return when the engine has not answered for some seconds."""
        healthy = True
        while healthy:
            await trio.sleep(HEALTH_INTERVAL_S)
            for patience_s in HEALTH_PATIENCE_S:
                healthy = await self._is_healthy(life, patience_s)
                if healthy:
                    break

    async def _is_healthy(self, life: _Life, patience_s: float) -> bool:
        """Whether the engine says within this time that it is."""
        with trio.move_on_after(patience_s):
            while True:
                if await self._kind.is_healthy(life.host, life.port):
                    return True
                await trio.sleep(PROBE_PAUSE_S)
        return False

    def _become(self, state: State, detail: str, life: _Life | None = None) -> None:
        """Publish a status if it differs from the present one."""
        engine = None if life is None else life.engine
        status = replace(
            self.status,
            state=state,
            detail=detail,
            host="" if life is None else life.host,
            port=0 if life is None else life.port,
            pid=None if engine is None else engine.pid,
            since_s=self.status.since_s if state == self.status.state else trio.current_time(),
        )
        if status != self.status:
            self.status = status
            self._on_change(status)


async def _put_down(life: _Life) -> None:
    """End launcher and engine: politely, then by closing the pipe, then by force."""
    process = life.process
    assert process.stdin is not None
    assert process.stdout is not None
    with trio.move_on_after(TERMINATE_S), contextlib.suppress(trio.BrokenResourceError):
        await process.stdin.send_all(b"t")
        await process.wait()
    await process.stdin.aclose()
    with trio.move_on_after(KILL_S):
        await process.wait()
    if process.returncode is None:
        process.kill()
        with trio.move_on_after(KILL_S):
            await process.wait()
    await process.stdout.aclose()
    with trio.move_on_after(KILL_S):
        while life.engine is not None and _lives(life.engine):
            with contextlib.suppress(*_UNKNOWN):
                life.engine.kill()
            await trio.sleep(PROBE_PAUSE_S)


def _lives(engine: psutil.Process) -> bool:
    try:
        return bool(engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except _UNKNOWN:  # nobody can say
        return True


def _resident_bytes(life: _Life) -> int:
    """The memory that the engine has so far, as far as the system can tell."""
    try:
        return int(life.engine.memory_info().rss) if life.engine else 0
    except _UNKNOWN:
        return 0

"""One engine process for one model, supervised.

    loading ──answered a token──► ready
      ▲  └──gave up──► failed       │
      │ after a pause    │          │ ended, or stopped answering
      └──────────────────┴──────────┘
    from anywhere, on cancel: stopping ──► stopped

An engine that is silent for some seconds is `loading`, so that requests go elsewhere; it is put
down only when it stays silent, and ready again when it answers.

A start that fails is tried again after `RETRY_S`; when those pauses are used up the model is
`failed`, with the engine's own last words, and tried again after ever longer pauses. Being ready
for `STABLE_S` wins all tries back. A load that passes its deadline has failed at once.

The process itself belongs to `launcher.py`, which lets no engine outlive the node. When `run`
returns, cancelled or not, the engine and its launcher are gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal

import psutil
import structlog
import trio

from p2pmesh.engine import launcher, probe
from p2pmesh.engine.argv import Command, Launch, environment_of, readable, server_argv
from p2pmesh.engine.words import last_words
from p2pmesh.errors import EngineError, MeshError

State = Literal["loading", "ready", "failed", "stopping", "stopped"]

# Pauses between tries: quick ones for a passing trouble, then `failed` and rare ones, so that a
# broken file costs nearly nothing and a repaired driver is still noticed.
RETRY_S = (0.5, 1.0, 2.0)
RETRY_FAILED_S = (60.0, 120.0, 300.0, 600.0, 1800.0)
STABLE_S = 30.0

# A spinning disk reads 100 MB/s; the constant covers drivers that compile kernels at first use.
LOAD_BASE_S = 60.0
LOAD_BYTES_PER_S = 50_000_000

HEALTH_INTERVAL_S = 2.0
# Two questions in a row without an answer: together with the interval, a stopped engine is not
# ready after 4 to 6 s. Two, as the first may be lost to a moment in which this node itself stood
# still. Engines answer them from threads of their own, also while they compute.
HEALTH_PATIENCE_S = (2.5, 1.5)
# A machine that swaps, or was suspended, has caught up by then. Loading anew takes longer.
HANG_S = 12.0

TERMINATE_S = 3.0  # llama-server ends within 0.1 s unless it is in the middle of a long batch
KILL_S = 2.0
PROBE_PAUSE_S = 0.05
PROGRESS_INTERVAL_S = 0.5

_LAUNCHER = (sys.executable, "-I", "-S", launcher.__file__)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """What everybody else may know about one engine process.

    Attributes:
        state: See the module's table.
        host: Where it listens; meaningful when ready.
        port: Likewise; 0 while unknown.
        api_key: What its callers must show.
        pid: The engine's process id while there is one.
        detail: What it is doing, or its last words, for a person.
        since_s: trio's clock at the last change of state.
    """

    state: State
    host: str
    port: int
    api_key: str = field(repr=False)
    pid: int | None
    detail: str
    since_s: float


# A process that is gone or not ours, or no descriptor left to read /proc with.
_UNKNOWN = (psutil.Error, OSError)


@dataclass(slots=True)
class _Life:
    """One start of the engine, from the launcher's first line to its last."""

    process: trio.Process
    words: deque[str] = field(default_factory=lambda: deque(maxlen=launcher.LAST_WORDS_LINES))
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
    """How a life ended.

    Attributes:
        words: Why, for a person.
        ready_s: How long it had been ready.
        hopeless: Whether another try would take as long and end the same way.
    """

    words: str
    ready_s: float = 0.0
    hopeless: bool = False


class EngineProcess:
    """Keeps one model served by one engine process until cancelled.

    Attributes:
        status: The present status; the same that `on_change` was last called with.
        log_path: Where the engine's output goes.
    """

    def __init__(
        self,
        engine: Command,
        launch: Launch,
        *,
        logs: Path,
        on_change: Callable[[EngineStatus], None],
        check: Callable[[], None] | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Nothing is started yet: that is `run`.

        Args:
            engine: What to start.
            launch: What it is to serve; an empty API key is replaced by a random one.
            logs: The directory of the log file; made when it is missing.
            on_change: Called with every new status, from the supervising task; must not block.
            check: Called in a thread before each start; what it raises keeps the engine from
                starting.
            environ: Where the engine's few variables are taken from.
        """
        self._launch = replace(launch, api_key=launch.api_key or secrets.token_urlsafe(24))
        self._argv = server_argv(engine, self._launch)
        self._environ = environment_of(self._launch, environ)
        self._on_change = on_change
        self._check = check
        self._log = _log.bind(model=launch.alias)
        safe_name = re.sub(r"[^\w.@-]", "_", launch.alias)[:100]
        self.log_path = logs / f"engine-{safe_name}.log"
        self.status = EngineStatus(
            state="loading",
            host=launch.host,
            port=0,
            api_key=self._launch.api_key,
            pid=None,
            detail="waiting to start",
            since_s=0.0,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Supervises until cancelled; by then the engine is gone, whatever it was doing."""
        self.status = replace(self.status, since_s=trio.current_time())
        task_status.started()
        failures = 0
        try:
            while True:
                end = await self._live()
                failures = 1 if end.ready_s >= STABLE_S else failures + 1
                if end.hopeless:
                    failures = max(failures, len(RETRY_S) + 1)
                await self._pause(failures, end.words)
        finally:
            self._become("stopped", "")

    async def _pause(self, failures: int, words: str) -> None:
        self._log.warning("engine_ended", why=words, failures=failures)
        rare = failures - len(RETRY_S) - 1
        if rare < 0:
            self._become("loading", f"starting again: {words}")
            await trio.sleep(RETRY_S[failures - 1])
        else:
            self._become("failed", words)
            await trio.sleep(RETRY_FAILED_S[min(rare, len(RETRY_FAILED_S) - 1)])

    async def _live(self) -> _End:
        """Starts the engine once and stays with it to its end."""
        self._become("loading", "starting")
        try:
            if self._check is not None:
                await trio.to_thread.run_sync(self._check)
            life = _Life(await self._spawn())
        except MeshError as exc:
            return _End(str(exc), hopeless=True)
        except OSError as exc:
            return _End(f"the engine cannot be started: {exc.strerror}")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hear, life, nursery.cancel_scope)
                await self._attend(life)
                nursery.cancel_scope.cancel()
        finally:
            is_cancelled = not life.over and life.end is None
            # At once, so that nobody sends more requests there.
            self._become("stopping" if is_cancelled else "loading", "ending the engine")
            with trio.CancelScope(shield=True):  # each wait inside has a deadline
                await _put_down(life)
        words = last_words(tuple(life.words), life.exit_code)
        end = life.end if life.end is not None else _End(words)
        ready_s = 0.0 if life.ready_since_s is None else trio.current_time() - life.ready_since_s
        return replace(end, ready_s=ready_s)

    async def _spawn(self) -> trio.Process:
        await trio.to_thread.run_sync(partial(self.log_path.parent.mkdir, 0o700, True, True))
        # A process group of its own: Ctrl-C in the terminal is for the node alone.
        options: dict[str, Any] = {"process_group": 0}
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        process = await trio.lowlevel.open_process(
            [*_LAUNCHER, str(self.log_path), "--", *self._argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environ,
            **options,
        )
        self._log.info("engine_started", launcher=process.pid, command=readable(self._argv))
        return process

    async def _hear(self, life: _Life, watcher: trio.CancelScope) -> None:
        """Takes in what the launcher says; its silence is the engine's end."""
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
                life.words.append(line.removeprefix("log "))

    async def _attend(self, life: _Life) -> None:
        life.end = await self._watch(life)

    async def _watch(self, life: _Life) -> _End:
        """Until the engine has to be put down; `_hear` cancels it when it ends by itself."""
        size_bytes = await trio.to_thread.run_sync(_size_of, self._launch.model_paths)
        load_s = LOAD_BASE_S + size_bytes / LOAD_BYTES_PER_S
        try:
            with trio.fail_after(load_s):
                await self._wait_listening(life, size_bytes)
                await self._wait_token(life)
        except trio.TooSlowError:
            return _End(f"it did not load within {load_s:.0f} s", hopeless=True)
        except EngineError as exc:
            await trio.sleep(PROBE_PAUSE_S)  # when it died under the question, its words are better
            return _End(str(exc))
        life.ready_since_s = trio.current_time()
        healthy = True
        while healthy:
            self._become("ready", "", life)
            self._log.info("engine_ready", pid=self.status.pid, port=life.port)
            await _wait_silent(life)
            self._log.warning("engine_silent", pid=self.status.pid)
            self._become("loading", "it does not answer at the moment", life)
            healthy = await _is_healthy(life, HANG_S)
        return _End("it stopped answering")

    async def _wait_listening(self, life: _Life, size_bytes: int) -> None:
        while not life.listening.is_set():
            self._become("loading", _progress(life, size_bytes), life)
            with trio.move_on_after(PROGRESS_INTERVAL_S):
                await life.listening.wait()

    async def _wait_token(self, life: _Life) -> None:
        while True:
            if await probe.ask_token(life.host, life.port, self._launch):
                return
            await trio.sleep(PROBE_PAUSE_S)

    def _become(self, state: State, detail: str, life: _Life | None = None) -> None:
        """Publishes a status if it differs from the present one."""
        engine = None if life is None else life.engine
        status = replace(
            self.status,
            state=state,
            detail=detail,
            host=life.host if life and life.host else self._launch.host,
            port=0 if life is None else life.port,
            pid=None if engine is None else engine.pid,
            since_s=self.status.since_s if state == self.status.state else trio.current_time(),
        )
        if status != self.status:
            self.status = status
            self._on_change(status)


async def _wait_silent(life: _Life) -> None:
    """Return when the engine has not answered for some seconds."""
    healthy = True
    while healthy:
        await trio.sleep(HEALTH_INTERVAL_S)
        for patience_s in HEALTH_PATIENCE_S:
            healthy = await _is_healthy(life, patience_s)
            if healthy:
                break


async def _is_healthy(life: _Life, patience_s: float) -> bool:
    """Whether it says within this time that it is."""
    with trio.move_on_after(patience_s):
        while True:
            if await probe.ask_health(life.host, life.port):
                return True
            await trio.sleep(PROBE_PAUSE_S)
    return False


async def _put_down(life: _Life) -> None:
    """Ends launcher and engine: politely, then by closing the pipe, then by force."""
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
    except OSError:  # nobody can say
        return True


def _size_of(paths: Iterable[PurePath]) -> int:
    """The bytes to load; files that are not there are the engine's to complain about."""
    return sum(Path(path).stat().st_size for path in paths if Path(path).exists())


def _progress(life: _Life, size_bytes: int) -> str:
    """How much of the model is in memory, as far as the system can tell."""
    try:
        held_bytes = life.engine.memory_info().rss if life.engine else 0
    except _UNKNOWN:
        held_bytes = 0
    tenths = min(held_bytes, size_bytes) * 10 // max(size_bytes, 1)
    return f"loading {size_bytes / 1e6:,.0f} MB, {tenths * 10} % in memory"

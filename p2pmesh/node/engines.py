"""This node's engines, by the part that each runs.

They outlive the mesh that they were started for: a node that changes its mesh goes on with the
processes that it has. What should run is decided elsewhere (`reconciler.py`); here it is started,
drained and stopped, and requests in flight are counted where they are answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import structlog
import trio

from p2pmesh.engine.find import Engine
from p2pmesh.engine.speed import read_speed
from p2pmesh.engine.supervisor import RETRY_FAILED_S, EngineKind, EngineStatus, Supervisor
from p2pmesh.errors import EngineError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import PartId, Shard, StageRange
from p2pmesh.state.registers import Served, ServeState

SPEED_INTERVAL_S = 60.0
SPEED_BAND_PERCENT = 25  # a speed is told anew when it leaves this band: it goes to the whole mesh
DRAIN_S = 30.0  # a running answer gets this long before its engine is stopped

Beside = Callable[[], Awaitable[None]]

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Running:
    process: Supervisor
    kind: EngineKind
    scope: trio.CancelScope
    beside: Beside | None = None
    stages: tuple[StageRange, ...] = ()
    shard: Shard | None = None
    draining: bool = False
    resting: bool = False
    token_us: int = 0

    @property
    def state(self) -> ServeState:
        state = self.process.status.state
        return "stopping" if self.draining or state == "stopped" else state

    def served(self, part: PartId) -> Served:
        """Return what the mesh is told of it."""
        return Served(
            digest=part.digest,
            name=part.name,
            state=self.state,
            detail=self.process.status.detail,
            stages=self.stages,
            shard=self.shard,
            token_us=self.token_us,
        )


class EngineManager:
    """The engines of one node.

    Args:
        engine: What runs models.
        logs: Where engines log.

    Attributes:
        engine: What runs models.
        failures: Why a part of a model failed here last, until one of it is ready here.
    """

    def __init__(self, engine: Engine, *, logs: Path) -> None:
        self.engine = engine
        self.failures: dict[ModelDigest, str] = {}
        self._resting: dict[ModelDigest, Served] = {}
        self._rests: Counter[ModelDigest] = Counter()
        self._logs = logs
        self._running: dict[PartId, _Running] = {}
        self._in_flight: Counter[PartId] = Counter()
        self._answered: set[PartId] = set()
        self._resident: dict[int, int] = {}
        self._idle = trio.lowlevel.ParkingLot()
        self._watchers: list[Callable[[], None]] = []
        self._nursery: trio.Nursery | None = None
        self._stopping = trio.CancelScope()
        self._stopped = trio.Event()
        self._stopped.set()

    # --- what runs ------------------------------------------------------------------------------

    def states(self) -> Mapping[PartId, ServeState]:
        """The state of each process; one holds its memory until it is no longer named here."""
        return {part: one.state for part, one in self._running.items()}

    def served(self) -> list[Served]:
        """Return the `serving` body: the parts that this node runs, or says that they failed."""
        running = [one.served(part) for part, one in self._running.items() if not one.resting]
        tried = {one.digest for one in running}
        return running + [one for one in self._resting.values() if one.digest not in tried]

    def status(self, part: PartId) -> EngineStatus | None:
        """The engine of a part, while it takes requests; None otherwise."""
        running = self._running.get(part)
        return running.process.status if running and running.state == "ready" else None

    def api_key(self, part: PartId) -> str | None:
        """Return the API key of a part's engine, also while it is drained; None without one.

        A request that began before goes on over a connection that is open already.
        """
        running = self._running.get(part)
        return running.process.status.api_key if running else None

    def pid(self, part: PartId) -> int | None:
        """Return the process id of a part's engine while there is one."""
        running = self._running.get(part)
        return running.process.status.pid if running else None

    def files(self) -> set[Path]:
        """Return the files that engines read."""
        kinds = [one.kind for one in list(self._running.values())]
        return {Path(file) for kind in kinds for file in kind.access.files}

    def log_path(self, part: PartId) -> Path | None:
        """Return where a part's engine logs; None while none runs."""
        running = self._running.get(part)
        return running.process.log_path if running else None

    def used_bytes(self) -> int:
        """Main memory that the engines hold, as last known while the system cannot be asked."""
        pids = [pid for one in self._running.values() if (pid := one.process.status.pid)]
        self._resident = {pid: _resident_bytes(pid, self._resident.get(pid, 0)) for pid in pids}
        return sum(self._resident.values())

    @contextmanager
    def watched(self, on_change: Callable[[], None]) -> Iterator[None]:
        """Call `on_change` whenever an engine's status changes, until the block ends."""
        self._watchers.append(on_change)
        try:
            yield
        finally:
            self._watchers.remove(on_change)

    # --- requests -------------------------------------------------------------------------------

    async def connect(self, part: PartId) -> trio.SocketStream:
        """Open a connection to the engine of a part.

        Raises:
            EngineError: It takes no requests any more.
            OSError: It does not accept.
        """
        status = self.status(part)
        if status is None:
            raise EngineError("that model is not running here any more")
        return await trio.open_tcp_stream(status.host, status.port)

    def begin(self, part: PartId) -> None:
        """A request is given to the engine of a part; `end` follows."""
        self._in_flight[part] += 1

    def end(self, part: PartId) -> None:
        """The request is over."""
        self._in_flight[part] -= 1
        self._answered.add(part)
        if not self._in_flight[part]:
            del self._in_flight[part]
            self._idle.unpark_all()

    # --- processes ------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what is started, until cancelled or stopped; then all engines are gone."""
        try:
            with self._stopping:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    self._stopped = trio.Event()
                    task_status.started()
                    await self._keep_speeds()
        finally:
            self._nursery = None
            self._stopped.set()

    async def stop(self) -> None:
        """End all engines; returns when they are gone."""
        self._stopping.cancel()
        await self._stopped.wait()

    def start(
        self,
        part: PartId,
        kind: EngineKind,
        *,
        beside: Beside | None = None,
        stages: tuple[StageRange, ...] = (),
        shard: Shard | None = None,
    ) -> None:
        """Start the engine of a part, which must not run.

        Args:
            part: What it runs.
            kind: What is started.
            beside: Runs for as long as the engine does, which ends when this returns.
            stages: Of a stage, all stages of its pipeline.
            shard: Of a shard, what it holds.
        """
        assert part not in self._running, f"{part} runs already"
        if self._nursery is None:
            return  # the node is stopping
        process = Supervisor(kind, logs=self._logs, on_change=partial(self._note, part))
        log.info("part_starting", part=part, engine=kind.name)
        self._running[part] = _Running(process, kind, trio.CancelScope(), beside, stages, shard)
        self._nursery.start_soon(self._serve, part, self._running[part])

    def say(self, part: PartId, detail: str) -> None:
        """Tell what is being prepared for a part whose engine does not run yet."""
        if running := self._running.get(part):
            running.process.say(detail)

    def drain(self, part: PartId) -> None:
        """Give an engine no more requests, and stop it when those that it has are answered."""
        running = self._running[part]
        if not running.draining and self._nursery is not None:
            running.draining = True
            self._nursery.start_soon(self._drain, part, running)
            self._tell()

    def cut(self, part: PartId) -> None:
        """Stop an engine at once, whatever it is asked."""
        self._running[part].scope.cancel()

    def rest(self, part: PartId) -> None:
        """Stop a part that failed, and go on saying so for a while, each time for longer.

        As long as it is said, no plan has its model here that can have it elsewhere.
        """
        running = self._running[part]
        if running.state == "failed" and self._nursery is not None:
            self._resting[part.digest] = row = running.served(part)
            running.resting = True
            pause_s = RETRY_FAILED_S[min(self._rests[part.digest], len(RETRY_FAILED_S) - 1)]
            self._rests[part.digest] += 1
            self._nursery.start_soon(self._forget, row, pause_s)
        self.drain(part)

    async def _forget(self, row: Served, pause_s: float) -> None:
        await trio.sleep(pause_s)
        if self._resting.get(row.digest) is row:
            del self._resting[row.digest]
            self._tell()

    async def _serve(self, part: PartId, running: _Running) -> None:
        try:
            with running.scope:
                if running.beside is None:
                    await running.process.run()
                else:
                    await _run_both(running.process.run, running.beside)
        except BaseException:
            self._nursery = None  # all of them end: whoever hears of it starts none anew
            raise
        finally:
            del self._running[part]
            self._tell()

    async def _drain(self, part: PartId, running: _Running) -> None:
        with trio.move_on_after(DRAIN_S):
            while self._in_flight[part]:
                await self._idle.park()
        running.scope.cancel()

    async def _keep_speeds(self) -> None:
        """Look how fast parts are that have answered, until cancelled; tell only of a change."""
        while True:
            await trio.sleep(SPEED_INTERVAL_S)
            answered, self._answered = self._answered, set()
            changed = False
            for part in answered:
                if running := self._running.get(part):  # others may end meanwhile
                    changed |= await self._look_at_speed(running)
            if changed:
                self._tell()

    async def _look_at_speed(self, running: _Running) -> bool:
        """Return whether an engine is much faster or slower than was told."""
        path = running.process.log_path
        try:
            speed = await trio.to_thread.run_sync(read_speed, path, abandon_on_cancel=True)
        except OSError as exc:
            log.warning("engine_log_unreadable", path=str(path), reason=str(exc))
            return False
        if speed is None:
            return False
        token_us = round(1_000_000 / speed)
        if abs(token_us - running.token_us) * 100 <= running.token_us * SPEED_BAND_PERCENT:
            return False
        running.token_us = token_us
        return True

    def _note(self, part: PartId, status: EngineStatus) -> None:
        if status.state == "failed":
            self.failures[part.digest] = status.detail
        elif status.state == "ready":
            self.failures.pop(part.digest, None)
            self._resting.pop(part.digest, None)
            del self._rests[part.digest]
        self._tell()

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher()


async def _run_both(one: Beside, other: Beside) -> None:
    """Run both until one of them returns."""

    async def run(this: Beside) -> None:
        await this()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, one)
        nursery.start_soon(run, other)


def compute_threads(cores: int | None) -> int:
    """How many threads compute: one core is left to the node and to what else runs here.

    llama.cpp's threads wait for each other after every step by spinning. With as many as cores, a
    single busy program makes each wait a time slice long: measured on two cores, 0.8 to 2 s for a
    request that takes 4 ms with one thread less.

    Args:
        cores: Physical ones; None when the system does not say.
    """
    return max((cores or 2) - 1, 1)


def _resident_bytes(pid: int, last: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:  # it ended a moment ago
        return 0
    except (psutil.Error, OSError):  # no descriptor is left to read /proc with
        return last

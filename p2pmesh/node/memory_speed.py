"""How fast this machine reads its main memory: measured once, remembered in the node's home.

A token costs about the time to read a model's weights, so plans and predictions hang on this. What
is published is coarse (`placement.resources.coarse_speed`): two equal laptops say the same, and
noise changes no plan.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import structlog
import trio

from p2pmesh.engine.find import Engine
from p2pmesh.errors import LocalError
from p2pmesh.home import read_json, write_atomic
from p2pmesh.node.engines import compute_threads
from p2pmesh.placement.resources import coarse_speed

METHOD = 1  # goes up with every change of `measure`, so that it is measured anew
MIB = 2**20
BUFFER_BYTES = 256 * MIB  # several times the caches of a laptop
FREE_BYTES_MIN = 8 * BUFFER_BYTES  # with less, measuring would push other programs out
RUNS = 5
RUNS_S_MAX = 0.4  # with the time to fill the buffer less than a second on a slow machine
THREADS_MAX = 16
BUSY_PERCENT = 75.0  # of all cores: then programs compete for the memory as well
LOOK_S = 0.1
RETRY_S = 10.0

log = structlog.get_logger(__name__)


class MemorySpeed:
    """The speed of this machine's memory, as far as it is known.

    Args:
        path: Where it is remembered.
        engine: What reads weights. Where it has devices with a memory of their own the speed of
            main memory says nothing about it, so the speed stays unknown.
        measure: `measure_mib_per_s`.
        is_busy: `is_machine_busy`; while it is, nothing is measured.

    Attributes:
        mib_per_s: To publish; 0 while it is not known.
    """

    def __init__(
        self,
        path: Path,
        engine: Engine,
        *,
        measure: Callable[[], int],
        is_busy: Callable[[], bool],
    ) -> None:
        self._path = path
        self._measure, self._is_busy = measure, is_busy
        self._counts = all(device.unified for device in engine.devices)
        self.mib_per_s = coarse_speed(recall(path)) if self._counts else 0

    async def run(self) -> None:
        """Measure unless that was done before; returns when it is known, or cannot be."""
        if not self._counts or self.mib_per_s:
            return
        while True:
            if not await trio.to_thread.run_sync(self._is_busy, abandon_on_cancel=True):
                break
            await trio.sleep(RETRY_S)
        measured = await trio.to_thread.run_sync(self._measure, abandon_on_cancel=True)
        self.mib_per_s = coarse_speed(measured)
        log.info("memory_measured", mib_per_s=measured, published=self.mib_per_s)
        if measured:
            try:
                await trio.to_thread.run_sync(remember, self._path, measured)
            except LocalError as exc:  # it is measured again at the next start
                log.warning("memory_speed_not_saved", reason=str(exc))


def recall(path: Path) -> int:
    """Return what was measured on this very machine in MiB/s; 0 when nothing was."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as exc:
        log.warning("memory_speed_unreadable", reason=str(exc))
        return 0
    match found:
        case {"machine": machine, "mib_per_s": int(speed)} if machine == _machine() and speed > 0:
            return speed
        case _:
            return 0


def remember(path: Path, mib_per_s: int) -> None:
    """Write down what was measured, and on what machine.

    Raises:
        LocalError: The file cannot be written.
    """
    write_atomic(path, json.dumps({"machine": _machine(), "mib_per_s": mib_per_s}).encode())


def measure_mib_per_s() -> int:
    """Read a large buffer with as many threads as an engine computes with; the best run counts.

    Returns:
        MiB/s; 0 when too little memory is free.
    """
    import numpy as np

    if psutil.virtual_memory().available < FREE_BYTES_MIN:
        return 0
    threads = min(compute_threads(psutil.cpu_count(logical=False)), THREADS_MAX)
    # Written, because pages that never were are all the same page of zeros.
    parts = np.array_split(np.ones(BUFFER_BYTES // 8, dtype=np.int64), threads)
    best_ns, deadline_s = None, time.monotonic() + RUNS_S_MAX
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(RUNS):
            started_ns = time.perf_counter_ns()
            list(pool.map(np.max, parts))  # does not hold the interpreter's lock
            spent_ns = max(time.perf_counter_ns() - started_ns, 1)
            best_ns = spent_ns if best_ns is None else min(best_ns, spent_ns)
            if time.monotonic() > deadline_s:
                break
    assert best_ns is not None, "there is a first run"
    return BUFFER_BYTES * 10**9 // (best_ns * MIB)


def is_machine_busy() -> bool:
    """Whether programs use most of this machine's cores now; blocks for a moment."""
    return psutil.cpu_percent(LOOK_S) > BUSY_PERCENT


def _machine() -> dict[str, Any]:
    """Return what the speed depends on, as far as the system tells."""
    return {
        "method": METHOD,
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or 0,
        # Modules of memory are no smaller; what the system keeps for itself varies.
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }


def _processor() -> str:
    """Return what the processor is called; Linux says it in a file only."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())

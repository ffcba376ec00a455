from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import structlog
import trio
from trio.testing import MockClock

from p2pmesh.engine.devices import Device
from p2pmesh.node import memory_speed
from p2pmesh.node.memory_speed import (
    FREE_BYTES_MIN,
    RETRY_S,
    MemorySpeed,
    is_machine_busy,
    measure_mib_per_s,
    recall,
    remember,
)
from tests.node.isolated_node import ENGINE, GIB

GPU = Device(
    id="CUDA0", backend="CUDA", description="A GPU", total_bytes=24 * GIB, free_bytes=20 * GIB
)


@dataclass
class Machine:
    """Counts how often it was measured."""

    mib_per_s: int = 28_000
    busy: int = 0
    measured: int = 0

    def measure(self) -> int:
        self.measured += 1
        return self.mib_per_s

    def is_busy(self) -> bool:
        self.busy -= 1
        return self.busy >= 0

    def speed(self, path: Path, *devices: Device) -> MemorySpeed:
        engine = replace(ENGINE, devices=devices)
        return MemorySpeed(path, engine, measure=self.measure, is_busy=self.is_busy)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory-speed.json"


async def test_the_speed_is_measured_once_and_remembered(path: Path) -> None:
    machine = Machine()
    speed = machine.speed(path)
    assert speed.mib_per_s == 0
    await speed.run()
    assert speed.mib_per_s == 24_576
    again = machine.speed(path)
    assert again.mib_per_s == 24_576
    await again.run()
    assert machine.measured == 1


async def test_another_machine_is_measured_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Machine().speed(path).run()
    monkeypatch.setattr(memory_speed, "_processor", lambda: "another one")
    moved = Machine(mib_per_s=100_000)
    await moved.speed(path).run()
    assert (moved.measured, recall(path)) == (1, 100_000)


async def test_a_machine_that_works_hard_is_measured_later(
    path: Path, autojump_clock: MockClock
) -> None:
    machine = Machine(busy=2)
    started = trio.current_time()
    await machine.speed(path).run()
    assert machine.measured == 1
    assert trio.current_time() - started >= 2 * RETRY_S


async def test_the_memory_of_a_gpu_is_unknown(path: Path) -> None:
    machine = Machine()
    speed = machine.speed(path, GPU)
    await speed.run()
    assert (speed.mib_per_s, machine.measured) == (0, 0)
    shared = machine.speed(path, replace(GPU, backend="Metal", id="Metal0"))
    await shared.run()
    assert machine.measured == 1


async def test_what_cannot_be_measured_now_is_tried_at_the_next_start(path: Path) -> None:
    speed = Machine(mib_per_s=0).speed(path)
    await speed.run()
    assert speed.mib_per_s == 0
    assert recall(path) == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": {}, "mib_per_s": "fast"}', "\xff"])
def test_a_damaged_memory_counts_for_nothing(path: Path, text: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    with structlog.testing.capture_logs():
        assert recall(path) == 0


def test_what_it_depends_on_is_written_beside_it(path: Path) -> None:
    remember(path, 28_000)
    written = json.loads(path.read_text())
    assert written["mib_per_s"] == 28_000
    assert {"processor", "cores", "memory_gib"} <= set(written["machine"])


async def test_a_speed_that_cannot_be_saved_is_used_all_the_same(tmp_path: Path) -> None:
    speed = Machine().speed(tmp_path / "missing" / "memory-speed.json")
    with structlog.testing.capture_logs() as logs:
        await speed.run()
    assert speed.mib_per_s == 24_576
    assert logs[-1]["event"] == "memory_speed_not_saved"


def test_this_machine_is_measured() -> None:
    """What any machine of the last twenty years reads, and none of the next ten."""
    assert 256 < measure_mib_per_s() < 2**22
    assert is_machine_busy() in (True, False)


def test_nothing_is_measured_with_little_memory_free(monkeypatch: pytest.MonkeyPatch) -> None:
    here = psutil.virtual_memory()
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: here._replace(available=FREE_BYTES_MIN - 1)
    )
    assert measure_mib_per_s() == 0

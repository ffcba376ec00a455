from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import psutil
import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.engine.server import LlamaServer
from p2pmesh.engine.supervisor import RETRY_FAILED_S
from p2pmesh.models.parts import PartId, StageName
from p2pmesh.node import engines
from p2pmesh.node.engines import DRAIN_S, compute_threads
from tests.node.isolated_node import Parts, serving
from tests.state.builders import digest

DEMO = PartId(digest(0))


async def test_memory_is_that_of_the_processes_that_live(parts: Parts) -> None:
    async with serving(parts):
        assert parts.manager.used_bytes() == 0
        parts.engine(0).become("ready", pid=os.getpid())
        resident = psutil.Process().memory_info().rss
        assert parts.manager.used_bytes() == pytest.approx(resident, rel=0.2)
        parts.engine(0).become("ready", pid=2**30)  # it ended a moment ago
        assert parts.manager.used_bytes() == 0


async def test_memory_is_as_last_known_while_the_system_cannot_be_asked(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> psutil.Process:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with serving(parts):
        parts.engine(0).become("ready", pid=os.getpid())
        before = parts.manager.used_bytes()
        assert before > 0
        monkeypatch.setattr("psutil.Process", refuse)
        assert parts.manager.used_bytes() == before


async def test_an_engine_is_drained_until_its_last_request_is_over(
    autojump_clock: MockClock, parts: Parts
) -> None:
    async with serving(parts):
        engine = parts.engine(0)
        engine.become("ready", port=81)
        for _ in range(2):
            parts.manager.begin(DEMO)
        parts.manager.drain(DEMO)
        assert parts.manager.states() == {DEMO: "stopping"}
        assert parts.manager.status(DEMO) is None
        parts.manager.end(DEMO)
        await trio.sleep(DRAIN_S / 2)
        assert not engine.ended
        parts.manager.end(DEMO)
        await wait_all_tasks_blocked()
        assert engine.ended


async def test_who_watches_hears_of_each_change_until_it_leaves(parts: Parts) -> None:
    heard: list[str] = []
    async with serving(parts):
        with parts.manager.watched(lambda: heard.append(parts.manager.states()[DEMO])):
            parts.engine(0).become("ready", port=81)
            parts.engine(0).become("failed", "out of memory")
        parts.engine(0).become("ready", port=81)
        assert heard == ["ready", "failed"]


async def test_why_a_model_failed_is_known_until_a_part_of_it_is_ready_here(parts: Parts) -> None:
    async with serving(parts):
        parts.engine(0).become("failed", "out of memory")
        assert parts.manager.failures == {DEMO.digest: "out of memory"}
        parts.engine(0).become("loading", "starting")
        assert parts.manager.failures == {DEMO.digest: "out of memory"}
        parts.engine(0).become("ready", port=81)
        assert parts.manager.failures == {}


@asynccontextmanager
async def managed(parts: Parts) -> AsyncIterator[Callable[..., None]]:
    """The engines alone, without a plan; gives a function that starts a part, or the model."""
    kind = cast("LlamaServer", SimpleNamespace(name="x", launch=SimpleNamespace(alias="model-0")))
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.manager.run)
        yield lambda part=DEMO: parts.manager.start(part, kind)
        nursery.cancel_scope.cancel()


async def test_what_failed_and_rests_is_said_for_longer_each_time(
    parts: Parts, autojump_clock: MockClock
) -> None:
    rows: list[list[tuple[str, str]]] = []

    def said() -> list[tuple[str, str]]:
        return [(one.state, one.detail) for one in parts.manager.served()]

    failed = [("failed", "out of memory")]
    async with managed(parts) as start:
        for rest_s in RETRY_FAILED_S[:3]:
            start()
            await wait_all_tasks_blocked()
            parts.engines[-1].become("failed", "out of memory")
            rows.clear()
            with parts.manager.watched(lambda: rows.append(said())):
                parts.manager.rest(DEMO)
                await wait_all_tasks_blocked()
            assert parts.manager.states() == {}, "it can be started again"
            assert all(one == failed for one in rows), "never anything else meanwhile"
            await trio.sleep(rest_s - 1)
            assert said() == failed
            await trio.sleep(2)
            assert said() == []


async def test_what_rests_fails_no_more_when_it_is_tried(parts: Parts) -> None:
    stage = PartId(DEMO.digest, str(StageName("0" * 16, 1)))
    async with managed(parts) as start:
        start(stage)
        await wait_all_tasks_blocked()
        parts.engines[-1].become("failed", "out of memory")
        parts.manager.rest(stage)
        await wait_all_tasks_blocked()
        start()
        await wait_all_tasks_blocked()
        assert [one.state for one in parts.manager.served()] == ["loading"]
        parts.engines[-1].become("ready", port=81)
        assert parts.manager.failures == {}, "the stage of it that failed as well"
        parts.manager.drain(DEMO)
        await wait_all_tasks_blocked()
        assert parts.manager.served() == []


@pytest.mark.parametrize(("cores", "threads"), [(None, 1), (1, 1), (2, 1), (8, 7)])
def test_one_core_is_left_to_others(cores: int | None, threads: int) -> None:
    assert compute_threads(cores) == threads


def spoken(ms: int) -> str:
    """The line of an answer whose tokens took this long each."""
    return f"eval time = {100 * ms}.00 ms /  100 tokens\n"


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "SPEED_INTERVAL_S", 0.01)


@pytest.mark.usefixtures("looks_often")
async def test_speeds_are_told_when_they_change_much(parts: Parts) -> None:
    async with serving(parts):
        engine, manager = parts.engine(0), parts.manager
        engine.become("ready", port=81)
        told: list[int] = []
        with manager.watched(lambda: told.append(manager.served()[0].token_us)):
            for ms in (40, 44, 80):  # the second one is nearly the first
                engine.log_path.write_text(spoken(ms))
                manager.begin(DEMO)
                manager.end(DEMO)
                await trio.sleep(0.3)
            engine.log_path.write_text(spoken(10))
            await trio.sleep(0.1)  # nothing was answered, so nobody looks
        assert told == [40_000, 80_000]


@pytest.mark.usefixtures("looks_often")
async def test_a_log_that_cannot_be_read_tells_no_speed(parts: Parts) -> None:
    async with serving(parts):
        parts.engine(0).become("ready", port=81)
        parts.engine(0).log_path.mkdir()
        with structlog.testing.capture_logs() as logs:
            for part in (DEMO, PartId(digest(3))):  # of the other one nothing runs any more
                parts.manager.begin(part)
                parts.manager.end(part)
            with trio.fail_after(5):
                while not logs:  # noqa: ASYNC110 - nothing announces it
                    await trio.sleep(0.01)
        assert [one["event"] for one in logs] == ["engine_log_unreadable"]
        assert parts.manager.served()[0].token_us == 0

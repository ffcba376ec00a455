"""Supervision, of a small real program that is no llama-server."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import psutil
import pytest
import trio
from structlog.testing import capture_logs

from p2pmesh.engine import supervisor as supervisor_module
from p2pmesh.engine.supervisor import Supervisor
from p2pmesh.errors import ModelError
from tests.engine.listener import Echo, Listener
from tests.engine.samples import lives
from tests.engine.supervised import is_ready, supervised


async def test_it_runs_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with supervised(tmp_path, Listener()) as watched:
        status = await watched.wait(is_ready)
        assert status.pid is not None
        assert lives(status.pid)
        stream = await trio.open_tcp_stream(status.host, status.port)
        await stream.aclose()
        launcher = psutil.Process(status.pid).parent()
        assert launcher is not None
        assert launcher.ppid() == os.getpid()
    assert watched.states() == ["loading", "ready", "stopping", "stopped"]
    assert not lives(status.pid)
    assert not launcher.is_running()
    assert (watched.engine.status.host, watched.engine.status.port) == ("", 0)
    assert watched.engine.log_path == tmp_path / "engine-a_b.log"
    assert watched.engine.log_path.read_text().startswith("  endpoint       : 127.0.0.1:")


async def test_a_killed_engine_comes_back(tmp_path: Path) -> None:
    with capture_logs() as events:
        await kill_and_wait(tmp_path)
    assert [(event["event"], event["model"]) for event in events] == [
        ("engine_started", "m"),
        ("engine_ready", "m"),
        ("engine_ended", "m"),
        ("engine_started", "m"),
        ("engine_ready", "m"),
    ]


async def kill_and_wait(tmp_path: Path) -> None:
    async with supervised(tmp_path, Listener()) as watched:
        first = await watched.wait(is_ready)
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        again = await watched.wait(lambda s: "starting again" in s.detail)
        assert again.detail == "starting again: it was killed, perhaps for want of memory"
        assert again.state == "loading"
        assert again.port == 0
        second = await watched.wait(is_ready)
        assert second.pid != first.pid
        assert second.api_key == first.api_key == "key"


async def test_a_killed_launcher_takes_its_engine_along(tmp_path: Path) -> None:
    async with supervised(tmp_path, Listener()) as watched:
        first = await watched.wait(is_ready)
        assert first.pid is not None
        launcher = psutil.Process(first.pid).parent()
        assert launcher is not None
        launcher.kill()
        second = await watched.wait(lambda s: is_ready(s) and s.pid != first.pid)
        assert not lives(first.pid)
        assert second.state == "ready"


@pytest.mark.parametrize("whom", ["engine", "launcher"])
async def test_what_is_stopped_is_ended_all_the_same(
    tmp_path: Path, whom: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "TERMINATE_S", 0.5)
    monkeypatch.setattr(supervisor_module, "KILL_S", 0.5)
    async with supervised(tmp_path, Listener()) as watched:
        status = await watched.wait(is_ready)
        engine = psutil.Process(status.pid)
        launcher = engine.parent()
        assert launcher is not None
        (engine if whom == "engine" else launcher).suspend()
    assert not lives(engine.pid)
    assert not launcher.is_running()


async def test_an_engine_that_hangs_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "HEALTH_INTERVAL_S", 0.05)
    monkeypatch.setattr(supervisor_module, "HEALTH_PATIENCE_S", (0.3, 0.3))
    monkeypatch.setattr(supervisor_module, "HANG_S", 0.3)
    monkeypatch.setattr(supervisor_module, "TERMINATE_S", 0.2)
    async with supervised(tmp_path, Echo()) as watched:
        first = await watched.wait(is_ready)
        psutil.Process(first.pid).suspend()
        silent = await watched.wait(lambda s: s.state == "loading")
        assert silent.detail == "it does not answer at the moment"
        await watched.wait(lambda s: s.detail == "ending the engine")
        await watched.wait(lambda s: s.detail == "starting again: it stopped answering")
        second = await watched.wait(is_ready)
        assert second.pid != first.pid
        assert first.pid is not None
        assert not lives(first.pid)


async def test_an_engine_that_answers_again_is_ready_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "HEALTH_INTERVAL_S", 0.05)
    monkeypatch.setattr(supervisor_module, "HEALTH_PATIENCE_S", (0.3, 0.3))
    async with supervised(tmp_path, Echo()) as watched:
        first = await watched.wait(is_ready)
        engine = psutil.Process(first.pid)
        engine.suspend()
        silent = await watched.wait(lambda s: s.state == "loading")
        assert (silent.pid, silent.detail) == (first.pid, "it does not answer at the moment")
        engine.resume()
        again = await watched.wait(is_ready)
        assert (again.pid, again.port) == (first.pid, first.port)


async def test_an_engine_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "RETRY_S", ())
    async with supervised(tmp_path, Listener(argv=("/nowhere/listener",))) as watched:
        status = await watched.wait(lambda s: s.state == "failed")
    assert status.detail == (
        "error: cannot start /nowhere/listener: No such file or directory "
        "(it ended with exit code 127)"
    )


async def test_a_load_has_a_deadline_and_is_not_tried_at_once_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    monkeypatch.setattr(supervisor_module, "TERMINATE_S", 0.2)
    monkeypatch.setattr(supervisor_module, "PROGRESS_INTERVAL_S", 0.05)
    async with supervised(tmp_path, Listener(deaf, load_s=1.0)) as watched:
        loading = await watched.wait(lambda s: s.pid is not None)
        status = await watched.wait(lambda s: s.state == "failed")
        assert status.detail == "it did not load within 1 s"
        assert loading.pid is not None
        assert not lives(loading.pid)
        assert [s.detail for s in watched.history].count("starting") == 1


async def test_what_is_not_fit_to_start_is_not_started(tmp_path: Path) -> None:
    class Unfit(Listener):
        def prepare(self) -> float:
            raise ModelError("the file is damaged")

    async with supervised(tmp_path, Unfit()) as watched:
        status = await watched.wait(lambda s: s.state == "failed")
    assert status.detail == "the file is damaged"
    assert [s.detail for s in watched.history].count("starting") == 1
    assert not watched.engine.log_path.exists()


class Starved:
    """Stands in for a question to the system that needs a descriptor when none is left."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, *_: object) -> None:
        self.asked += 1
        raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("question", ["__init__", "is_running"])
async def test_an_engine_runs_and_ends_without_a_descriptor_to_look_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    starved = Starved()
    monkeypatch.setattr(supervisor_module, "KILL_S", 0.2)
    with monkeypatch.context() as starving:
        starving.setattr(psutil.Process, question, starved)
        async with supervised(tmp_path, Listener()) as watched:
            status = await watched.wait(is_ready)
    assert starved.asked > 0
    assert watched.states() == ["loading", "ready", "stopping", "stopped"]
    assert (status.pid is None) == (question == "__init__")
    assert status.pid is None or not lives(status.pid)


async def test_an_engine_loads_without_a_descriptor_to_see_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starved = Starved()
    monkeypatch.setattr(psutil.Process, "memory_info", starved)
    monkeypatch.setattr(supervisor_module, "PROGRESS_INTERVAL_S", 0.05)
    async with supervised(tmp_path, Listener("import time; time.sleep(600)")) as watched:
        status = await watched.wait(lambda s: s.pid is not None)
        assert starved.asked > 0
        assert (status.state, status.detail) == ("loading", "starting, 0 bytes")


async def test_pauses_grow_and_a_steady_engine_wins_its_tries_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter([0.0, 0.0, 0.0, 0.0, 0.0, 31.0, 0.0])
    pauses: list[float] = []
    engine = Supervisor(Listener(), logs=tmp_path, on_change=lambda _: None)

    async def live() -> supervisor_module._End:
        try:
            return supervisor_module._End("words", next(ends))
        except StopIteration:
            scope.cancel()
            await trio.lowlevel.checkpoint()
            raise AssertionError from None

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(engine, "_live", live)
    monkeypatch.setattr(trio, "sleep", sleep)
    with trio.CancelScope() as scope:
        await engine.run()
    assert pauses == [0.5, 1.0, 2.0, 60.0, 120.0, 0.5, 1.0]
    assert engine.status.state == "stopped"

"""Whole nodes inside the test's own process, on loopback, each with a home of its own."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import structlog
import trio

from p2pmesh.config import Address, Settings
from p2pmesh.control import find_node
from p2pmesh.engine.find import Engine
from p2pmesh.errors import ConfigError, LocalError
from p2pmesh.home import Home
from p2pmesh.node import joining, presence
from p2pmesh.node import run as module
from p2pmesh.node.guest import Guest
from p2pmesh.node.run import Node, run
from p2pmesh.node.status import NodeStatus
from p2pmesh.placement.resources import Memory
from tests.engine.samples import EMBEDDED
from tests.models.builders import tiny_gguf

DEADLINE_S = 30.0
GIB = 2**30
NO_ROOM = 2**20  # for any model, so that no engine starts
FREE = Address("127.0.0.1", 0)
ENGINE = Engine(kind="embedded", command=EMBEDDED, source="wheel", version="1")


@dataclass
class Ui:
    """What a start said, in order."""

    said: list[tuple[str, Any]] = field(default_factory=list)
    status: NodeStatus | None = None
    listened: trio.Event = field(default_factory=trio.Event)
    is_ready: trio.Event = field(default_factory=trio.Event)

    def hashing(self, name: str, done_bytes: int, total_bytes: int) -> None:
        self.said.append(("hashing", name))

    def note(self, sentence: str) -> None:
        self.said.append(("note", sentence))

    def listening(self, status: NodeStatus) -> None:
        self.said.append(("listening", status.ready_line()))
        self.status = status
        self.listened.set()

    def ready(self, status: NodeStatus | Guest) -> None:
        self.said.append(("ready", status.ready_line()))
        self.is_ready.set()

    def calls(self) -> list[str]:
        """Without immediate repetition."""
        names = [name for name, _ in self.said]
        return [n for i, n in enumerate(names) if i == 0 or n != names[i - 1]]

    def notes(self) -> list[str]:
        return [what for name, what in self.said if name == "note"]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def settings(home: Home) -> Settings:
    return Settings(
        home=home.root,
        name="test-node",
        api=FREE,
        console=FREE,
        peer=FREE,
        memory=NO_ROOM,
        given=frozenset({"api", "console", "peer"}),
    )


@pytest.fixture
def found_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking an engine what it can do takes longer than all the rest of a start."""
    monkeypatch.setattr(module, "find_engine", lambda *_: ENGINE)


@asynccontextmanager
async def running(settings: Settings, ui: Ui | None = None) -> AsyncIterator[tuple[Ui, NodeStatus]]:
    """A node that listens; it has ended when the block is left, by itself or in order."""
    ui = ui or Ui()
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, settings, ui)
            await ui.listened.wait()
            assert ui.status is not None
            yield ui, ui.status
            ui.status.stop()


def ask(api: str) -> str:
    body = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://{api}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def is_open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def taken() -> socket.socket:
    """A port that another program listens on."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


# The whole life of one


async def test_a_node_starts_answers_and_stops_by_its_console(
    settings: Settings, home: Home
) -> None:
    before = set(psutil.Process().children(recursive=True))
    async with running(replace(settings, memory=1 * GIB)) as (ui, status):
        assert ui.calls() == ["listening"]
        await ui.is_ready.wait()
        line = status.ready_line()
        assert await trio.to_thread.run_sync(ask, line["api"]) == "The capital of France is Paris."
        seen = await trio.to_thread.run_sync(lambda: find_node(home).status())
        assert seen["node"] | line == seen["node"]
        assert seen["node"]["name"] == "test-node"
        assert seen["node"]["memory"]["budget_bytes"] == 1 * GIB
        assert seen["node"]["engine"]["kind"] == "embedded"
        assert [model["state"] for model in seen["models"]] == ["ready"]
        engines = set(psutil.Process().children(recursive=True)) - before
        assert engines
        await trio.to_thread.run_sync(lambda: find_node(home).stop())
    assert ui.calls() == ["listening", "ready"]
    assert not [process for process in engines if process.is_running()]
    assert not home.run_file.exists()
    assert not any(is_open(line[name]) for name in ("api", "console", "peer"))


@pytest.mark.usefixtures("found_engine")
async def test_a_measurement_that_fails_leaves_what_was_said_last(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0

    def fail(_: int) -> Memory:
        nonlocal failures
        failures += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/proc/meminfo")

    monkeypatch.setattr(presence, "LOOK_INTERVAL_S", 0.01)
    async with running(replace(settings, memory=NO_ROOM)) as (_, status):
        monkeypatch.setattr(presence, "_main_memory", fail)
        with structlog.testing.capture_logs() as logs:
            while failures < 3:  # noqa: ASYNC110 - nothing announces it
                await trio.sleep(0.01)
        assert status.snapshot()["node"]["memory"]["budget_bytes"] == NO_ROOM
    failed = [log for log in logs if log["event"] == "machine_not_measured"]
    assert "Too many open files" in failed[0]["reason"]


@pytest.mark.usefixtures("found_engine")
async def test_a_node_measures_its_memory_and_tells_the_mesh(
    settings: Settings, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "LOOK_INTERVAL_S", 0.01)

    async def told(status: NodeStatus) -> int:
        answer = await status.order("plan", {})
        speed: int = answer["nodes"][0]["memory_mib_per_s"]
        return speed

    async with running(settings) as (_, status):
        while not await told(status):  # noqa: ASYNC110 - nothing announces it
            await trio.sleep(0.01)
        first = await told(status)
    assert home.memory_speed_file.exists()
    monkeypatch.setattr(module, "measure_mib_per_s", lambda: pytest.fail("it is known"))
    async with running(settings) as (_, status):
        while not await told(status):  # noqa: ASYNC110
            await trio.sleep(0.01)
        assert await told(status) == first == 24_576


@pytest.mark.usefixtures("found_engine")
async def test_the_run_file_says_how_to_reach_it_to_its_owner_only(
    settings: Settings, home: Home
) -> None:
    async with running(settings) as (_, status):
        fields = json.loads(home.run_file.read_text())
        started_at = fields.pop("started_at")
        assert fields == {
            **status.ready_line(),
            "token": status.token,
            "mesh": {k: status.snapshot()["mesh"][k] for k in ("id", "name")},
        }
        assert abs(started_at - home.run_file.stat().st_mtime) < 60
        if sys.platform != "win32":
            assert home.run_file.stat().st_mode & 0o777 == 0o600
        assert all(is_open(fields[name]) for name in ("api", "console", "peer"))
    assert not home.run_file.exists()


@pytest.mark.usefixtures("found_engine")
async def test_it_stops_when_what_it_waits_for_returns(settings: Settings, home: Home) -> None:
    ui = Ui()
    with trio.fail_after(DEADLINE_S):
        await run(settings, ui, ui.is_ready.wait)
    assert ui.calls() == ["listening", "ready"]
    assert not home.run_file.exists()


@pytest.mark.usefixtures("found_engine")
async def test_it_stops_while_it_starts(settings: Settings, home: Home) -> None:
    ui = Ui()

    async def at_once() -> None:
        """The user has changed his mind."""

    before = set(psutil.Process().children(recursive=True))
    with trio.fail_after(DEADLINE_S):
        await run(replace(settings, memory=1 * GIB), ui, at_once)
    assert ui.calls() == ["listening"]
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not home.run_file.exists()


@pytest.mark.usefixtures("found_engine")
async def test_a_node_is_itself_again_at_the_next_start(settings: Settings, home: Home) -> None:
    seen = []
    for _ in range(2):
        async with running(settings) as (_, status):
            mesh = status.snapshot()["mesh"]
            epoch = int(home.epoch_file.read_text())
            seen.append((status.ready_line()["id"], mesh["id"], mesh["name"], epoch, status.token))
    first, second = seen
    assert first[:3] == second[:3]
    assert second[3] > first[3]
    assert second[4] != first[4]


@pytest.mark.usefixtures("found_engine")
async def test_a_clock_that_was_years_ahead_once_is_forgiven(
    settings: Settings, home: Home
) -> None:
    home.epoch_file.write_text(str(2**40), "ascii")
    async with running(settings) as (ui, status):
        await ui.is_ready.wait()
        assert status.snapshot()["mesh"]["nodes"] == 1


@pytest.mark.usefixtures("found_engine")
async def test_a_model_without_room_is_ready_to_be_told_about(
    settings: Settings, home: Home
) -> None:
    path = tiny_gguf(home.root / "mine.gguf")
    async with running(replace(settings, model=(str(path),), slots=2)) as (ui, status):
        await ui.is_ready.wait()
        (model,) = [one for one in status.snapshot()["models"] if one["id"] == "mine"]
        assert model["state"] == "not served"
        assert "largest budget" in model["reason"]
        assert model["wanted_by"] == [status.ready_line()["id"]]
        assert ui.calls() == ["hashing", "listening", "ready"]
        assert ("hashing", "mine") in ui.said


# Signals


@pytest.mark.usefixtures("found_engine")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_stops_it_in_order(
    signum: signal.Signals, settings: Settings, home: Home
) -> None:
    ui = Ui()
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, settings, ui)
            await ui.listened.wait()
            signal.raise_signal(signum)
    assert len([note for note in ui.notes() if note.startswith("Stopping")]) == 1
    assert not home.run_file.exists()


@pytest.mark.usefixtures("found_engine")
async def test_a_second_signal_stops_it_at_once(
    settings: Settings, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    leaving, gone = trio.Event(), trio.Event()

    async def leave_slowly(self: Node, *parts: object) -> None:
        leaving.set()
        await gone.wait()

    def note_exit(code: int) -> None:
        codes.append(code)
        assert not home.run_file.exists()
        gone.set()

    monkeypatch.setattr(Node, "_leave", leave_slowly)
    monkeypatch.setattr(os, "_exit", note_exit)
    async with running(settings):
        signal.raise_signal(signal.SIGTERM)
        await leaving.wait()
        assert codes == []
        signal.raise_signal(signal.SIGTERM)
        await gone.wait()
    assert codes == [128 + signal.SIGTERM]


# What it refuses


@pytest.mark.usefixtures("found_engine")
async def test_a_second_node_in_the_same_home_is_refused(settings: Settings, home: Home) -> None:
    async with running(settings):
        run_file = home.run_file.read_bytes()
        with pytest.raises(LocalError, match="start a second one with its own --home"):
            await run(settings, Ui())
        assert home.run_file.read_bytes() == run_file


@pytest.mark.usefixtures("found_engine")
async def test_a_model_that_is_not_there_is_refused_before_anything_is_promised(
    settings: Settings, home: Home
) -> None:
    ui = Ui()
    with pytest.raises(ConfigError, match=r"missing\.gguf"):
        await run(replace(settings, model=(str(home.root / "missing.gguf"),)), ui)
    assert ui.said == []
    assert not home.run_file.exists()
    assert not home.mesh_file.exists(), "no mesh was founded"


async def test_an_engine_that_is_none_is_refused(settings: Settings, home: Home) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        await run(replace(settings, engine=home.root / "llama-server"), Ui())


@pytest.mark.usefixtures("found_engine")
@pytest.mark.parametrize("name", ["api", "console", "peer"])
async def test_a_named_port_that_is_taken_is_refused(name: str, settings: Settings) -> None:
    with taken() as other:
        port = other.getsockname()[1]
        wanted = {name: Address("127.0.0.1", port)}
        with pytest.raises(LocalError, match=rf"127\.0\.0\.1:{port} .*--{name} HOST:PORT"):
            await run(replace(settings, **wanted), Ui())  # type: ignore[arg-type]  # addresses


@pytest.mark.usefixtures("found_engine")
async def test_a_default_port_that_is_taken_moves_and_says_so(settings: Settings) -> None:
    with taken() as other:
        port = other.getsockname()[1]
        moving = replace(
            settings, api=Address("127.0.0.1", port), given=frozenset({"console", "peer"})
        )
        async with running(moving) as (ui, status):
            moved_to = status.ready_line()["api"]
    assert moved_to != f"127.0.0.1:{port}"
    assert ui.notes() == [f"Port {port} is taken: api is at {moved_to}"]


@pytest.mark.usefixtures("found_engine")
async def test_who_is_joined_and_does_not_answer_is_named(
    settings: Settings, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "JOIN_WAIT_S", 0.1)
    with taken() as other:
        port = other.getsockname()[1]
    cannot = pytest.RaisesExc(LocalError, match=rf"Cannot join: .*127\.0\.0\.1:{port}")
    with pytest.RaisesGroup(cannot, flatten_subgroups=True):
        await run(replace(settings, join=(Address("127.0.0.1", port),)), Ui())
    assert not home.mesh_file.exists()
    assert not home.run_file.exists()

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from p2pmesh.commands import doctor_checks as module
from p2pmesh.commands.doctor_checks import Check, Doctor
from p2pmesh.config import Address, Settings
from p2pmesh.engine.confinement import Confinement, Level
from p2pmesh.engine.devices import Device
from p2pmesh.engine.find import Engine
from p2pmesh.errors import EngineError
from p2pmesh.home import Home
from tests.console.running import console, write_run_file
from tests.models.builders import other_files, split

GIB = 2**30
FREE = Address("127.0.0.1", 0)
CPU_ONLY = Engine(kind="embedded", command=("x",), source="wheel", version="b1")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine in order: an engine, memory, disk, no models of other programs."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "LLAMA_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "find_engine", lambda *_: CPU_ONLY)
    memory = SimpleNamespace(total=16 * GIB, available=12 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50 * GIB))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path / "home")
    home.create()
    home.models.mkdir()
    return home


def run(home: Home, **settings: Any) -> list[Check]:
    free: dict[str, Any] = {"api": FREE, "console": FREE, "peer": FREE}
    return list(Doctor(Settings(**{"home": home.root, **free, **settings}), home).run())


def of(found: list[Check], name: str) -> list[Check]:
    return [check for check in found if check.name == name]


def only(found: list[Check], name: str) -> Check:
    (check,) = of(found, name)
    return check


def test_a_machine_in_order_is_all_ok_before_anything_was_started(tmp_path: Path) -> None:
    root = tmp_path / "new" / "home"
    found = run(Home.at(root))
    assert [check for check in found if check.state != "ok"] == []
    names = "python data cache key node api console peer disk engine sandbox memory models clock"
    assert " ".join(check.name for check in found) == names
    assert not Home.at(root).node_key.exists()


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10, 9), "fail"), ((3, 13, 1), "ok"), ((3, 15, 0), "warn")]
)
def test_python(
    home: Home, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], state: str
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert only(list(Doctor(Settings(), home)._python()), "python").state == state


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root writes everywhere")
def test_a_home_that_cannot_be_written(home: Home) -> None:
    home.root.chmod(0o500)
    try:
        assert only(run(home), "data").state == "fail"
    finally:
        home.root.chmod(0o700)


def test_a_home_below_a_file_uses_what_exists(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert module._existing(tmp_path / "file" / "home") == tmp_path


@pytest.mark.skipif(os.name == "nt", reason="permission bits")
def test_keys_that_others_can_read(home: Home) -> None:
    home.node_key.write_text("secret")
    home.run_file.write_text("secret")
    home.node_key.chmod(0o644)
    home.run_file.chmod(0o600)
    key = only(run(home), "key")
    assert key.state == "fail"
    assert key.fix == f"chmod 600 {home.node_key}"
    home.node_key.chmod(0o600)
    assert only(run(home), "key").state == "ok"


def test_taken_ports(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address("127.0.0.1", taken.getsockname()[1])
        default = only(run(home, api=address), "api")
        assert default.state == "warn"
        assert "a second node takes the next free port" in default.fix
        given = only(run(home, api=address, given=frozenset({"api"})), "api")
        assert given.state == "fail"
        assert given.fix == "choose another with --api HOST:PORT"
    assert only(run(home, api=address), "api").state == "ok"


def test_a_host_that_is_not_this_machine(home: Home) -> None:
    foreign = run(home, peer=Address("192.0.2.1", 0), given=frozenset({"peer"}))
    assert only(foreign, "peer").state == "fail"


def test_a_running_node_holds_its_ports_and_knows_its_budget(home: Home) -> None:
    with console() as running:
        write_run_file(home.run_file, pid=running.process.pid, console_port=running.port)
        found = run(home)
    assert only(found, "node").detail.startswith("kitchen-pc runs (process ")
    assert only(found, "console").detail.endswith(f":{running.port}, held by this node")
    assert only(found, "memory").detail == "12.0 GiB for models, of 16.0 GiB in this machine"
    assert [check for check in found if check.state != "ok"] == []


def test_a_node_that_died_and_one_that_hangs(home: Home) -> None:
    with console() as running:
        pid = running.process.pid
        write_run_file(home.run_file, pid=pid, console_port=running.port)
    died = only(run(home), "node")
    assert died.state == "warn"
    write_run_file(home.run_file, pid=os.getpid(), console_port=running.port)
    assert only(run(home), "node").state == "fail"


@pytest.mark.parametrize(
    ("free_bytes", "state"), [(50 * GIB, "ok"), (GIB, "warn"), (2**20, "fail")]
)
def test_disk(home: Home, monkeypatch: pytest.MonkeyPatch, free_bytes: int, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    assert only(run(home), "disk").state == state


def test_no_engine(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> Engine:
        raise EngineError("No engine works here")

    monkeypatch.setattr(module, "find_engine", none)
    engine = only(run(home), "engine")
    assert (engine.state, engine.fix) == ("fail", "p2pmesh engine install")


def test_devices_and_warnings_of_the_engine(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(
        id="CUDA0", backend="CUDA", description="RTX", total_bytes=24 * GIB, free_bytes=20 * GIB
    )
    engine = Engine(
        kind="native",
        command=("x",),
        source="path",
        version="b1",
        rpc="7.0.0",
        devices=(gpu,),
        warnings=("GPU found but unused: p2pmesh engine install",),
    )
    monkeypatch.setattr(module, "find_engine", lambda *_: engine)
    found = run(home)
    assert only(found, "device").detail == "CUDA0: RTX, 24.0 GiB"
    assert [check.state for check in of(found, "engine")] == ["ok", "warn"]
    assert only(found, "sandbox").state == "ok"
    # 75 % of 12 GiB main and of 20 GiB device memory.
    assert only(found, "memory").detail == "24.0 GiB for models, of 40.0 GiB in this machine"


@pytest.mark.parametrize(("level", "state"), [("full", "ok"), ("files", "warn"), ("none", "warn")])
def test_stages_that_are_not_confined_are_warned_of(
    home: Home, monkeypatch: pytest.MonkeyPatch, level: Level, state: str
) -> None:
    reason = "" if level == "full" else "an old kernel"
    here = Confinement(level, reason)
    engine = replace(CPU_ONLY, rpc="7.0.0", confinement=here, rpc_confinement=here)
    monkeypatch.setattr(module, "find_engine", lambda *_: engine)
    check = only(run(home), "sandbox")
    assert check.state == state
    assert check.detail.endswith(reason or "confined")


@pytest.mark.parametrize(
    ("memory", "state"), [(8 * GIB, "ok"), (2**29, "warn"), (64 * GIB, "fail")]
)
def test_memory(home: Home, memory: int, state: str) -> None:
    assert only(run(home, memory=memory), "memory").state == state


def test_corrupt_and_missing_models(home: Home) -> None:
    (home.models / "broken.gguf").write_bytes(b"GGUF\x03")
    found = run(home, model=("nowhere.gguf",))
    counted, broken = of(found, "models")
    assert counted.detail == "0 usable files found"
    assert broken.state == "warn"
    assert "broken.gguf cannot be used" in broken.detail
    assert broken.fix == "delete it, or download it again"
    assert only(found, "model").state == "fail"


def test_good_files_that_are_not_served_alone_are_in_order(home: Home) -> None:
    others = other_files(home.models)
    counted, *found = of(run(home), "models")
    assert counted.detail == "0 usable files found"
    assert {(check.state, check.fix) for check in found} == {("ok", "")}
    for path, words in others.values():
        assert any(str(path) in check.detail and words in check.detail for check in found)


def test_a_model_of_which_a_part_is_missing_is_to_be_completed(home: Home) -> None:
    split(home.models)[0].unlink()
    _, missing = of(run(home), "models")
    assert (missing.state, missing.fix) == ("warn", "")
    assert missing.detail.endswith("download all parts")


def test_a_clock_behind_the_last_start(home: Home) -> None:
    home.epoch_file.write_text(f"{int(time.time()) + 7200}\n")
    clock = only(run(home), "clock")
    assert clock.state == "fail"
    assert "behind" in clock.detail
    home.epoch_file.write_text("junk")
    assert only(run(home), "clock").state == "ok"

"""The `engine` commands, run as a user runs them but for the process."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands import engine as module
from p2pmesh.commands.engine import engine
from p2pmesh.engine.subprocesses import Progress
from p2pmesh.errors import ConfigError, EngineError, LocalError
from p2pmesh.home import Home
from tests.engine.packages import source_package

needs_tools = pytest.mark.skipif(
    sys.platform == "win32" or not all(map(shutil.which, ("cmake", "ninja", "c++"))),
    reason="cmake, ninja and a compiler",
)


@pytest.fixture(autouse=True)
def bare_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """No llama-server of this machine's own."""
    kept = [p for p in ("/usr/bin", "/bin") if not Path(p, "llama-server").exists()]
    monkeypatch.setenv("PATH", ":".join(kept))


def call(home: Path, *arguments: str, chosen: Path | None = None) -> Result:
    settings = SimpleNamespace(home=home, engine=chosen)
    return CliRunner().invoke(engine, list(arguments), obj=settings)


def test_info_names_the_places_in_order_and_marks_the_chosen_one(tmp_path: Path) -> None:
    result = call(tmp_path, "info")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "  managed: p2pmesh engine install was not run"
    assert lines[1].startswith("  path: no llama-server")
    assert lines[2].startswith("* embedded engine 20")
    assert "(wheel; no RPC: cannot be a pipeline stage)" in lines[2]
    assert lines[-1].startswith("      not confined: ")


def test_info_for_programs(tmp_path: Path) -> None:
    shown = json.loads(call(tmp_path, "info", "--json").stdout)
    assert shown["engine"]["source"] == "wheel"
    assert [place["source"] for place in shown["searched"]] == ["managed", "path", "wheel"]
    assert shown["searched"][2]["engine"] == shown["engine"]
    assert shown["engine"]["confinement"]["level"] == "none"
    assert shown["engine"]["rpc_confinement"] is None


def test_a_wrong_choice_is_the_users_error(tmp_path: Path) -> None:
    result = call(tmp_path, "info", chosen=tmp_path / "nothing")
    assert isinstance(result.exception, ConfigError)
    assert "there is no such file" in str(result.exception)


def test_no_engine_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pmesh.engine.find._EMBEDDED", ("/nowhere/python",))
    result = call(tmp_path, "info")
    assert isinstance(result.exception, EngineError)
    assert "wheel xllamacpp: it cannot be run: No such file or directory" in result.stdout


@needs_tools
def test_install_and_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source_package(Home.at(tmp_path).engine / "work", monkeypatch)
    result = call(tmp_path, "install", "--backend", "cpu")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "Downloading llama.cpp: already here",
        "Unpacking",
        "Configuring",
        "Building",
        "Checking",
        "Done",
    ]
    assert result.stdout.startswith("native engine b11434 (managed; RPC 7.0.0)\n")
    again = call(tmp_path, "install", "--backend", "cpu")
    assert again.stderr == "Done: this engine is installed already\n"
    assert call(tmp_path, "info").stdout.startswith("* native engine b11434 (managed; RPC 7.0.0)")


@needs_tools
def test_install_for_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source_package(Home.at(tmp_path).engine / "work", monkeypatch)
    result = call(tmp_path, "install", "--json", "--backend", "cpu")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert events[0] == {"step": "download", "done": 1, "total": 1, "detail": "already here"}
    assert {"build", "check", "done"} <= {event.get("step") for event in events}
    assert events[-1]["engine"]["rpc"] == "7.0.0"
    assert result.stderr == ""


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module, "install_engine", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    result = call(tmp_path, "install")
    assert isinstance(result.exception, LocalError)
    assert str(result.exception) == "Stopped; p2pmesh engine install goes on from here"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_bar_moves_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = module._Bar(is_terminal=True)
    bar.show(Progress(step="unpack", done=400, detail="files"))
    bar.show(Progress(step="build", detail="a long word"))
    bar.show(Progress(step="build", done=3, total=12))
    bar.show(Progress(step="check"))
    bar.close()
    assert capsys.readouterr().err.split("\r") == [
        "",
        "Unpacking 400 files\n",
        "Building a long word",
        "Building [#######.......................]  25 %\n",
        "Checking\n",
    ]

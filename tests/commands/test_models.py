from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands.models import models
from p2pmesh.config import Settings
from p2pmesh.control import NO_NODE
from p2pmesh.models.store import EMBEDDED
from tests.console.fake import three_nodes
from tests.console.running import console, write_run_file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home on a machine where no other program keeps models."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "LLAMA_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    (home / "cache").mkdir()
    return home


def call(home: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(models, list(arguments), obj=Settings(home=home))
    assert result.exception is None
    return result


def test_without_node_and_files_it_says_what_to_do(home: Path) -> None:
    result = call(home)
    assert result.stderr == f"{NO_NODE}\n"
    assert f"put one into {home / 'models'}" in result.stdout
    assert json.loads(call(home, "--json").stdout) == {"models": None, "files": [], "unusable": []}


def test_files_of_this_machine_are_listed_with_how_to_serve_them(home: Path) -> None:
    shutil.copy(EMBEDDED, home / "models" / "my-tiny.gguf")
    lines = call(home).stdout.splitlines()
    assert lines[0] == "On this machine:"
    assert click.unstyle(lines[1]).split() == ["MODEL", "SIZE", "KIND", "ARCHITECTURE", "FILE"]
    assert lines[2].split()[0] == "my-tiny"
    assert lines[2].endswith(str(home / "models" / "my-tiny.gguf"))
    assert lines[3] == "Serve one: p2pmesh up --model my-tiny"
    (file,) = json.loads(call(home, "--json").stdout)["files"]
    assert file["id"] == "my-tiny"
    assert file["architecture"] == "qwen3moe"
    assert file["size_bytes"] == EMBEDDED.stat().st_size


def test_damaged_files_are_named_with_the_reason(home: Path) -> None:
    (home / "models" / "broken.gguf").write_bytes(b"GGUF\x03")
    result = call(home)
    assert "Skipped: " in result.stderr
    assert "broken.gguf cannot be used" in result.stderr
    (one,) = json.loads(call(home, "--json").stdout)["unusable"]
    assert one["path"].endswith("broken.gguf")


def test_models_of_the_mesh_come_first(home: Path) -> None:
    with console() as running:
        write_run_file(home / "run.json", pid=running.process.pid, console_port=running.port)
        lines = click.unstyle(call(home).stdout).splitlines()
        assert lines[0].split() == ["MODEL", "STATE", "SIZE", "NODES", "WHY"]
        assert lines[3].startswith("Llama-3.3-70B-Instruct-Q4_K_M  not served")
        found = json.loads(call(home, "--json").stdout)
        assert found["models"] == three_nodes()["models"]

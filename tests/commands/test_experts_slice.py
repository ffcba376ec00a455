"""`p2pmesh experts slice`, run as a user runs it but for the process."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands import experts_slice as module
from p2pmesh.commands.experts_slice import slice_model
from p2pmesh.config import Settings
from p2pmesh.errors import ConfigError, LocalError, MeshError, ModelError
from p2pmesh.home import Home
from p2pmesh.models.slice import read_layout
from p2pmesh.models.store import Store
from tests.models.builders import tiny_gguf
from tests.models.layouts import moe_gguf
from tests.models.sliced import assert_kept
from tests.models.test_slice import LISTS, loaded


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model, on a machine where no other program keeps any."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "LLAMA_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    moe_gguf(tmp_path / "work" / "moe.gguf", "qwen3moe")
    return tmp_path / "work"


def call(*arguments: str, disk: int | None = None) -> Result:
    settings = Settings(home=Path("home"), disk=disk)
    # Once a test has started the whole program, the command makes its settings itself.
    environ = {"P2PMESH_HOME": "home", "P2PMESH_DISK": "" if disk is None else str(disk)}
    return CliRunner().invoke(slice_model, list(arguments), obj=settings, env=environ)


def refused(kind: type[MeshError], words: str, *arguments: str, disk: int | None = None) -> None:
    """The command says what is wrong, and every model file stays as it was."""
    before = {path: path.read_bytes() for path in Path().rglob("*.gguf")}
    result = call(*arguments, disk=disk)
    assert isinstance(result.exception, kind), result.exception
    assert words in str(result.exception)
    assert {path: path.read_bytes() for path in Path().rglob("*.gguf")} == before


def test_ids_make_a_shard_for_all_layers(folder: Path) -> None:
    result = call("moe.gguf", "--keep", "0,3,5-7", "--output", "my shard.gguf")
    assert result.exception is None
    lists = dict.fromkeys(range(3), (0, 3, 5, 6, 7))
    assert_kept(loaded(folder / "moe.gguf"), loaded(folder / "my shard.gguf"), lists)
    assert result.stdout.splitlines() == [
        "5 of 16 experts in 3 layers, 1.0 MiB of 2.6 MiB: my shard.gguf",
        "Run it: p2pmesh up --model 'my shard.gguf'",
    ]


def test_a_number_keeps_the_first_and_says_what_changes() -> None:
    result = call("moe.gguf", "--keep", "3", "--output", "small.gguf")
    assert result.exception is None
    assert "Each token now uses 3 experts in place of 4: more are not there." in result.stdout
    assert read_layout(Store(Home.at(Path("home")), environ={}).open(Path("small.gguf"))).count == 3


def test_shards_are_kept_and_made_once(folder: Path) -> None:
    shards = Home.at(Path("home")).shards
    first = call("moe.gguf", "--keep", "3")
    assert first.exception is None
    (shard,) = shards.glob("*.gguf")
    assert first.stdout.splitlines()[0].endswith(f": {shard}")
    made = shard.stat().st_ino
    assert call("moe.gguf", "--keep", "0-2").stdout == first.stdout
    assert shard.stat().st_ino == made
    lists = dict.fromkeys(range(3), (0, 1, 2))
    assert_kept(loaded(folder / "moe.gguf"), loaded(shard), lists)


def test_shards_take_no_more_disk_than_they_may() -> None:
    refused(LocalError, "all shards may take 1 MiB", "moe.gguf", "--keep=8", disk=2**20)


def test_a_file_has_a_list_for_each_layer(folder: Path) -> None:
    Path("keep.json").write_text(json.dumps({"layers": LISTS}))
    assert call("moe.gguf", "--keep", "keep.json", "--output", "small.gguf").exception is None
    assert_kept(loaded(folder / "moe.gguf"), loaded(folder / "small.gguf"), LISTS)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("1", "A shard keeps at least 2 experts of each layer, not 1"),
        ("17", "Each layer has 16 experts; 17 cannot be kept"),
        ("0,16", "there is no expert 16, only 0 to 15"),
        ("0-999999999999", "there is no expert 999999999999"),
        ("5-3,1", "5-3 goes backwards; write 3-5"),
        ("3,3", "Expert 3 of layer 0 is named twice"),
        ("0,,1", "neither a number, nor ids like 0,3,5-9, nor a file"),
        ("list.json", "nor a file that can be read (No such file or directory)"),
    ],
)
def test_bad_lists_are_explained(keep: str, words: str) -> None:
    refused(ConfigError, words, "moe.gguf", "--keep", keep)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "the file is not JSON"),
        ("[" * 100_000, "the file is not JSON (nested too deeply)"),
        ("[1, 2]", "does not have the form"),
        ('{"layers": {"x": [1, 2]}}', "does not have the form"),
        ('{"layers": {"0": [true, 2]}}', "does not have the form"),
        ('{"layers": {"0": [1, 2]}}', "No list for layer 1"),
        ('{"layers": {"0": [1, 2], "1": [1], "2": [1, 2]}}', "Layer 0 would keep 2 experts"),
        ('{"layers": {"0": [1, 99], "1": [1, 2], "2": [1, 2]}}', "no expert 99 in layer 0"),
    ],
)
def test_bad_files_of_lists_are_explained(folder: Path, content: str, words: str) -> None:
    (folder / "keep.json").write_text(content)
    refused(ConfigError, words, "moe.gguf", "--keep", "keep.json")


def test_other_models_are_refused(folder: Path) -> None:
    tiny_gguf(folder / "dense.gguf")
    (folder / "short.gguf").write_bytes((folder / "moe.gguf").read_bytes()[:-100])
    refused(
        ModelError,
        "dense.gguf cannot be cut into shards: it has no",
        "dense.gguf",
        "--keep=3",
    )
    refused(ModelError, "bytes are missing); download it again", "short.gguf", "--keep=3")
    refused(ConfigError, "No model 'nothing'", "nothing", "--keep=3")


def test_files_that_are_there_stay(folder: Path) -> None:
    (folder / "old.gguf").write_bytes(b"old")
    refused(
        ConfigError,
        "old.gguf is there already; delete it, or choose another with --output",
        "moe.gguf",
        "--keep=3",
        "--output=old.gguf",
    )
    refused(LocalError, "gone/x.gguf", "moe.gguf", "--keep=3", "--output=gone/x.gguf")


def test_a_request_to_stop_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module, "write_shard", stopped)
    before = signal.getsignal(signal.SIGTERM)
    refused(LocalError, "Stopped; no shard was written", "moe.gguf", "--keep=3", "--output=x.gguf")
    assert signal.getsignal(signal.SIGTERM) is before

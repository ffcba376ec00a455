"""`p2pmesh experts rank`, run as a user runs it but for the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands.experts_rank import TEXTS, rank
from p2pmesh.config import Settings
from p2pmesh.engine.find import SERVER
from p2pmesh.errors import ConfigError, EngineError, MeshError, ModelError
from p2pmesh.home import Home
from p2pmesh.models.imatrix import DownTensor, down_tensors
from p2pmesh.models.importance import RankingDigest
from p2pmesh.models.rankings import load, load_neurons
from p2pmesh.models.store import Store
from tests.engine.samples import MODEL, native, wait_until
from tests.models.builders import tiny_gguf
from tests.models.imatrices import random_imatrix, write_imatrix
from tests.models.layouts import EXPERT, EXPERTS, moe_gguf

HOME = Path("home")
DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, DownTensor]:
    """A folder to work in, with a model, on a machine that has no other ones and no engine."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "LLAMA_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    model = moe_gguf(Path("moe.gguf"), "qwen3moe")
    return down_tensors(Store(Home.at(HOME), environ={}).open(model))


def call(*arguments: str, engine: Path | None = None) -> Result:
    # Once a test has started the whole program, the command makes its settings itself.
    environ = {"P2PMESH_HOME": str(HOME), "P2PMESH_ENGINE": str(engine or "")}
    settings = Settings(home=HOME, engine=engine)
    return CliRunner().invoke(rank, list(arguments), obj=settings, env=environ)


def refused(kind: type[MeshError], words: str, *arguments: str) -> None:
    """The command says what is wrong, and keeps no ranking."""
    result = call(*arguments)
    assert isinstance(result.exception, kind), result.exception
    assert words in str(result.exception)
    assert not rankings()


def rankings() -> list[Path]:
    return list(HOME.glob("rankings/*"))


def test_an_importance_matrix_makes_a_ranking(tensors: dict[int, DownTensor]) -> None:
    for seed, name in enumerate(("code", "prose")):
        write_imatrix(Path(f"{name}.gguf"), tensors, random_imatrix(tensors, seed=seed))
    result = call("moe.gguf", "--imatrix", "prose.gguf", "--imatrix", "code.gguf", "--json")
    assert result.exception is None
    shown = json.loads(result.stdout)
    ranking = load(HOME / "rankings", RankingDigest(shown["digest"]))
    assert ranking is not None
    assert [domain.name for domain in ranking.domains] == ["code", "prose"]
    assert sorted(shown["domains"][0]["layers"]["2"]) == list(range(EXPERTS))
    assert shown["domains"][0]["chunks"] == 8
    neurons = load_neurons(HOME / "rankings", ranking)
    assert neurons is not None
    assert neurons.shape == (3, 2, EXPERTS, EXPERT)
    assert len(rankings()) == 2
    again = call("moe.gguf", "--imatrix", "prose.gguf", "--imatrix", "code.gguf")
    assert shown["digest"] in again.stdout
    assert "one list for all: " in again.stdout
    assert len(rankings()) == 2


def test_a_matrix_beside_the_model_is_used_if_it_fits(tensors: dict[int, DownTensor]) -> None:
    Path("a.imatrix.gguf").write_bytes(b"GGUF and no more")
    write_imatrix(Path("moe.imatrix.gguf"), tensors, random_imatrix(tensors))
    result = call("moe.gguf")
    assert result.exception is None
    unfit, fit = result.stderr.splitlines()
    assert unfit.startswith("Not used: ")
    assert "a.imatrix.gguf cannot be used: " in unfit
    assert fit.endswith("moe.imatrix.gguf; give a --text to measure anew")
    assert "moe.imatrix: the 8 first of 16 experts have " in result.stdout


def test_the_texts_that_come_along_are_there() -> None:
    assert all(len(text.read_text("utf-8")) > 5000 for text in TEXTS.values())


def test_what_cannot_be_ranked_is_refused_by_name() -> None:
    refused(ConfigError, "No model 'nothing'", "nothing")
    tiny_gguf(Path("dense.gguf"))
    refused(ModelError, "it has no experts", "dense.gguf")


def test_files_that_cannot_be_used_are_named(tensors: dict[int, DownTensor]) -> None:
    Path("text.md").write_text("text")
    Path("text.txt").write_text("text")
    Path("a\x7fb").write_text("text")
    refused(ConfigError, "names no domain", "moe.gguf", "--text", "a\x7fb")
    refused(ConfigError, "no file none.txt", "moe.gguf", "--text", "none.txt")
    refused(ConfigError, "either", "moe.gguf", "--text", "text.md", "--imatrix", "text.txt")
    refused(ConfigError, "same name", "moe.gguf", "--text", "text.md", "--text", "text.txt")
    refused(ModelError, "it is no GGUF file", "moe.gguf", "--imatrix", "text.txt")
    whole = write_imatrix(Path("cut.gguf"), tensors, random_imatrix(tensors))
    whole.write_bytes(whole.read_bytes()[:-100])
    refused(ModelError, "cut.gguf cannot be used: ", "moe.gguf", "--imatrix", "cut.gguf")


def test_more_time_than_is_allowed_is_refused() -> None:
    assert "0<x<=20" in call("moe.gguf", "--minutes", "21").stderr
    assert "0<x<=20" in call("moe.gguf", "--minutes", "0").stderr


def test_without_llama_imatrix_it_says_how_to_get_it() -> None:
    refused(EngineError, "p2pmesh engine install builds one that has it", "moe.gguf")


def test_texts_make_a_ranking_of_the_embedded_model(tmp_path: Path) -> None:
    left = HOME / "cache" / "imatrix-999999999-killed"
    left.mkdir(parents=True)
    text = tmp_path / "tale.txt"
    text.write_bytes(TEXTS["prose"].read_bytes())
    result = call(str(MODEL), "--text", str(text), engine=native() / SERVER)
    assert result.exception is None
    assert result.stderr == "Text tale: 8 chunks\n"
    assert "tale: the 8 first of 16 experts have " in result.stdout
    assert "critical" not in result.stdout
    assert not list((HOME / "cache").glob("imatrix-*"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whoever_stops_it_finds_no_half_ranking(number: signal.Signals, tmp_path: Path) -> None:
    text = tmp_path / "endless.txt"
    text.write_bytes(TEXTS["prose"].read_bytes() * 500)
    arguments = ["--home", str(HOME), "--engine", str(native() / SERVER), str(MODEL)]
    command = [sys.executable, "-m", "p2pmesh", "experts", "rank", *arguments, "--text", str(text)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ, text=True)
    saved = HOME / "cache"
    assert wait_until(lambda: any(saved.glob("imatrix-*/imatrix.gguf")), DEADLINE_S)
    process.send_signal(number)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert not rankings()
    if number != signal.SIGKILL:
        assert process.returncode == 1
        assert said == "p2pmesh: Stopped; no ranking was made\n"
        assert not list(saved.glob("imatrix-*"))

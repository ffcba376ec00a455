"""`p2pmesh experts measure`, run as a user runs it but for the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands import experts_measure as module
from p2pmesh.commands import experts_rank
from p2pmesh.commands.experts_measure import TEXTS, measure_model
from p2pmesh.config import Settings
from p2pmesh.engine.find import SERVER
from p2pmesh.engine.measuring import Measured
from p2pmesh.engine.perplexity import Figures
from p2pmesh.errors import ConfigError, EngineError, LocalError, MeshError, ModelError
from p2pmesh.home import Home
from p2pmesh.models import measured, rankings
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.importance import Ranking, digest_of, rank
from p2pmesh.models.parts import ShardKind, ShardQuality
from p2pmesh.models.store import ModelFile, Store
from tests.engine.samples import MODEL, native, wait_until
from tests.models.builders import tiny_gguf
from tests.models.layouts import EXPERTS, moe_gguf

HOME = Path("home")
DEADLINE_S = 60.0
LAYERS = 6  # of the embedded model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model, on a machine that has no other ones and no engine."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "LLAMA_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    moe_gguf(Path("moe.gguf"), "qwen3moe")
    return tmp_path / "work"


def call(*arguments: str, engine: Path | None = None, disk: int | None = None) -> Result:
    settings = Settings(home=HOME, engine=engine, disk=disk)
    # Once a test has started the whole program, the command makes its settings itself.
    environ = {
        "P2PMESH_HOME": str(HOME),
        "P2PMESH_ENGINE": "" if engine is None else str(engine),
        "P2PMESH_DISK": "" if disk is None else str(disk),
    }
    return CliRunner().invoke(measure_model, list(arguments), obj=settings, env=environ)


def refused(kind: type[MeshError], words: str, result: Result) -> None:
    """The command said what is wrong, and keeps no measures."""
    assert isinstance(result.exception, kind), result.exception
    assert words in str(result.exception)
    assert not list(HOME.glob("rankings/*.measured"))
    assert not list(HOME.glob("cache/measure-*"))


def ranked(model: Path, layers: int = 3) -> Ranking:
    """Keep a ranking of a model in which the first expert of each layer comes first."""
    digest = Store(Home.at(HOME), environ={}).digest(opened(model))
    rows = [[float(EXPERTS - expert) for expert in range(EXPERTS)]] * layers
    made = rank(digest, "counts-energy", range(layers), {"text": rows}, [()] * layers)
    rankings.save(HOME / "rankings", made)
    return made


def opened(model: Path) -> ModelFile:
    return Store(Home.at(HOME), environ={}).open(model)


def test_the_texts_that_come_along_are_not_those_of_rankings() -> None:
    assert TEXTS.keys() == experts_rank.TEXTS.keys()
    texts = {path.read_bytes() for path in TEXTS.values()}
    assert all(len(text) > 6000 for text in texts)
    assert not texts & {path.read_bytes() for path in experts_rank.TEXTS.values()}


def test_without_a_ranking_it_says_how_to_make_one() -> None:
    words = "There is no ranking of moe.gguf here; make one with p2pmesh experts rank moe.gguf"
    refused(ConfigError, words, call("moe.gguf"))
    refused(ConfigError, f"no ranking {'a' * 64} here", call("moe.gguf", "--ranking", "a" * 64))
    other = rank(ModelDigest("b" * 64), "counts", (0,), {"text": [[1.0, 2.0]]}, [()])
    rankings.save(HOME / "rankings", other)
    refused(ConfigError, "There is no ranking of moe.gguf", call("moe.gguf"))
    result = call("moe.gguf", "--ranking", digest_of(other))
    refused(ConfigError, "is a ranking of another model", result)


def test_models_that_cannot_be_measured_are_refused() -> None:
    refused(ConfigError, "No model 'nothing'", call("nothing"))
    tiny_gguf(Path("dense.gguf"))
    ranked(Path("dense.gguf"))
    refused(ModelError, "it has no experts", call("dense.gguf"))


def test_mistakes_are_named(folder: Path) -> None:
    ranked(folder / "moe.gguf")
    refused(ConfigError, "no file none.txt", call("moe.gguf", "--text", "none.txt"))
    refused(EngineError, "comes without llama-perplexity; p2pmesh engine inst", call("moe.gguf"))
    assert "1<=x<=" in call("moe.gguf", "--sizes", "0").stderr
    assert "0<x<=" in call("moe.gguf", "--minutes", "0").stderr


def test_thin_shards_take_the_scores_of_neurons(folder: Path) -> None:
    ranked(folder / "moe.gguf")
    words = (
        "There are no scores of the neurons of moe here; make them with p2pmesh experts rank moe"
    )
    refused(LocalError, words, call("moe.gguf", "--kind=thin"))
    assert f"No thin shards: {words}" in call("moe.gguf").stderr


def test_texts_that_are_too_short_are_named() -> None:
    ranked(MODEL, LAYERS)
    Path("short.txt").write_text("Good morning.")
    result = call(str(MODEL), "--text", "short.txt", engine=native() / SERVER)
    refused(ConfigError, "short.txt is too short", result)


def test_without_room_for_the_answers_it_says_so() -> None:
    ranked(MODEL, LAYERS)
    result = call(str(MODEL), engine=native() / SERVER, disk=100_000)
    refused(LocalError, "take 11 MiB of disk at least, and they may take 0 MiB", result)


def test_shards_of_the_embedded_model_are_measured_and_kept() -> None:
    made = ranked(MODEL, LAYERS)
    left = HOME / "cache" / "measure-999999999-killed"
    left.mkdir(parents=True)
    arguments = (str(MODEL), "--kind=experts", "--sizes", "2", "--text", str(TEXTS["manual"]))
    result = call(*arguments, "--json", engine=native() / SERVER)
    assert result.exception is None
    half, most = json.loads(result.stdout)["shards"]
    assert (half["critical"], most["critical"]) == (11, 13), "the smallest that will do is searched"
    assert half["divergence"] > most["divergence"] > 0
    assert half["divergence"] == pytest.approx(half["domains"]["manual"]["divergence"], abs=1e-6)
    assert half["agreement"] < most["agreement"] <= 1
    kept = measured.load(HOME / "rankings", digest_of(made))
    assert [one.divergence / 1e6 for one in kept] == [half["divergence"], most["divergence"]]
    assert not list((HOME / "cache").glob("measure-*"))
    assert result.stderr.splitlines() == [
        f"{one['holds']}: kl {one['divergence']:.3f}" for one in (half, most)
    ]


@pytest.mark.full
def test_by_its_own_ranking_the_embedded_model_loses_little() -> None:
    engine = native() / SERVER
    ranking = CliRunner().invoke(
        experts_rank.rank,
        [str(MODEL)],
        obj=Settings(home=HOME, engine=engine),
        env={"P2PMESH_HOME": str(HOME), "P2PMESH_ENGINE": str(engine)},
    )
    assert ranking.exception is None
    result = call(str(MODEL), "--sizes", "8", "--json", engine=engine)
    assert result.exception is None
    shards = json.loads(result.stdout)["shards"]
    assert {one["kind"] for one in shards} == {"experts", "thin"}
    worst = [one["divergence"] for one in shards if one["kind"] == "experts"]
    assert worst == sorted(worst, reverse=True)
    assert worst[-1] <= 0.1 < worst[-2] < 1.5, "the smallest that is good enough, and one below"


def test_nothing_measured_in_time_is_an_error() -> None:
    ranked(MODEL, LAYERS)
    result = call(str(MODEL), "--minutes", "1e-9", engine=native() / SERVER)
    refused(EngineError, "No size was measured within 1e-09 minutes; give it more", result)


@pytest.mark.parametrize(
    ("divergences", "words"),
    [
        (
            [780_000, 99_000, 15_000],
            (
                "Within kl=0.10, the default of p2pmesh up --moe-quality: 9 of 16 experts and more."
                " Smaller and worse: --moe-quality kl=0.78 takes 8 of 16 experts."
            ),
        ),
        (
            [99_000],
            "Within kl=0.10, the default of p2pmesh up --moe-quality: 8 of 16 experts and more.",
        ),
        (
            [780_000, 170_001],
            (
                "None is within kl=0.10, the default. 9 of 16 experts are used with "
                "p2pmesh up --moe-quality kl=0.18"
            ),
        ),
    ],
)
def test_the_table_says_what_to_do(divergences: list[int], words: str) -> None:
    found = [
        Measured(
            quality=ShardQuality(
                ShardKind.EXPERTS, "ab" * 32, EXPERTS, critical, divergence, 912_345
            ),
            holds=f"{critical} of {EXPERTS} experts",
            size_bytes=2**20,
            figures={
                "code": Figures(divergence / 1e6, 0.5, 1.0),
                "prose": Figures(0.001, 0.75, 1.0),
            },
        )
        for critical, divergence in enumerate(divergences, 8)
    ]
    text = module.text_of(found)
    head, first, *_ = text.splitlines()
    assert "KL CODE" in head
    assert first.split()[4:] == [
        "1.0", "MiB", "91.2%", f"{divergences[0] / 1e6:.3f}", "0.001",
        f"{divergences[0] / 1e6:.3f}", "50.0%",
    ]  # fmt: skip
    assert text.endswith(words)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whoever_stops_it_finds_no_answers_left(number: signal.Signals, folder: Path) -> None:
    ranked(MODEL, LAYERS)
    text = folder / "endless.txt"
    text.write_bytes(TEXTS["prose"].read_bytes() * 500)
    arguments = ["--home", str(HOME), "--engine", str(native() / SERVER), str(MODEL)]
    command = [sys.executable, "-m", "p2pmesh", "experts", "measure", "--kind=experts", *arguments]
    process = subprocess.Popen(
        [*command, "--text", str(text)], stderr=subprocess.PIPE, env=os.environ, text=True
    )
    cache = HOME / "cache"
    assert wait_until(lambda: any(cache.glob("measure-*/pilot.answers")), DEADLINE_S)
    process.send_signal(number)
    _, said = process.communicate(timeout=DEADLINE_S)
    if number != signal.SIGKILL:
        assert process.returncode == 1
        assert said == "p2pmesh: Stopped; the sizes that were measured to their end are kept\n"
        assert not list(cache.glob("measure-*"))
    assert not list(HOME.glob("rankings/*.measured"))

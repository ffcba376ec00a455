"""The search order, with the wheel's real server and stand-in programs elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from p2pmesh.engine import find
from p2pmesh.engine.confinement import Confinement
from p2pmesh.engine.find import Engine, find_engine, managed_directory, survey
from p2pmesh.errors import ConfigError, EngineError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="stand-ins are shell scripts")

GREETING = "version: 0.6.0-dev (build 11434, commit unknown)"


# As llama.cpp prints them: short and other names beside the long one, then what it is.
OLD_HELP = """
-c,    --ctx-size N                     size of the prompt context (env: LLAMA_ARG_CTX_SIZE)
-np,   --parallel N                     number of parallel sequences to decode (default: 1)
-dev,  --device <dev1,dev2,..>          comma-separated list of devices, see --list-devices
-t,    --threads N                      number of threads to use during generation
-b,    --batch-size N                   logical maximum batch size (default: 2048)
-ub,   --ubatch-size N                  physical maximum batch size (default: 512)
-m,    --model FNAME                    model path
-a,    --alias STRING                   set alias for model name (to be used by REST API)
--host HOST                             ip address to listen
--port PORT                             port to listen (default: 8080)
--no-webui                              Disable the Web UI (default: enabled)
--embedding, --embeddings               restrict to only support embedding use case
--reranking, --rerank                   enable reranking endpoint on server
--threads-http N                        number of threads used to process HTTP requests
--jinja                                 use jinja template for chat
"""
HELP = f"""{OLD_HELP}
-kvu,  --kv-unified                     use single unified KV buffer for the KV cache
--offline                               Offline mode: forces use of cache
"""


def stand_in(
    directory: Path, greeting: str = GREETING, rpc: str | None = None, manual: str = HELP
) -> Path:
    """A program that answers llama-server's three questions, and an RPC server beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    server = directory / "llama-server"
    devices = "printf 'Available devices:\\n  CUDA0: NVIDIA X (100 MiB, 50 MiB free)\\n'"
    answers = f'--version) echo "{greeting}" >&2;; --help) echo "{manual}";; *) {devices};;'
    server.write_text(f'#!/bin/sh\ncase "$1" in {answers} esac\n')
    server.chmod(0o755)
    if rpc is not None:
        beside = directory / "ggml-rpc-server"
        beside.write_text(f'#!/bin/sh\n[ "$2" = 256.256.256.256 ] && echo "{rpc}"\n')
        beside.chmod(0o755)
    return server


def environ(*directories: Path) -> dict[str, str]:
    return {"PATH": os.pathsep.join(map(str, directories))}


def publish(managed: Path, rpc: str | None = None) -> Path:
    server = stand_in(managed / "b1" / "bin", rpc=rpc)
    (managed / "current").write_text("b1\n")
    return server


def test_the_users_choice_comes_first(tmp_path: Path) -> None:
    server = stand_in(tmp_path / "mine")
    publish(tmp_path / "engine")
    engine = find_engine(server, tmp_path / "engine", environ())
    assert (engine.source, engine.kind, engine.command) == ("option", "native", (str(server),))


def test_the_users_choice_may_be_a_directory(tmp_path: Path) -> None:
    server = stand_in(tmp_path / "mine")
    engine = find_engine(tmp_path / "mine", tmp_path / "engine", environ())
    assert engine.command == (str(server),)


def test_then_the_managed_one(tmp_path: Path) -> None:
    server = publish(tmp_path / "engine", rpc="Starting RPC server v7.0.0")
    stand_in(tmp_path / "bin")
    engine = find_engine(None, tmp_path / "engine", environ(tmp_path / "bin"))
    assert engine.source == "managed"
    assert engine.command == (str(server),)
    assert engine.rpc == "7.0.0"
    assert engine.rpc_command == (str(server.parent / "ggml-rpc-server"),)
    assert engine.version == "b11434"
    assert engine.confinement.level == "none"  # the stand-ins are scripts
    assert engine.rpc_confinement == engine.confinement
    assert not engine.confines_stages
    assert [device.id for device in engine.devices] == ["CUDA0"]


@pytest.mark.parametrize(("found", "level"), [("CUDA0", "full"), ("CUDA1", "none")])
def test_an_engine_that_misses_its_accelerator_when_confined_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str, level: str
) -> None:
    server = stand_in(tmp_path)
    other = tmp_path / "confined"
    other.write_text(server.read_text().replace("CUDA0", found))
    other.chmod(0o755)
    monkeypatch.setattr(find, "confinement_of", lambda _: Confinement("full"))
    monkeypatch.setattr(find, "confined", lambda argv, *_: [str(other), *argv[1:]])
    confinement = find_engine(server, tmp_path, environ()).confinement
    assert confinement.level == level
    assert confinement.reason in ("", "confined, it does not find CUDA0")


def test_then_the_path(tmp_path: Path) -> None:
    server = stand_in(tmp_path / "bin", greeting="version: 6400 (abc1234)")
    engine = find_engine(None, tmp_path / "engine", environ(tmp_path / "bin"))
    assert (engine.source, engine.command) == ("path", (str(server),))
    assert engine.version == "b6400"
    assert engine.rpc is None
    assert engine.rpc_command == ()


def test_a_link_on_the_path_finds_the_rpc_server_beside_its_target(tmp_path: Path) -> None:
    server = stand_in(tmp_path / "opt", rpc="Starting RPC server v3.5.1")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llama-server").symlink_to(server)
    engine = find_engine(None, tmp_path / "engine", environ(tmp_path / "bin"))
    assert engine.rpc == "3.5.1"


def test_an_rpc_server_that_does_not_say_its_version(tmp_path: Path) -> None:
    server = stand_in(tmp_path, rpc="hello")
    assert find_engine(server, tmp_path, environ()).rpc is None


def test_last_comes_the_wheel(tmp_path: Path) -> None:
    engine = find_engine(None, tmp_path / "engine", environ())
    assert engine == Engine(
        kind="embedded",
        command=find._EMBEDDED,
        source="wheel",
        version=engine.version,
        warnings=engine.warnings,
        devices=engine.devices,
        confinement=engine.confinement,
    )
    assert engine.confinement.level == "none"
    assert engine.version[0].isdigit()


def test_a_broken_managed_engine_is_passed_over_and_shown(tmp_path: Path) -> None:
    publish(tmp_path / "engine").write_text("#!/bin/sh\nexit 1\n")
    findings = list(survey(None, tmp_path / "engine", environ()))
    assert [finding.source for finding in findings] == ["managed", "path", "wheel"]
    assert findings[0].problem == "it is not a llama-server that p2pmesh can use: silence"
    assert findings[1].problem == "no llama-server on the path"
    assert findings[2].engine is not None
    assert find_engine(None, tmp_path / "engine", environ()).source == "wheel"


@pytest.mark.parametrize(
    ("prepare", "problem"),
    [
        (lambda _: None, "there is no such file"),
        (lambda path: path.touch(mode=0o644), "it is not executable"),
        (
            lambda path: stand_in(path.parent, greeting="GNU true 9"),
            "it is not a llama-server that p2pmesh can use: GNU true 9",
        ),
        (
            lambda path: (path.write_bytes(b"\x7fELF junk"), path.chmod(0o755)),
            "it cannot be run: Exec format error",
        ),
    ],
    ids=["missing", "not executable", "another program", "not a program"],
)
def test_a_wrong_choice_is_one_sentence(tmp_path: Path, prepare: object, problem: str) -> None:
    path = tmp_path / "llama-server"
    assert callable(prepare)
    prepare(path)
    publish(tmp_path / "engine")
    with pytest.raises(ConfigError, match=f"^--engine {path}: {problem}$"):
        find_engine(path, tmp_path / "engine", environ())


OLD = "version: 4800 (abc1234)"
TOO_OLD = "llama-server b4800 is too old: it does not know --kv-unified, --offline"


def test_an_engine_that_lacks_a_flag_is_passed_over_and_named(tmp_path: Path) -> None:
    server = stand_in(tmp_path / "bin", OLD, manual=OLD_HELP)
    engine = find_engine(None, tmp_path / "engine", environ(tmp_path / "bin"))
    assert engine.source == "wheel"
    assert engine.warnings[0] == f"Not used: {server}: {TOO_OLD}"


def test_a_chosen_engine_that_lacks_a_flag_is_one_sentence(tmp_path: Path) -> None:
    server = stand_in(tmp_path / "bin", OLD, manual=OLD_HELP)
    with pytest.raises(ConfigError) as caught:
        find_engine(server, tmp_path / "engine", environ())
    assert str(caught.value) == f"--engine {server}: {TOO_OLD}"


def test_a_newer_engine_that_lost_a_flag_is_not_called_old(tmp_path: Path) -> None:
    lost = HELP.replace("--no-webui ", "--no-ui    ")
    server = stand_in(tmp_path / "bin", "version: 99999 (abc1234)", manual=lost)
    with pytest.raises(ConfigError, match=r"b99999 is too new for this p2pmesh.* --no-webui$"):
        find_engine(server, tmp_path / "engine", environ())


def test_an_engine_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "QUESTION_S", 0.2)
    server = stand_in(tmp_path)
    server.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(ConfigError, match="did not answer within"):
        find_engine(server, tmp_path, {"PATH": os.environ["PATH"]})


def test_no_engine_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_EMBEDDED", (sys.executable, "-c", "print('no module')"))
    with pytest.raises(EngineError, match=r"No engine works here .*xllamacpp.*no module"):
        find_engine(None, tmp_path, environ())


def test_a_gpu_left_idle_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path / "tools").rename(tmp_path / "tools" / "nvidia-smi")
    engine = find_engine(None, tmp_path / "engine", environ(tmp_path / "tools"))
    if not engine.devices:
        assert "NVIDIA GPU found but unused: p2pmesh engine install" in engine.warnings[0]


@pytest.mark.parametrize("content", ["", "..", "../b1", "a/b", "b2", "\x00", "/"])
def test_a_damaged_pointer_is_no_engine(tmp_path: Path, content: str) -> None:
    publish(tmp_path / "engine")
    (tmp_path / "engine" / "current").write_text(content)
    assert managed_directory(tmp_path / "engine") is None

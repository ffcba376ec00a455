"""What users get wrong: each mistake is one sentence, the right exit code, and nothing left over.

Exit code 2: it was asked for wrongly. Exit code 1: it was right and could not be done.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
import trio

import p2pmesh
from p2pmesh.identity.hello import Peer
from p2pmesh.transport.base import Channel
from p2pmesh.transport.tls import TlsTransport
from tests.mesh.hostile import ANSWER, ask
from tests.mesh.nodes import (
    ANYWHERE,
    Node,
    assert_gone,
    cli,
    environment,
    program,
    running,
)
from tests.transport.networks import someone

PORTS = tuple(f"--{port}={ANYWHERE}" for port in ("api", "console", "peer"))
DEADLINE_S = 30.0
TINY = Path(p2pmesh.__file__).parent / "models" / "data" / "p2pmesh-demo-tiny.gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """A command line and what has to come of it.

    Attributes:
        arguments: `{home}`, `{here}` are filled in; `here` has the files of `_lay_out`.
        code: The exit code.
        says: Words that the sentence holds.
    """

    arguments: tuple[str, ...]
    code: int
    says: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes | None] = field(default_factory=dict)


def up(*arguments: str, code: int, says: tuple[str, ...]) -> Mistake:
    return Mistake(arguments=("up", *PORTS, *arguments), code=code, says=says)


def home(name: str, content: bytes | None, *says: str, code: int = 1) -> Mistake:
    """A start in a home with this file, or folder where there is no content."""
    files = {f"home/{name}": content}
    return replace(up(code=code, says=says), files=files)


def config(text: bytes, *says: str) -> Mistake:
    return home("config.toml", text, "config.toml", *says, code=2)


MISTAKES: Mapping[str, Mistake] = {
    # The command line itself.
    "an unknown command": Mistake(arguments=("upp",), code=2, says=("upp", "p2pmesh --help")),
    "an unknown option": up("--modell=x", code=2, says=("--modell", "--model")),
    "an argument too many": up("extra", code=2, says=("extra", "p2pmesh up --help")),
    "an option without its value": Mistake(arguments=("up", "--api"), code=2, says=("--api",)),
    # Values.
    "an empty home": up("--home=", code=2, says=("--home", "empty")),
    "an empty name": up("--name=", code=2, says=("--name", "64")),
    "a name too long": up("--name=" + "x" * 65, code=2, says=("--name", "64")),
    "a name of two lines": up("--name=a\nb", code=2, says=("--name", "printable")),
    "an empty address": up("--api=", code=2, says=("--api", "HOST:PORT")),
    "a port that does not exist": up("--api=127.0.0.1:65536", code=2, says=("--api", "65535")),
    "a port below zero": up("--console=127.0.0.1:-1", code=2, says=("--console", "HOST:PORT")),
    "a join without sense": up("--join=:::", code=2, says=("--join", "HOST:PORT")),
    "a size without sense": up("--memory=lots", code=2, says=("--memory", "8GiB")),
    "a size below zero": up("--memory=-3GB", code=2, says=("--memory", "8GiB")),
    "no slots": up("--slots=0", code=2, says=("--slots", "whole number")),
    "a context without sense": up("--context=much", code=2, says=("--context", "whole number")),
    # Variables and the file.
    "a variable without sense": replace(
        up(code=2, says=("P2PMESH_MEMORY", "8GiB")), environ={"P2PMESH_MEMORY": "much"}
    ),
    "a file that is not TOML": config(b"x = = 1", "line 1"),
    "a file that is not text": config(b"\xff\xfe", "UTF-8"),
    "a setting that does not exist": config(b'memroy = "1GB"', "memroy", "memory"),
    "a setting of the wrong type": config(b"memory = 1.5", "memory"),
    # Paths.
    "a home that is a file": up("--home={here}/file", code=2, says=("{here}/file", "--home")),
    "a home below a file": up("--home={here}/file/x", code=2, says=("{here}/file", "--home")),
    "a home that cannot be made": up("--home=/proc/x", code=1, says=("/proc/x", "--home")),
    "no such model": up("--model={here}/no.gguf", code=2, says=("no.gguf", "p2pmesh models")),
    "a folder for a model": up("--model={here}", code=2, says=("{here}", "folder")),
    "a device for a model": up("--model=/dev/null", code=2, says=("/dev/null", "GGUF")),
    "an empty model": up("--model={here}/empty.gguf", code=1, says=("empty.gguf", "again")),
    "a model of random bytes": up("--model={here}/junk.gguf", code=1, says=("junk.gguf", "GGUF")),
    "half a model": up("--model={here}/half.gguf", code=1, says=("half.gguf", "again")),
    "a part of a model": up(
        "--model={here}/m-00001-of-00002.gguf", code=1, says=("m-00002-of-00002.gguf", "missing")
    ),
    "no such engine": up("--engine={here}/no", code=2, says=("--engine", "{here}/no")),
    "an engine that is text": up("--engine={here}/file", code=2, says=("--engine", "executable")),
    "another program as the engine": up(
        f"--engine={sys.executable}", code=2, says=("--engine", "llama-server")
    ),
    # The machine.
    "an address of another machine": up(
        "--api=203.0.113.7:0", code=1, says=("203.0.113.7", "--api")
    ),
    "a host that does not exist": up("--api=no.invalid:0", code=1, says=("no.invalid", "--api")),
    "a join that nobody answers": up(
        "--join=127.0.0.1:1", code=1, says=("127.0.0.1:1", "p2pmesh up")
    ),
    # A home that was damaged.
    "a damaged key": home("node.key", b"junk", "node.key", "delete it"),
    "a key that is a folder": home("node.key", None, "node.key"),
    "a damaged mesh": home("mesh.json", b"{", "mesh.json", "delete it"),
    "an epoch that is a folder": home("epoch", None, "epoch", "--home"),
    "a lock that is a folder": home("lock", None, "lock", "--home"),
    "logs that are a file": home("logs", b"", "logs", "--home"),
    "a log that is a folder": home("logs/node.log", None, "node.log", "--home"),
    "a run file that is a folder": home("run.json", None, "run.json", "--home"),
    # Commands that need a node.
    "a status without a node": Mistake(
        arguments=("status", "--home={home}"), code=1, says=("No node is running here: p2pmesh up",)
    ),
    "a chat without a node": Mistake(
        arguments=("chat", "--home={home}", "hello"),
        code=1,
        says=("No node is running here: p2pmesh up",),
    ),
    "a status of a damaged run file": Mistake(
        arguments=("status", "--home={home}"),
        code=1,
        says=("run.json", "delete it"),
        files={"home/run.json": b'{"pid": 1}'},
    ),
}

# Half a second each: the quick tier has another of the same kind.
RARE = {
    "an argument too many",
    "an empty name",
    "a name of two lines",
    "a port below zero",
    "a size below zero",
    "no slots",
    "a context without sense",
    "a file that is not text",
    "a setting of the wrong type",
    "a home below a file",
    "a device for a model",
    "an empty model",
    "an engine that is text",
    "a host that does not exist",
    "a join that nobody answers",  # five seconds, as the other may be starting
    "a key that is a folder",
    "an epoch that is a folder",
    "a lock that is a folder",
    "logs that are a file",
    "a run file that is a folder",
}
assert MISTAKES.keys() >= RARE


def _lay_out(here: Path, files: Mapping[str, bytes | None]) -> None:
    (here / "file").write_text("text")
    (here / "empty.gguf").touch()
    (here / "junk.gguf").write_bytes(bytes(range(256)) * 40)
    (here / "half.gguf").write_bytes(TINY.read_bytes()[:5_000_000])
    (here / "m-00001-of-00002.gguf").symlink_to(TINY)
    for name, content in files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)


def assert_sentence(done: subprocess.CompletedProcess[str], code: int, *says: str) -> None:
    """One line on standard error, nothing on standard output, and the right exit code."""
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("p2pmesh: ")
    assert "Traceback" not in line
    assert "a bug" not in line
    assert "Errno" not in line
    for words in says:
        assert words in line
    assert done.returncode == code


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(mistake, id=name, marks=[pytest.mark.full] if name in RARE else [])
        for name, mistake in MISTAKES.items()
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, mistake: Mistake) -> None:
    _lay_out(tmp_path, mistake.files)
    home = tmp_path / "home"
    arguments, says = (
        [text.format(home=home, here=tmp_path) for text in texts]
        for texts in (mistake.arguments, mistake.says)
    )
    done = cli(*arguments, **{"P2PMESH_HOME": str(home), **mistake.environ})
    assert_sentence(done, mistake.code, *says)
    assert not (home / "run.json").is_file() or "home/run.json" in mistake.files
    assert not _left_over(str(tmp_path))


def _left_over(folder: str) -> list[psutil.Process]:
    """Processes that have to do with a test's folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(folder in word for word in process.info["cmdline"] or ())
    ]


def test_debug_shows_where_it_happened(tmp_path: Path) -> None:
    done = cli("up", f"--home={tmp_path}", "--memory=lots", "--debug")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("p2pmesh: --memory: 'lots'")


# --- what is taken, forbidden or full ---------------------------------------------------------


def test_what_another_node_has_is_not_taken_from_it(tmp_path: Path) -> None:
    with running(tmp_path, 1) as [node]:
        done = cli("up", *PORTS, f"--home={node.me['home']}")
        assert_sentence(done, 1, node.me["home"], "already", "--home DIR")
        done = cli("up", *PORTS, f"--home={tmp_path / 'b'}", f"--api={node.me['api']}")
        assert_sentence(done, 1, node.me["api"], "another program", "--api HOST:PORT")
        assert node.run_file().exists()
        assert ask(node).text == ANSWER


def test_a_default_port_that_is_taken_moves_on_and_says_so(tmp_path: Path) -> None:
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # it is taken already: just what is needed
            other.bind(("127.0.0.1", 9337))
            other.listen()
        log = tmp_path / "err"
        with log.open("wb") as err:
            process = subprocess.Popen(
                [*program(), "up", "--json", f"--home={tmp_path}", *PORTS[1:]],
                stdout=subprocess.PIPE,
                stderr=err,
                env=environment(),
            )
        try:
            assert process.stdout is not None
            me = json.loads(process.stdout.readline())["nodes"][0]
            assert me["api"] != "127.0.0.1:9337"
            assert log.read_text() == f"Port 9337 is taken: api is at {me['api']}\n"
        finally:
            process.terminate()
            process.communicate(timeout=DEADLINE_S)


@pytest.mark.skipif(sys.platform != "linux", reason="takes root's rights away as Linux does")
@pytest.mark.parametrize(("mode", "code", "file"), [(0, 2, "config.toml"), (0o500, 1, "cache")])
def test_a_home_of_somebody_else_is_one_sentence(
    tmp_path: Path, mode: int, code: int, file: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(mode)
    done = subprocess.run(
        [*program(), "up", *PORTS, f"--home={home}"],
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=_obey_permissions(),
        timeout=DEADLINE_S,
        check=False,
    )
    assert_sentence(done, code, f"{home}/{file}", "Permission denied", "--home")


def _obey_permissions() -> Callable[[], None]:
    """Even root: takes the rights away that let it pass by a file's mode."""
    prctl = ctypes.CDLL(None).prctl

    def drop() -> None:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP

    return drop


def _on_a_small_disk(size: str, folder: Path, *command: str) -> list[str]:
    """The command, with a disk of its own at `folder` that nobody else sees and that ends with it.

    Skips the test where the system does not allow that.
    """
    script = 'mount -t tmpfs -o size=$0 none "$1" && shift && exec "$@"'
    allowed = ["unshare", "-m", "sh", "-c", script, size, str(folder)]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*allowed, "true"], check=False).returncode
    ):
        pytest.skip("only root on Linux has a small disk for a test")
    return [*allowed, *command]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    command = [*program(), "up", *PORTS, f"--home={home}"]
    fill = ["sh", "-c", f'head -c 1M /dev/zero > {home}/filler 2> /dev/null; exec "$@"', "sh"]
    done = subprocess.run(
        _on_a_small_disk("64k", home, *fill, *command),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=DEADLINE_S,
        check=False,
    )
    assert_sentence(done, 1, str(home), "No space left on device", "make room")


def test_a_disk_that_fills_up_costs_no_answer(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    command = [*program(), "up", "--json", *PORTS, f"--home={home}"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            _on_a_small_disk("256k", home, *command),
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment(),
        ) as process,
    ):
        assert process.stdout is not None
        node = Node(process, json.loads(process.stdout.readline()), log)
        try:
            engines = node.engines()
            with (
                contextlib.suppress(OSError),
                Path(f"/proc/{process.pid}/root{home}/filler").open("wb", buffering=0) as filler,
            ):
                while filler.write(bytes(4096)):
                    pass
            assert ask(node).text == ANSWER
            next(one for one in engines if not one.children()).kill()
            assert ask(node).text == ANSWER
        finally:
            process.terminate()
            process.wait(DEADLINE_S)
        assert process.returncode == 0
        assert "Traceback" not in node.said()
    assert_gone(engines)


# --- what starts and cannot serve -------------------------------------------------------------


def test_a_model_that_no_memory_is_given_for_is_not_served_and_why_is_said(
    tmp_path: Path,
) -> None:
    model = _another_model(tmp_path)
    with subprocess.Popen(
        [*program(), "up", *PORTS, f"--home={tmp_path}", "--memory=1MB", f"--model={model}"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("Waiting"))
            for words in ("mine: not served: needs ", "0.9 MiB", "takes more memory"):
                assert words in line
            [mine] = [
                one
                for one in json.loads(cli("status", "--json", f"--home={tmp_path}").stdout)[
                    "models"
                ]
                if one["id"] == "mine"
            ]
            assert mine["state"] == "not served"
            assert mine["reason"] in line
            assert process.poll() is None
        finally:
            process.terminate()
    assert process.returncode == 0


def _another_model(folder: Path) -> Path:
    """A model with other bytes than the embedded one, that answers like it."""
    content = bytearray(TINY.read_bytes())
    content[-1] ^= 1
    path = folder / "mine.gguf"
    path.write_bytes(content)
    return path


@pytest.mark.full
@pytest.mark.parametrize("how", ["vanished", "was cut off", "became junk"])
def test_a_model_whose_file_is_lost_while_served_fails_and_the_node_lives(
    tmp_path: Path, how: str
) -> None:
    model = _another_model(tmp_path)
    with running(tmp_path, 1, f"--model={model}") as [node]:
        assert ask(node).text == ANSWER
        if how == "was cut off":
            os.truncate(model, 1_000_000)
        else:
            model.unlink()
        if how == "became junk":
            model.write_bytes(b"x" * 1000)
        next(one for one in node.engines() if not one.children()).kill()
        reply = ask(node)
        assert reply.status == 503
        assert "mine" in reply.text
        [mine] = [one for one in node.status()["models"] if one["id"] == "mine"]
        assert mine["state"] == "failed"
        assert mine["replicas"][0]["detail"]


# --- the mesh ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead_s", "says"),
    [
        (3 * 3600 + 125, "This clock is 3 h 02 min behind the mesh; set it and start again"),
        (-150, "This clock is 2 min ahead of the mesh; set it and start again"),
    ],
)
async def test_a_clock_that_is_off_is_one_sentence(tmp_path: Path, ahead_s: int, says: str) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    transport = TlsTransport(lambda: someone(1), listeners, lambda: time.time() + ahead_s)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.serve, _ignore_channel, _ignore_stream)
        command = ["up", *PORTS, f"--home={tmp_path}", f"--join={transport.address}"]
        done = await trio.to_thread.run_sync(lambda: cli(*command))
        nursery.cancel_scope.cancel()
    assert_sentence(done, 1, says)
    assert not (tmp_path / "mesh.json").exists()


async def _ignore_channel(channel: Channel) -> None:
    await trio.sleep_forever()


async def _ignore_stream(peer: Peer, stream: trio.abc.Stream) -> None:
    await trio.sleep_forever()

"""What goes wrong around a node: each trouble is one sentence, or is survived."""

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
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from p2pmesh.models.store import EMBEDDED
from p2pmesh.node.joining import JOIN_WAIT_S
from p2pmesh.transport.base import Channel
from p2pmesh.transport.tls import TlsTransport
from tests.mesh.hostile import ANSWER, ask
from tests.mesh.nodes import (
    ANY_PORTS,
    Node,
    assert_gone,
    assert_sentence,
    cli,
    environment,
    program,
    running,
)
from tests.transport.networks import someone

DEADLINE_S = 30.0


# --- what is taken, forbidden or full ---------------------------------------------------------


def test_what_another_node_has_is_not_taken_from_it(tmp_path: Path) -> None:
    with running(tmp_path, 1) as [node]:
        done = cli("up", *ANY_PORTS, f"--home={node.me['home']}")
        assert_sentence(done, 1, node.me["home"], "already", "--home DIR")
        done = cli("up", *ANY_PORTS, f"--home={tmp_path / 'b'}", f"--api={node.me['api']}")
        assert_sentence(done, 1, node.me["api"], "another program", "--api HOST:PORT")
        assert node.run_file().exists()
        assert ask(node).text == ANSWER


def test_joining_at_the_port_of_an_api_says_so_at_once(tmp_path: Path) -> None:
    with running(tmp_path, 1) as [node]:
        started = time.monotonic()
        join = f"--join={node.me['api']}"
        done = cli("up", *ANY_PORTS, f"--home={tmp_path / 'b'}", join)
        assert time.monotonic() - started < JOIN_WAIT_S
        assert_sentence(done, 1, node.me["api"], "is the API of a node", "9338")


def test_a_default_port_that_is_taken_moves_on_and_says_so(tmp_path: Path) -> None:
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # it is taken already: just what is needed
            other.bind(("127.0.0.1", 9337))
            other.listen()
        log = tmp_path / "err"
        with log.open("wb") as err:
            process = subprocess.Popen(
                [*program(), "up", "--json", f"--home={tmp_path}", *ANY_PORTS[1:]],
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
        [*program(), "up", *ANY_PORTS, f"--home={home}"],
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
    command = [*program(), "up", *ANY_PORTS, f"--home={home}"]
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
    command = [*program(), "up", "--json", *ANY_PORTS, f"--home={home}"]
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
        [*program(), "up", *ANY_PORTS, f"--home={tmp_path}", "--memory=1MB", f"--model={model}"],
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
    content = bytearray(EMBEDDED.read_bytes())
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
        await nursery.start(transport.serve, _ignore_channel, {})
        command = ["up", *ANY_PORTS, f"--home={tmp_path}", f"--join={transport.address}"]
        done = await trio.to_thread.run_sync(lambda: cli(*command))
        nursery.cancel_scope.cancel()
    assert_sentence(done, 1, says)
    assert not (tmp_path / "mesh.json").exists()


async def _ignore_channel(channel: Channel) -> None:
    await trio.sleep_forever()

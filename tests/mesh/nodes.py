"""Real nodes as processes of the installed program, each with a home of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from p2pmesh.home import Home
from p2pmesh.node.memory_speed import remember

MEMORY_MIB_PER_S = 24_576
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.02
ANYWHERE = "127.0.0.1:0"
ANY_PORTS = tuple(f"--{port}={ANYWHERE}" for port in ("api", "console", "peer"))


def program() -> list[str]:
    """The installed `p2pmesh` of the environment that runs the tests."""
    beside = Path(sys.executable).parent / ("p2pmesh.exe" if sys.platform == "win32" else "p2pmesh")
    found = str(beside) if beside.exists() else shutil.which("p2pmesh")
    assert found, "the tests run the installed program: pip install ."
    return [found]


def environment(**more: str) -> dict[str, str]:
    """This environment without the user's own settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("P2PMESH_")}
    return {**clean, **more}


@dataclass(slots=True)
class Node:
    """One node process and what it said when it was ready."""

    process: subprocess.Popen[bytes]
    line: dict[str, Any]
    log: IO[bytes]
    inside: Sequence[str] = ()
    """A command that runs another one where this node is, as in a network of its own."""

    @property
    def me(self) -> dict[str, Any]:
        me: dict[str, Any] = self.line["nodes"][0]
        return me

    @property
    def api(self) -> str:
        return f"http://{self.me['api']}/v1"

    @property
    def name(self) -> str:
        return str(self.me["name"])

    def run_file(self) -> Path:
        return Path(self.me["home"]) / "run.json"

    def engines(self) -> list[psutil.Process]:
        """Everything that this node started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def status(self) -> dict[str, Any]:
        done = cli("status", "--json", "--home", self.me["home"], inside=self.inside)
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def order(self, name: str, **values: Any) -> dict[str, Any]:
        """Have this node do something about members, over its control API.

        Raises:
            urllib.error.HTTPError: It refuses.
        """
        run = json.loads(self.run_file().read_text())
        request = urllib.request.Request(
            f"http://{run['console']}/api/orders/{name}",
            data=json.dumps(values).encode(),
            headers={"Authorization": f"Bearer {run['token']}"},
        )
        with urllib.request.urlopen(request, timeout=STOP_TIMEOUT_S) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def invite(self, **values: Any) -> str:
        """A token with which any number of nodes may join, unless `values` say otherwise."""
        return str(self.order("invite", **{"uses": 0, **values})["token"])

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()


def start(
    home: Path,
    *options: str,
    name: str = "node",
    timeout_s: float = READY_TIMEOUT_S,
    descriptors: int | None = None,
    inside: Sequence[str] = (),
    command: Sequence[str] = ("up",),
) -> Node:
    """Start a node and wait until it is ready.

    Args:
        home: Its data.
        options: Of `p2pmesh up`.
        name: How it is called in the mesh.
        timeout_s: How long it may take.
        descriptors: How many files and sockets it may have open.
        inside: A command that runs another one in a network of its own, where the default ports
            are free; without it the node listens on loopback at any port.
        command: The command of p2pmesh that runs it, with its arguments.
    """
    home.mkdir(parents=True, exist_ok=True)
    remember(Home.at(home).memory_speed_file, MEMORY_MIB_PER_S)  # measured, it takes a second
    log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the node
    limit = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh"] if descriptors else []
    common = "--json", "--until-eof", f"--home={home}", f"--name={name}"
    ports = () if inside else ANY_PORTS
    process = subprocess.Popen(
        [*inside, *limit, *program(), *command, *common, *ports, *options],
        stdin=subprocess.PIPE,  # so that the node ends with the tests, however they end
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment(),
    )
    assert process.stdout is not None
    alarm = time.monotonic() + timeout_s
    line = process.stdout.readline()
    assert time.monotonic() < alarm, "the node took too long"
    node = Node(process, json.loads(line) if line else {}, log, inside)
    assert line, node.said()
    return node


@contextmanager
def running(folder: Path, count: int, *options: str) -> Iterator[list[Node]]:
    """A mesh of `count` nodes; the first one is ready before the others join."""
    nodes: list[Node] = []
    try:
        for number in range(count):
            join = ["--join", nodes[0].invite()] if nodes else []
            name = f"node-{number + 1}"
            nodes.append(start(folder / name, *join, *options, name=name))
        yield nodes
    finally:
        for node in nodes:
            end(node)


def end(node: Node) -> None:
    """Stop a node, frozen or not, and see that nothing of it is left."""
    if node.process.poll() is None:
        with_children = node.engines()
        node.process.send_signal(signal.SIGCONT)
        node.process.send_signal(signal.SIGTERM)
        try:
            node.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            node.process.kill()
            node.process.wait()
            raise
        finally:
            assert_gone(with_children)
    for pipe in (node.process.stdin, node.process.stdout):
        if pipe is not None:
            pipe.close()
    node.log.close()


def assert_gone(processes: list[psutil.Process], within_s: float = 2.0) -> None:
    """All of these end in time."""
    wait_until(lambda: not any(map(lives, processes)), "all processes gone", within_s=within_s)


def lives(process: psutil.Process) -> bool:
    """Whether it runs; one that ended and waits for its new parent to notice does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until(true: Callable[[], bool], what: str, *, within_s: float = 20.0) -> float:
    """Poll until `true()`; returns how long it took."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < within_s, f"not in {within_s} s: {what}"
        time.sleep(POLL_S)
    return time.monotonic() - started


def cli(
    *arguments: str, inside: Sequence[str] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*inside, *program(), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(**more),
        timeout=120,
        check=False,
    )


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


def owners(status: Mapping[str, Any]) -> list[str]:
    """The names of the nodes that serve something, from a status."""
    return [node["name"] for node in status["nodes"] if node["models"]]

"""Real nodes as processes, for measurements: `p2pmesh up --json` on loopback, a home for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import trio

from p2pmesh.control import Control, read_run_file
from p2pmesh.home import Home
from simulations.load import Place

ANY_PORT = "127.0.0.1:0"
# From the start of the process to its line; slow disks and busy machines included.
READY_S = 60.0
# A node finishes what it does within 10 s and its goodbye within 1.
STOP_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProcess:
    """A running node, as its own line describes it."""

    name: str
    pid: int
    api: Place
    peer: str
    home: Path

    async def invite(self) -> str:
        """Return a token with which any number of nodes join this node's mesh."""
        control = Control(read_run_file(Home.at(self.home).run_file))
        values = {"uses": 0}
        made = await trio.to_thread.run_sync(partial(control.order, "invite", values))
        return str(made["token"])


@asynccontextmanager
async def node_process(home: Path, name: str, *options: str) -> AsyncIterator[NodeProcess]:
    """A node that is up; stopped at the end of the block, by force if need be.

    Raises:
        RuntimeError: It did not come up; with what it said.
    """
    await trio.Path(home).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "p2pmesh", "up", "--json", "--home", str(home)]
    command += ["--name", name, "--api", ANY_PORT, "--console", ANY_PORT, "--peer", ANY_PORT]
    said = home / "stderr.txt"
    with said.open("wb") as errors:
        process = await trio.lowlevel.open_process(
            [*command, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={k: v for k, v in os.environ.items() if not k.startswith("P2PMESH_")},
        )
    try:
        line = b""
        with trio.move_on_after(READY_S):
            line = await _first_line(process)
        if not line:
            raise RuntimeError(
                f"{name} did not come up: {said.read_text(errors='replace')[-2000:]}"
            )
        node = json.loads(line)["nodes"][0]
        host, _, port = node["api"].rpartition(":")
        api = Place(host=host, port=int(port))
        yield NodeProcess(name=node["name"], pid=node["pid"], api=api, peer=node["peer"], home=home)
    finally:
        await _stop(process)


async def _first_line(process: trio.Process) -> bytes:
    assert process.stdout is not None
    line = b""
    while b"\n" not in line:
        data = await process.stdout.receive_some()
        if not data:
            return b""
        line += data
    return line.partition(b"\n")[0]


async def _stop(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):  # both waits have deadlines
        if process.returncode is None:
            process.terminate()
        with trio.move_on_after(STOP_S):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        if process.stdout is not None:
            await process.stdout.aclose()


def engine_command(pid: int) -> list[str]:
    """The command line of the engine that a node runs.

    Raises:
        RuntimeError: It runs none.
    """
    for child in psutil.Process(pid).children(recursive=True):
        command = child.cmdline()
        if "--alias" in command and "--" not in command:  # the launcher has one before the engine's
            return list(command)
    raise RuntimeError(f"the node {pid} runs no engine")


def cpu_s(pid: int) -> float:
    """The processor time that a process has used, without its children."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def rss_mib(pid: int) -> float:
    """The memory that a process holds, without its children."""
    return float(psutil.Process(pid).memory_info().rss) / (1 << 20)

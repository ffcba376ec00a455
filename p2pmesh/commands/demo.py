"""`p2pmesh demo`: a mesh of three nodes on this machine, from nothing to an answer.

Real nodes, each a process of its own with its own home in a temporary directory. They end when
this process does, however it ends: each watches its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import trio

from p2pmesh.commands.chat import Answer, answer_parts
from p2pmesh.config import ENV_PREFIX, Settings, parse_address
from p2pmesh.control import Control, read_run_file
from p2pmesh.engine.find import managed_directory
from p2pmesh.errors import LocalError
from p2pmesh.home import Home

NAMES = ("kitchen", "attic", "garage")
QUESTION = "What is the capital of France?"
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
@click.pass_context
def demo(ctx: click.Context, *, as_json: bool) -> None:
    """Start a mesh of three nodes on this machine and ask it something.

    Its files lie in a temporary directory and are gone afterwards. Stop it with Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="p2pmesh-demo-", ignore_cleanup_errors=True) as folder:
        flotilla = _Demo(Path(folder), ctx.obj, debug=ctx.meta["debug"])
        trio.run(flotilla.run, as_json)


class _Demo:
    """Three node processes."""

    def __init__(self, folder: Path, settings: Settings, *, debug: bool) -> None:
        self._folder = folder
        self._options = [*_options(settings), *(["--debug"] if debug else [])]
        self._processes: dict[str, trio.Process] = {}

    async def run(self, as_json: bool) -> None:  # noqa: FBT001 - trio.run passes by position
        """Start, show, wait for a signal or the end of all nodes, stop."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._live, as_json, nursery.cancel_scope)
                await signals.__anext__()
                nursery.cancel_scope.cancel()

    async def _live(self, as_json: bool, scope: trio.CancelScope) -> None:  # noqa: FBT001
        try:
            first = await self._start(NAMES[0], [])
            away = ["--api", "127.0.0.1:0", "--console", "127.0.0.1:0"]
            token = Control(read_run_file(Home.at(self._folder / NAMES[0]).run_file)).order(
                "invite", {"uses": len(NAMES) - 1}
            )["token"]
            join = [*away, "--join", token]
            lines = [first, *[await self._start(name, join) for name in NAMES[1:]]]
            nodes = [node for line in lines for node in line["nodes"]]
            if as_json:
                click.echo(json.dumps({"mesh": first["mesh"], "nodes": nodes}))
            else:
                await _show(first["mesh"], nodes)
            for name, process in self._processes.items():
                await process.wait()
                click.echo(f"{name} has ended", err=True)
            scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end()

    async def _start(self, name: str, options: list[str]) -> dict[str, Any]:
        home = self._folder / name
        command = [sys.executable, "-m", "p2pmesh", "up", "--json", "--until-eof"]
        command += ["--home", str(home), "--name", name, "--peer", "127.0.0.1:0"]
        # Out of this terminal's reach: Ctrl-C is for this process, which then stops them in order.
        group: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        process = await trio.lowlevel.open_process(
            [*command, *options, *self._options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)},
            **group,
        )
        self._processes[name] = process
        assert process.stdout is not None
        line = b""
        with trio.move_on_after(READY_TIMEOUT_S):
            while b"\n" not in line and (chunk := await process.stdout.receive_some()):
                line += chunk
        if b"\n" not in line:
            raise LocalError(f"The node {name} did not start; its own words are above")
        ready: dict[str, Any] = json.loads(line)
        return ready

    async def _end(self) -> None:
        """Ask all nodes at once to stop, and see to it that they did."""
        for process in self._processes.values():
            assert process.stdin is not None
            await process.stdin.aclose()
        for process in self._processes.values():
            with trio.move_on_after(STOP_TIMEOUT_S):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
            assert process.stdout is not None
            await process.stdout.aclose()


def _options(settings: Settings) -> list[str]:
    """Return the options of the demo that each of its nodes gets too."""
    engine = settings.engine or managed_directory(Home.of(settings).engine)
    single: Mapping[str, object | None] = {
        "engine": engine,
        "memory": settings.memory,
        "context": settings.context,
        "slots": settings.slots,
    }
    options = [f"--{name}={value}" for name, value in single.items() if value is not None]
    return [*options, *(f"--model={text}" for text in settings.model)]


async def _show(mesh: Mapping[str, str], nodes: list[dict[str, Any]]) -> None:
    click.echo(f"Mesh {mesh['name']}, three nodes on this machine:")
    for node in nodes:
        click.echo(
            f"  {node['name']:<8} API http://{node['api']}/v1   console http://{node['console']}/"
        )
    messages = [{"role": "user", "content": QUESTION}]
    entry = nodes[1]
    answer = await trio.to_thread.run_sync(_ask, entry["api"], messages, abandon_on_cancel=True)
    click.echo(f"\nAsked {entry['name']}, answered by {answer.served_by.partition('/')[0]}:")
    click.echo(f"  {QUESTION}\n  {answer.text}\n")
    body = json.dumps({"messages": messages, "temperature": 0})
    click.echo("Ask any of them:")
    click.echo(f"  curl http://{nodes[2]['api']}/v1/chat/completions \\")
    click.echo("    -H 'Content-Type: application/json' \\")
    click.echo(f"    -d '{body}'")
    click.echo("Ctrl-C ends the demo.")


def _ask(api: str, messages: list[dict[str, str]]) -> Answer:
    answer = Answer()
    request = {"messages": messages, "temperature": 0, "stream": True}
    for _ in answer_parts(parse_address(api), request, answer):
        pass
    return answer

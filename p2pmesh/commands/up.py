"""`p2pmesh up`: run a node in the foreground."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
import trio

from p2pmesh.commands import formatting
from p2pmesh.config import Settings, parse_address
from p2pmesh.home import Home
from p2pmesh.log import configure
from p2pmesh.node.interfaces import advertised, is_loopback

if TYPE_CHECKING:
    from p2pmesh.node.guest import Guest
    from p2pmesh.node.status import NodeStatus

LOG_FILE = "node.log"
STDIN_CHUNK_BYTES = 4096  # of what comes before the end, and is not looked at


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
@click.option("--until-eof", is_flag=True, help="Stop when standard input ends.")
@click.pass_context
def up(ctx: click.Context, *, as_json: bool, until_eof: bool) -> None:
    """Run a node: join a mesh or found one, and serve models.

    Without --model it serves the small embedded one. Stop it with Ctrl-C.
    """
    from p2pmesh.node import run as node  # half a second that a wrong option need not wait for

    settings: Settings = ctx.obj
    home = Home.of(settings)
    home.create()
    configure(home.logs / LOG_FILE, debug=ctx.meta["debug"])
    ui = JsonUi() if as_json else TextUi()
    trio.run(node.run, settings, ui, wait_stdin_eof if until_eof else None)


async def wait_stdin_eof() -> None:
    """Return when whoever holds the other end of standard input is gone."""
    # A thread, as not every kind of file can be waited on; it is left behind on cancellation.
    await trio.to_thread.run_sync(_read_to_end, abandon_on_cancel=True)


def _read_to_end() -> None:
    """Block until standard input ends; at once when there is none."""
    if sys.stdin is None:
        return
    # The descriptor, not the file object: a thread that is blocked inside `sys.stdin` holds its
    # lock, and Python aborts when it wants to flush that file at the end of the process.
    descriptor = sys.stdin.fileno()
    while os.read(descriptor, STDIN_CHUNK_BYTES):
        pass


class JsonUi:
    """For programs: one line on standard output when ready, notes on standard error."""

    def hashing(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """Nothing: a program waits for the line."""

    def note(self, sentence: str) -> None:
        """On standard error, so that the line stays alone."""
        click.echo(sentence, err=True)

    def listening(self, status: NodeStatus) -> None:
        """Nothing: a program waits for the line."""

    def ready(self, status: NodeStatus | Guest) -> None:
        """The line."""
        mesh = status.snapshot()["mesh"]
        line = {"mesh": {"id": mesh["id"], "name": mesh["name"]}, "nodes": [status.ready_line()]}
        click.echo(json.dumps(line))


class TextUi:
    """For people."""

    def hashing(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """A line that fills up; on a file or pipe only its end."""
        done = done_bytes >= total_bytes
        if sys.stdout.isatty():
            percent = 100 * done_bytes // max(total_bytes, 1)
            click.echo(f"\rReading {name}: {percent} %", nl=done)
        elif done:
            click.echo(f"Read {name}")

    def note(self, sentence: str) -> None:
        """As it is."""
        click.echo(sentence)

    def listening(self, status: NodeStatus) -> None:
        """Print the addresses of the API, the console and the mesh."""
        snapshot = status.snapshot()
        mesh, me = snapshot["mesh"], snapshot["node"]
        others = mesh["nodes"] - 1
        company = f"{others} other node{'s' * (others != 1)}" if others else "no other node yet"
        click.echo(f"Mesh     {mesh['name']}, {company}")
        for term, address, path in (("API", me["api"], "/v1"), ("Console", me["console"], "/")):
            click.echo(f"{term:<7}  {formatting.url(address)}{path}")
            if elsewhere := url_elsewhere(address):
                click.echo(f"         {elsewhere}{path} for other machines")
        for line in join_lines(snapshot):
            click.echo(line)
        engine = me["engine"]
        click.echo(f"Engine   {engine['kind']} {engine['version']}")
        for warning in me["warnings"]:
            click.echo(f"         {warning}")

    def ready(self, status: NodeStatus | Guest) -> None:
        """Print which models are served, where, and which are not."""
        # What somebody asked for first: the demonstration model only stands in for it.
        models = status.snapshot()["models"]
        for model in sorted(models, key=lambda one: not one["wanted_by"]):
            where = ", ".join(r["name"] for r in model["replicas"] if r["state"] == "ready")
            if where:
                click.echo(f"Ready    {model['id']} on {where}")
            elif model["wanted_by"] or model["copies"]:
                click.echo(f"Waiting  {model['id']}: {model['state']}: {model['reason']}")


def url_elsewhere(address: str) -> str:
    """Return the URL by which other machines reach a listener on all interfaces; "" for others."""
    bound = parse_address(address)
    best = advertised(bound)[0]
    return "" if best == bound or is_loopback(best.host) else f"http://{best}"


def join_lines(snapshot: Mapping[str, Any]) -> list[str]:
    """Say how another node joins, or why another machine cannot."""
    address = next(str(one["address"]) for one in snapshot["nodes"] if one["self"])
    command = f"Join     p2pmesh up --join {address}"
    if not is_loopback(parse_address(address).host):
        return [
            command,
            "         Whoever reaches that port can join; prompts are answered anywhere.",
        ]
    listener = parse_address(snapshot["node"]["peer"])
    why = (
        f"--peer {listener} is a loopback address"
        if is_loopback(listener.host)
        else "this one has no network address"
    )
    return [f"{command}   (on this machine)", f"         Other machines cannot join: {why}."]

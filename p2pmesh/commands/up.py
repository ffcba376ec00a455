"""`p2pmesh up`: run a node in the foreground."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
import trio

from p2pmesh.commands import formatting, members
from p2pmesh.config import Settings, parse_address
from p2pmesh.home import Home
from p2pmesh.log import configure
from p2pmesh.node.interfaces import advertised, is_loopback

if TYPE_CHECKING:
    from p2pmesh.node.guest import Guest
    from p2pmesh.node.status import NodeStatus

LINES_MAX = 12  # a start fits on the screen beside what was there
INDENT = " " * 9
OPEN = (
    "Anyone on this network can join, and the node that answers can read the prompt. "
    "Only you: --private"
)
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
    run_node(ctx, as_json=as_json, until_eof=until_eof)


def run_node(ctx: click.Context, *, as_json: bool, until_eof: bool) -> None:
    """Run a node with the settings of `ctx` until it ends."""
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
    """For people: `LINES_MAX` lines until the node is ready."""

    def __init__(self) -> None:
        self._room = LINES_MAX

    def hashing(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """A line that fills up; on a file or pipe only its end."""
        done = done_bytes >= total_bytes
        if sys.stdout.isatty():
            percent = 100 * done_bytes // max(total_bytes, 1)
            click.echo(f"\rReading {name}: {percent} %", nl=done)
        elif done:
            click.echo(f"Read {name}")
        self._room -= done

    def note(self, sentence: str) -> None:
        """As it is, whether or not there is room."""
        click.echo(sentence)
        self._room -= 1

    def listening(self, status: NodeStatus) -> None:
        """Print which mesh it is, who may join, and the addresses of the API and the console."""
        snapshot = status.snapshot()
        mesh, me = snapshot["mesh"], snapshot["node"]
        company = formatting.count(mesh["nodes"], "node") if mesh["nodes"] > 1 else "no other node"
        lines = [
            f"Mesh     {mesh['name']} ({members.kind(mesh)}), {company}",
            f"Join     {who_may_join(snapshot)}",
        ]
        lines += [f"Invite   {members.how_to_invite(snapshot)}"]
        for term, address, path in (("API", me["api"], "/v1"), ("Console", me["console"], "/")):
            lines.append(f"{term:<7}  {formatting.url(address)}{path}")
            if elsewhere := url_elsewhere(address):
                lines.append(f"         {elsewhere}{path} for other machines")
        engine = me["engine"]
        lines.append(f"Engine   {engine['kind']} {engine['version']}")
        self._say(lines)
        self._say(me["warnings"], indent=True, spare=1)

    def ready(self, status: NodeStatus | Guest) -> None:
        """Print which models are served, where, and which are not."""
        # What somebody asked for first: the demonstration model only stands in for it.
        models, lines = status.snapshot()["models"], list[str]()
        for model in sorted(models, key=lambda one: not one["wanted_by"]):
            where = ", ".join(r["name"] for r in model["replicas"] if r["state"] == "ready")
            if where:
                lines.append(f"Ready    {model['id']} on {where}")
            elif model["wanted_by"] or model["copies"]:
                lines.append(f"Waiting  {model['id']}: {model['state']}: {model['reason']}")
        self._room = max(self._room, 1)
        self._say(lines)
        self._room = sys.maxsize  # what is to be said from now on is news

    def _say(self, lines: Sequence[str], *, indent: bool = False, spare: int = 0) -> None:
        """Print lines while there is room; `spare` of it is for what comes later."""
        room = max(self._room - spare, 0)
        shown = [f"{INDENT}{line}" for line in lines] if indent else list(lines)
        if len(shown) > room > 1:
            shown[room - 1 :] = [f"{INDENT}more: p2pmesh status"]
        for line in shown[:room]:
            click.echo(line)
        self._room -= min(len(shown), room)


def url_elsewhere(address: str) -> str:
    """Return the URL by which other machines reach a listener on all interfaces; "" for others."""
    bound = parse_address(address)
    best = advertised(bound)[0]
    return "" if best == bound or is_loopback(best.host) else f"http://{best}"


def who_may_join(snapshot: Mapping[str, Any]) -> str:
    """Say who can join the mesh at this node, and who reads what its users ask."""
    mesh = snapshot["mesh"]
    listener = parse_address(snapshot["node"]["peer"])
    address = next(str(one["address"]) for one in snapshot["nodes"] if one["self"])
    if is_loopback(listener.host):
        return f"Other machines cannot join: --peer {listener} is a loopback address."
    if is_loopback(parse_address(address).host):
        return "Other machines cannot join: this one has no network address."
    if mesh["admits"] and mesh["announced"]:
        return OPEN
    if mesh["admits"]:
        return (
            f"Anyone on this network can join who knows {address}, and the node that answers can "
            "read the prompt. Only you: --private"
        )
    here = "; on this network that is all, unless you say --open" if mesh["open"] else ""
    return f"Whoever is invited can join{here}. The node that answers can read the prompt."

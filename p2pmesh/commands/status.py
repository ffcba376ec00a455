"""`p2pmesh status`: the node of this machine and its mesh on one screen."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from p2pmesh.commands import formatting, members
from p2pmesh.commands.table import Column, table
from p2pmesh.config import Settings
from p2pmesh.control import find_node
from p2pmesh.errors import LocalError
from p2pmesh.home import Home

RETRY_S = 1.0  # a restart takes about this long
LOST = "Connection to this node lost, trying again"
_CLEAR = "\x1b[H\x1b[2J\x1b[3J"

_NODES = (
    Column("NODE"),
    Column("ROLE"),
    Column("STATE", state=True),
    Column("MEMORY", right=True),
    Column("ENGINE"),
    Column("ROUND TRIP", right=True),
    Column("MODELS"),
)
_MODELS = (
    Column("MODEL"),
    Column("STATE", state=True),
    Column("SIZE", right=True),
    Column("NODES"),
    Column("WHY"),
)


@click.command()
@click.option("--watch", is_flag=True, help="Show it again whenever something changes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one line for each status.")
@click.pass_obj
def status(settings: Settings, *, watch: bool, as_json: bool) -> None:
    """Show this node, the nodes of its mesh and their models."""
    home = Home.of(settings)
    if not watch:
        _show(find_node(home).status(), as_json=as_json)
        return
    clears = sys.stdout.isatty() and not as_json
    try:
        for snapshot in _follow(home):
            if clears:
                click.echo(_CLEAR, nl=False)
            _show(snapshot, as_json=as_json)
    except KeyboardInterrupt:
        click.echo(nl=clears, message="")


def _follow(home: Home) -> Iterator[dict[str, Any]]:
    """Snapshots without end; only the first connection may fail."""
    control = find_node(home)
    while True:
        try:
            yield from control.events()
        except LocalError as exc:
            click.echo(str(exc), err=True)
        click.echo(LOST, err=True)
        while True:
            time.sleep(RETRY_S)
            try:
                control = find_node(home)
                break
            except LocalError:
                continue  # said above already; it may start again


def _show(snapshot: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(snapshot, ensure_ascii=False))
        return
    try:
        click.echo(screen(snapshot, _terminal_width()))
    except (KeyError, TypeError, AttributeError) as exc:
        raise LocalError(
            f"The running node's status cannot be read (lacks {exc}); it may be another "
            "version of p2pmesh: restart it"
        ) from exc


def _terminal_width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def screen(snapshot: Mapping[str, Any], width: int = 0) -> str:
    """The status as text.

    Args:
        snapshot: As the control API gives it.
        width: Characters in a line; 0 cuts nothing.
    """
    node, mesh = snapshot["node"], snapshot["mesh"]
    nodes, models = snapshot["nodes"], snapshot["models"]
    parts = [_head(mesh, nodes, models), *_facts(node, serves=bool(nodes)), *_notes(snapshot)]
    parts += ["", _nodes_table(nodes, width), ""] if nodes else [""]
    if models:
        parts.append(models_table(models, width))
    elif nodes:
        parts.append("Nobody wants a model yet: p2pmesh up --model FILE.gguf")
    return "\n".join(parts)


def models_table(models: list[Mapping[str, Any]], width: int = 0) -> str:
    """The models of the mesh, one line each; arguments as `screen`."""
    rows = [
        (
            model["id"],
            model["state"],
            formatting.size(model["size_bytes"]),
            ", ".join(_replica(replica) for replica in model["replicas"]) or "-",
            model["reason"] or "-",
        )
        for model in models
    ]
    return table(_MODELS, rows, width=width)


def _head(
    mesh: Mapping[str, Any], nodes: list[Mapping[str, Any]], models: list[Mapping[str, Any]]
) -> str:
    live = sum(node["state"] == "live" for node in nodes)
    ready = sum(model["state"] == "ready" for model in models)
    parts = [f"{ready} of {formatting.count(len(models), 'model')} ready"]
    if nodes:  # a guest knows of none
        here = formatting.count(len(nodes), "node")
        parts.insert(0, here if live == len(nodes) else f"{live} of {here} live")
        parts.append(
            "all nodes agree on the plan" if mesh["agreed"] else "nodes are agreeing on a plan"
        )
    name = click.style(formatting.line(mesh["name"]), bold=True)
    return f"Mesh {name} ({members.kind(mesh)}): {', '.join(parts)}"


def _facts(node: Mapping[str, Any], *, serves: bool) -> list[str]:
    memory = node["memory"]
    used, budget = formatting.size(memory["used_bytes"]), formatting.size(memory["budget_bytes"])
    name = f"{node['name']} ({node['id']}), p2pmesh {node['version']}, process {node['pid']}"
    facts = [
        ("This node", f"{name}, up {formatting.duration(node['uptime_s'])}"),
        ("API", f"{formatting.url(node['api'])}/v1"),
        ("Console", f"{formatting.url(node['console'])}/"),
        ("Peers", node["peer"]),
        ("Home", node["home"]),
    ]
    if serves:
        facts += [
            ("Memory", f"{used} of {budget} for models in use"),
            ("Engine", formatting.engine(node["engine"]) if node["engine"] else "none"),
        ]
        if node["engine"]:
            facts.append(("", formatting.confinement(node["engine"])))
    lines = [f"  {term:<9}  {formatting.line(text)}" for term, text in facts]
    return lines + [_yellow("Warning", text) for text in node["warnings"]]


def _notes(snapshot: Mapping[str, Any]) -> list[str]:
    """Say what is about to happen to the membership of this node, and who wants to come in."""
    mesh = snapshot["mesh"]
    others = [
        f"Another open mesh {name!r} is here: p2pmesh up --mesh {shlex.quote(name)}"
        for name in mesh["others"]
    ]
    waiting = [members.waits(one) for one in snapshot["newcomers"]]
    return [_yellow("Note", text) for text in (*mesh["notices"], *others, *waiting)]


def _yellow(term: str, text: str) -> str:
    return click.style(f"  {term:<9}  {formatting.line(text)}", fg="yellow")


def _nodes_table(nodes: list[Mapping[str, Any]], width: int) -> str:
    rows = [
        (
            f"{node['name']}{' (this)' if node['self'] else ''}",
            node["role"] or "-",
            node["state"],
            formatting.size(node["memory_bytes"]),
            node["engine"] or "none",
            formatting.milliseconds(node["rtt_ms"]),
            ", ".join(_model(model) for model in node["models"]) or "-",
        )
        for node in nodes
    ]
    return table(_NODES, rows, width=width)


def _model(model: Mapping[str, Any]) -> str:
    name = f"{model['id']}{formatting.held(model)}"
    return name if model["state"] == "ready" else f"{name} ({model['state']})"


def _replica(replica: Mapping[str, Any]) -> str:
    name = f"{replica['name']}{formatting.held(replica)}"
    if replica["state"] == "ready":
        return name
    detail = f": {replica['detail']}" if replica["detail"] else ""
    return f"{name} ({replica['state']}{detail})"

"""`p2pmesh members`: who belongs to the mesh, who is invited, and who waits."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

import click

from p2pmesh.commands import formatting
from p2pmesh.commands.table import Column, table
from p2pmesh.config import Settings
from p2pmesh.control import find_node
from p2pmesh.errors import LocalError
from p2pmesh.home import Home

INVITING = ("invite", "admin")  # the roles of nodes that may
_MEMBERS = (
    Column("NODE"),
    Column("ID"),
    Column("ROLE"),
    Column("STAGE"),
    Column("STATE", state=True),
    Column("ENDS IN"),
    Column("CAME IN"),
)
_INVITATIONS = (
    Column("INVITATION"),
    Column("ROLE"),
    Column("STAGE"),
    Column("ENDS IN"),
    Column("USED"),
    Column("MADE BY"),
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def members(settings: Settings, *, as_json: bool) -> None:
    """List the members of the mesh with their roles, the invitations, and who waits."""
    snapshot = find_node(Home.of(settings)).status()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    try:
        shown = (
            json.dumps(as_object(snapshot), ensure_ascii=False)
            if as_json
            else screen(snapshot, time.time(), width)
        )
    except (KeyError, TypeError, AttributeError) as exc:
        raise LocalError(
            f"The running node's status cannot be read (lacks {exc}); it may be another "
            "version of p2pmesh: restart it"
        ) from exc
    click.echo(shown)


def as_object(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a status that is about who belongs to the mesh."""
    of_member = "id", "name", "self", "state", "role", "stage", "basis", "by", "via", "expires_at"
    of_mesh = "id", "name", "open", "founded_at"
    return {
        "mesh": {key: snapshot["mesh"][key] for key in of_mesh},
        "members": [{key: node[key] for key in of_member} for node in snapshot["nodes"]],
        "away": snapshot["away"],
        "invitations": snapshot["invitations"],
        "newcomers": snapshot["newcomers"],
    }


def screen(snapshot: Mapping[str, Any], now: float, width: int = 0) -> str:
    """The members as text.

    Args:
        snapshot: As the control API gives it.
        now: Unix time in seconds.
        width: Characters in a line; 0 cuts nothing.
    """
    mesh, nodes = snapshot["mesh"], snapshot["nodes"]
    name = click.style(formatting.line(mesh["name"]), bold=True)
    if mesh["open"] is None:
        return f"This node only uses the mesh {name}; its members are shown on any of them"
    absent = [{**one, "self": False, "state": "away"} for one in snapshot["away"]]
    rows = [_member(node, now) for node in (*nodes, *absent)]
    parts = [
        f"Mesh {name} ({kind(mesh)}): {formatting.count(len(rows), 'member')}",
        table(_MEMBERS, rows, width=width),
    ]
    if snapshot["invitations"]:
        invited = [_invitation(one, now) for one in snapshot["invitations"]]
        parts += ["", table(_INVITATIONS, invited, width=width)]
    parts += ["", *map(waits, snapshot["newcomers"])]
    parts.append(f"To invite another machine: {how_to_invite(snapshot)}")
    return "\n".join(parts)


def kind(mesh: Mapping[str, Any]) -> str:
    """Return the word for who may join a mesh."""
    return {True: "open", False: "private"}.get(mesh["open"], "used through its members")


def waits(newcomer: Mapping[str, Any]) -> str:
    """Say that a newcomer waits on this network, and how to let it in."""
    return formatting.line(
        f"{newcomer['name']} at {newcomer['host']} waits to join; to let it in: "
        f"p2pmesh admit {newcomer['id'][: formatting.ID_CHARS]}"
    )


def how_to_invite(snapshot: Mapping[str, Any]) -> str:
    """Return the command that makes an invitation, and on which node where this one may not."""
    inviting = [one for one in snapshot["nodes"] if one["role"] in INVITING]
    if any(one["self"] for one in inviting):
        return "p2pmesh invite"
    if inviting:
        return f"p2pmesh invite, on {formatting.line(inviting[0]['name'])}"
    return "p2pmesh invite, on a node of an admin"


def _member(node: Mapping[str, Any], now: float) -> tuple[str, ...]:
    return (
        f"{node['name']}{' (this)' if node['self'] else ''}",
        node["id"][: formatting.ID_CHARS],
        node["role"] or "-",
        "yes" if node["stage"] else "no",
        node["state"],
        formatting.time_left(node["expires_at"], now),
        came_in(node),
    )


def came_in(node: Mapping[str, Any]) -> str:
    """Say how a member came in, and who let it in."""
    by = node["by"]
    match node["basis"]:
        case "founder":
            return "founded it"
        case "recovery":
            return "its recovery code"
        case "invite":
            return f"invitation {node['via'][: formatting.ID_CHARS]} of {by}"
        case "lan":
            return f"network of {by}"
        case "grant":
            return f"granted by {by}"
        case _:
            return "-"


def _invitation(one: Mapping[str, Any], now: float) -> tuple[str, ...]:
    return (
        one["id"][: formatting.ID_CHARS],
        one["role"],
        "yes" if one["stage"] else "no",
        formatting.time_left(one["until"], now),
        _used(one),
        one["by"],
    )


def _used(one: Mapping[str, Any]) -> str:
    if not one["uses"]:
        return "any number"
    # Only the node that made it counts.
    return f"{'?' if one['used'] is None else one['used']} of {one['uses']}"

"""`p2pmesh leave`: belong to no mesh any more."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from p2pmesh.commands import formatting
from p2pmesh.commands.orders import give
from p2pmesh.config import Settings
from p2pmesh.control import NoNodeError, find_node
from p2pmesh.errors import LocalError
from p2pmesh.home import Home

LOSS = (
    "if no other member is an admin, nobody can revoke members, grant roles, or open and close the "
    "mesh any more"
)


@click.command()
@click.option("--yes", is_flag=True, help="Ask nothing, also when this is the only admin.")
@click.pass_obj
def leave(settings: Settings, *, yes: bool) -> None:
    """Leave the mesh and forget it; a node that runs stops.

    To come back this machine needs a new invitation. Its key and its models stay.
    """
    home = Home.of(settings)
    try:
        status = find_node(home).status()
    except NoNodeError:
        _forget(home, yes=yes)
        return
    if not yes and is_only_admin(status):
        _confirm(status["mesh"]["name"])
    give(settings, "leave")


def is_only_admin(status: Mapping[str, Any]) -> bool:
    """Whether others are left behind by the one node that could change who they are."""
    others = len(status["nodes"]) > 1 or status["away"]
    return bool(status["mesh"]["only_admin"] == status["node"]["id"] and others)


def is_asked_by_person() -> bool:
    """Whether somebody sits there who can answer a question."""
    return sys.stdin is not None and sys.stdin.isatty()


def _forget(home: Home, *, yes: bool) -> None:
    if not home.mesh_file.exists():
        raise LocalError("This node is in no mesh")
    # They load much, for which nobody else waits.
    from p2pmesh.identity.credentials import Role
    from p2pmesh.node.keystore import forget_mesh, load_mesh
    from p2pmesh.node.roster import Roster

    with home.locked():
        try:
            mesh = load_mesh(home)
        except LocalError:
            mesh = None  # damaged, which is a reason to forget it
        if mesh is not None and not yes:
            seen = Roster(home, mesh.id).seen
            others = [one.credential for node, one in seen.items() if node != mesh.credential.node]
            is_admin = mesh.credential.role is Role.ADMIN
            if is_admin and others and not any(one.role is Role.ADMIN for one in others):
                _confirm(mesh.name)
        forget_mesh(home)
    name = formatting.line(mesh.name) if mesh is not None else "that it was in"
    click.echo(f"This node has left the mesh {name}.")


def _confirm(mesh: str) -> None:
    what = f"This node is an admin of {formatting.line(mesh)}: {LOSS}"
    if not is_asked_by_person():
        raise LocalError(f"{what}; make a second one (p2pmesh grant NODE admin), or add --yes")
    click.echo(f"{what}.")
    click.confirm("Leave all the same?", abort=True)

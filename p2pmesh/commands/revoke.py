"""`p2pmesh revoke`: put a node out of the mesh, or take an invitation back."""

from __future__ import annotations

import click

from p2pmesh.commands.orders import give
from p2pmesh.config import Settings


@click.command()
@click.argument("target", metavar="NODE|INVITE")
@click.option("--below", is_flag=True, help="Also all whom that node let in.")
@click.pass_obj
def revoke(settings: Settings, *, target: str, below: bool) -> None:
    """Put a node out of the mesh, or take an invitation back.

    A name, an id, or the beginning of an id, as `p2pmesh members` shows them. An admin may do so to
    any, others to what they let in or made.
    """
    give(settings, "revoke", target=target, below=below)

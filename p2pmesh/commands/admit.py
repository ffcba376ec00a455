"""`p2pmesh admit`: let a newcomer on this network in without an invitation."""

from __future__ import annotations

import click

from p2pmesh.commands.orders import give
from p2pmesh.config import Settings


@click.command()
@click.argument("node")
@click.pass_obj
def admit(settings: Settings, *, node: str) -> None:
    """Let a newcomer on this network in without an invitation.

    `p2pmesh members` shows who waits.
    """
    give(settings, "admit", target=node)

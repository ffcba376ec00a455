"""`p2pmesh grant`: give a member another role, or the right to run stages."""

from __future__ import annotations

import click

from p2pmesh.commands.orders import give
from p2pmesh.config import Settings


@click.command()
@click.argument("node")
@click.argument("what", metavar="ROLE|stage|no-stage")
@click.pass_obj
def grant(settings: Settings, *, node: str, what: str) -> None:
    """Give a member another role, or the right to run stages of pipelines.

    Roles are use, serve, invite and admin; each includes those before it. Whoever has the right
    stage may run code on the machines of others.
    """
    give(settings, "grant", target=node, what=what)

"""`p2pmesh recover`: become an admin of the mesh by its recovery code."""

from __future__ import annotations

import sys

import click

from p2pmesh.commands.orders import give, given_or_piped
from p2pmesh.config import Settings
from p2pmesh.errors import ConfigError


@click.command()
@click.argument("code", required=False, metavar="[CODE]")
@click.pass_obj
def recover(settings: Settings, *, code: str | None) -> None:
    """Make this node an admin of its mesh, by the code that `up --recovery-code` told.

    CODE may come from standard input (-) too; without any it is asked for and not shown.
    """
    give(settings, "recover", code=given_or_piped(code) or _ask())


def _ask() -> str:
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError("there is no recovery code: p2pmesh recover CODE")
    answer: str = click.prompt("Recovery code", hide_input=True)
    return answer

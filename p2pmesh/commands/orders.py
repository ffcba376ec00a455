"""What commands about the members of the mesh share, which the running node carries out."""

from __future__ import annotations

import sys
from typing import Any

import click

from p2pmesh.commands import formatting
from p2pmesh.config import Settings
from p2pmesh.control import find_node
from p2pmesh.home import Home

STDIN_CHARS_MAX = 16 * 1024  # a token among a mail's worth of blanks
FROM_STDIN = "-"


def given_or_piped(secret: str | None) -> str:
    """Return a secret that was given as an argument, else on standard input; "" for none."""
    is_piped = sys.stdin is not None and not sys.stdin.isatty()
    if secret == FROM_STDIN or (secret is None and is_piped):
        return "".join(sys.stdin.read(STDIN_CHARS_MAX).split()) if sys.stdin else ""
    return secret or ""


def give(settings: Settings, name: str, **values: Any) -> None:
    """Have the running node carry out an order, and print what it says of it."""
    for sentence in find_node(Home.of(settings)).order(name, values)["sentences"]:
        click.echo(formatting.line(sentence))

"""Commands about the members of the mesh that the running node carries out."""

from __future__ import annotations

from typing import Any

import click

from p2pmesh.commands import formatting
from p2pmesh.config import Settings
from p2pmesh.control import find_node
from p2pmesh.home import Home


def give(settings: Settings, name: str, **values: Any) -> None:
    """Have the running node carry out an order, and print what it says of it."""
    for sentence in find_node(Home.of(settings)).order(name, values)["sentences"]:
        click.echo(formatting.line(sentence))

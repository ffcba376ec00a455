"""`p2pmesh join`: bring this machine into a mesh."""

from __future__ import annotations

import json
from dataclasses import replace

import click

from p2pmesh.commands import formatting
from p2pmesh.commands.orders import given_or_piped
from p2pmesh.config import Address, Settings, parse_join
from p2pmesh.control import NoNodeError, find_node
from p2pmesh.errors import ConfigError
from p2pmesh.home import Home


@click.command()
@click.argument("token", required=False, metavar="[TOKEN]")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
@click.option("--until-eof", is_flag=True, help="Stop when standard input ends.")
@click.pass_context
def join(ctx: click.Context, *, token: str | None, as_json: bool, until_eof: bool) -> None:
    """Join a mesh by an invitation, or by HOST:PORT of a member.

    Runs a node as `up --join TOKEN` does; the node that runs here already changes its mesh. TOKEN
    may come from standard input (-), P2PMESH_JOIN or config.toml too.
    """
    settings: Settings = ctx.obj
    ways = _ways(token, settings)
    try:
        control = find_node(Home.of(settings))
    except NoNodeError:
        from p2pmesh.commands.up import run_node  # a node, which the order needs not load

        given = settings.given | {"join"}
        ctx.obj = replace(settings, join=ways, given=given)
        run_node(ctx, as_json=as_json, until_eof=until_eof)
        return
    if len(ways) > 1:
        raise ConfigError("a node is running here: name one mesh that it is to join")
    answer = control.order("join", {"join": str(ways[0])})
    if as_json:
        click.echo(json.dumps(answer))
        return
    for sentence in answer["sentences"]:
        click.echo(formatting.line(sentence))


def _ways(token: str | None, settings: Settings) -> tuple[Address | str, ...]:
    """Return what to join by: the argument, else the settings, else what stands on standard input.

    Raises:
        ConfigError: There is none, or it is none.
    """
    if token is None and settings.join:
        return settings.join
    token = given_or_piped(token)
    if not token:
        raise ConfigError("there is no invitation: p2pmesh join TOKEN")
    try:
        return (parse_join(token),)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc

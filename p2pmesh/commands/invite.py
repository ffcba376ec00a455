"""`p2pmesh invite`: make an invitation to this node's mesh."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from p2pmesh.commands import formatting
from p2pmesh.config import Address, Settings, parse_address
from p2pmesh.control import find_node
from p2pmesh.errors import ConfigError
from p2pmesh.home import Home
from p2pmesh.identity.tokens import ADDRESSES_MAX

ROLES = ("use", "serve", "invite", "admin")
QUIET_ZONE_MODULES = 2  # around a code on a terminal; phones take half of what the standard asks
_UNIT_S = {"m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> int:
    """Return the seconds of 30m, 24h or 7d.

    Raises:
        click.BadParameter: It is none of these.
    """
    match = re.fullmatch(r"([0-9]{1,6})([mhd])", text.strip().lower())
    if match is None or not int(match[1]):
        raise click.BadParameter(f"{text!r} is not a duration: write 30m, 24h or 7d")
    return int(match[1]) * _UNIT_S[match[2]]


def parse_uses(text: str) -> int:
    """Return for how many machines an invitation is; 0, which `any` stands for, is no limit.

    Raises:
        click.BadParameter: It is no number.
    """
    word = text.strip().lower()
    if not re.fullmatch("[0-9]{1,6}|any", word):
        raise click.BadParameter(f"{text!r} is neither a whole number nor any")
    return 0 if word == "any" else int(word)


def parse_addresses(texts: Sequence[str]) -> list[str]:
    """Return addresses with their ports, where none is given the usual one.

    Raises:
        click.BadParameter: One is no address, or there are more than an invitation holds.
    """
    if len(texts) > ADDRESSES_MAX:
        raise click.BadParameter(f"an invitation holds at most {ADDRESSES_MAX} addresses")
    try:
        return [str(parse_address(text, default=Settings().peer)) for text in texts]
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


@click.command()
@click.option(
    "--for",
    "for_s",
    metavar="TIME",
    default="24h",
    show_default=True,
    callback=lambda _ctx, _param, text: parse_duration(text),
    help="How long it can be used: 30m, 24h, 7d.",
)
@click.option(
    "--uses",
    metavar="COUNT",
    default="1",
    show_default=True,
    callback=lambda _ctx, _param, text: parse_uses(text),
    help="For how many machines; any for no limit.",
)
@click.option(
    "--role",
    type=click.Choice(ROLES),
    default="serve",
    show_default=True,
    help="What they may do; each includes those before it.",
)
@click.option("--no-stage", is_flag=True, help="Without the right to run code on this machine.")
@click.option(
    "--address",
    "addresses",
    metavar="HOST[:PORT]",
    multiple=True,
    callback=lambda _ctx, _param, texts: parse_addresses(texts),
    help="Where they find this node: a name in your VPN, or a port that your router forwards.",
)
@click.option("--qr", is_flag=True, help="Show it as a QR code too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def invite(
    settings: Settings,
    *,
    for_s: int,
    uses: int,
    role: str,
    no_stage: bool,
    addresses: list[str],
    qr: bool,
    as_json: bool,
) -> None:
    """Make an invitation, with which other machines join this mesh.

    The invitation alone goes to standard output, what it means to standard error.
    """
    if qr and as_json:
        raise ConfigError("--qr and --json exclude each other")
    values: dict[str, Any] = {"for_s": for_s, "uses": uses, "role": role}
    if no_stage:
        values["stage"] = False
    if addresses:
        values["addresses"] = addresses
    made = find_node(Home.of(settings)).order("invite", values)
    if as_json:
        click.echo(json.dumps(made))
        return
    token = str(made["token"])
    if qr:
        click.echo(qr_code(token))
    click.echo(token)
    for line in explain(made):
        click.echo(line, err=True)


def explain(made: Mapping[str, Any]) -> list[str]:
    """Say how an invitation is used, and what it gives to whoever uses it.

    Args:
        made: What the node answered.
    """
    uses, until = int(made["uses"]), int(made["until"])
    whom = formatting.count(uses, "machine") if uses else "any number of machines"
    ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(until))
    known_as = str(made["id"])[: formatting.ID_CHARS]
    lines = [
        "On the other machine: p2pmesh join TOKEN",
        f"For {whom}, until {ends}, with the role {made['role']}.",
        f"Whoever has it can use it. To take it back: p2pmesh revoke {known_as}",
    ]
    if made["stage"]:
        lines.append(
            "With the right stage: it may run stages of pipelines here, which is code on this "
            "machine; --no-stage leaves that out"
        )
    addresses = [parse_address(str(one)) for one in made["addresses"]]
    if all(map(_is_loopback, addresses)):
        lines.append(
            "Only this machine can use it: this node listens on no network "
            f"({', '.join(map(str, addresses)) or 'no address'})"
        )
    return lines


def qr_code(token: str) -> str:
    """Return the code of a token as text, two rows of modules in a line.

    In capitals, which a code holds in half the room and which a token may be written in.
    """
    import segno  # only who asks for a code waits for it

    drawn = io.StringIO()
    code = segno.make(token.upper(), error="l", micro=False)
    code.terminal(drawn, border=QUIET_ZONE_MODULES, compact=True)
    return drawn.getvalue().rstrip("\n")


def _is_loopback(address: Address) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(address.host.partition("%")[0]).is_loopback
    except ValueError:
        return address.host == "localhost"

"""`p2pmesh doctor`: is this machine fit to be a node, and if not, what to do."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from p2pmesh.commands.doctor_checks import Check, Doctor
from p2pmesh.commands.formatting import count, line
from p2pmesh.commands.table import coloured
from p2pmesh.config import Settings
from p2pmesh.errors import LocalError
from p2pmesh.home import Home


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def doctor(settings: Settings, *, as_json: bool) -> None:
    """Check this machine and say what to do where something is wrong."""
    found: list[Check] = []
    for check in Doctor(settings, Home.of(settings)).run():
        found.append(check)
        if not as_json:
            click.echo(_text(check))
    failed = sum(check.state == "fail" for check in found)
    if as_json:
        checks = [asdict(check) for check in found]
        click.echo(json.dumps({"ok": not failed, "checks": checks}, ensure_ascii=False))
    if failed:
        raise LocalError(f"{count(failed, 'check')} failed; see above what to do")


def _text(check: Check) -> str:
    state = coloured(check.state, f"{check.state:<4}")
    text = f"{state}  {check.name:<7}  {line(check.detail)}"
    return f"{text}\n{'':15}-> {line(check.fix)}" if check.fix else text

"""`p2pmesh models`: what the mesh serves, and what this machine could serve."""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import Any

import click

from p2pmesh.commands import formatting
from p2pmesh.commands.status import models_table
from p2pmesh.commands.table import Column, table
from p2pmesh.config import Settings
from p2pmesh.control import NoNodeError, find_node
from p2pmesh.errors import LocalError
from p2pmesh.home import Home
from p2pmesh.models.store import ModelFile, Store

_FILES = (
    Column("MODEL"),
    Column("SIZE", right=True),
    Column("KIND"),
    Column("ARCHITECTURE"),
    Column("FILE"),
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def models(settings: Settings, *, as_json: bool) -> None:
    """List the models of the mesh, and the model files found on this machine."""
    home = Home.of(settings)
    try:
        served = find_node(home).status().get("models")
    except NoNodeError as exc:
        served = None
        click.echo(str(exc), err=True)
    store = Store(home, environ=os.environ)
    files = store.discover()
    if as_json:
        skipped = [
            {"path": str(one.path), "state": one.state, "reason": one.reason}
            for one in store.unusable
        ]
        found = {
            "models": served,
            "files": [_as_object(file) for file in files],
            "unusable": skipped,
        }
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if served is not None:
        _show_served(served, width)
    _show_files(files, home, width)
    for one in store.unusable:
        click.echo(f"Skipped: {formatting.line(one.reason)}", err=True)


def _show_served(served: Any, width: int) -> None:
    try:
        click.echo(models_table(served, width) if served else "The mesh serves no model yet.")
    except (KeyError, TypeError, AttributeError) as exc:
        raise LocalError(
            "The running node lists its models in a way that this version of p2pmesh does not "
            "know; restart it"
        ) from exc
    click.echo()


def _show_files(files: list[ModelFile], home: Home, width: int) -> None:
    if not files:
        click.echo(
            f"No GGUF files were found on this machine; put one into {home.models}, or name one: "
            "p2pmesh up --model FILE.gguf"
        )
        return
    rows = [
        (
            file.stem,
            formatting.size(file.size_bytes),
            ", ".join(sorted(file.card.gives)),
            file.card.architecture,
            file.parts[0],
        )
        for file in files
    ]
    click.echo("On this machine:")
    click.echo(table(_FILES, rows, width=width))
    click.echo(f"Serve one: p2pmesh up --model {formatting.line(files[0].stem)}")


def _as_object(file: ModelFile) -> dict[str, Any]:
    return {
        "id": file.stem,
        "aliases": list(file.aliases),
        "path": str(file.parts[0]),
        "parts": len(file.parts),
        "size_bytes": file.size_bytes,
        "architecture": file.card.architecture,
        "takes": sorted(file.card.takes),
        "gives": sorted(file.card.gives),
        "parameters": file.card.parameters,
        "quantisation": file.card.quantisation,
        "context": file.card.context,
    }

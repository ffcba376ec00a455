"""`p2pmesh experts`: parts of mixture-of-experts models. Each command has its own module."""

from __future__ import annotations

import click

from p2pmesh.commands.experts_slice import slice_model


@click.group()
def experts() -> None:
    """Parts of mixture-of-experts models: files with some of the experts."""


experts.add_command(slice_model)

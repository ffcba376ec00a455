"""`p2pmesh experts`: parts of mixture-of-experts models. Each command has its own module."""

from __future__ import annotations

import click

from p2pmesh.commands.experts_rank import rank
from p2pmesh.commands.experts_slice import slice_model


@click.group()
def experts() -> None:
    """Parts of mixture-of-experts models: which experts matter, and files with some of them."""


experts.add_command(rank)
experts.add_command(slice_model)

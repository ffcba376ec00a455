"""`p2pmesh experts`: parts of mixture-of-experts models. Each command has its own module."""

from __future__ import annotations

import click

from p2pmesh.commands.experts_measure import measure_model
from p2pmesh.commands.experts_rank import rank
from p2pmesh.commands.experts_slice import slice_model


@click.group()
def experts() -> None:
    """Parts of mixture-of-experts models: which experts matter, how good files with some are."""


experts.add_command(measure_model)
experts.add_command(rank)
experts.add_command(slice_model)

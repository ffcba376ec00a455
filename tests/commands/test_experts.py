"""The group of commands about experts."""

from __future__ import annotations

from click.testing import CliRunner

from p2pmesh.commands.experts import experts


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(experts, ["--help"])
    assert result.exit_code == 0
    assert "\n  measure " in result.stdout
    assert "\n  rank " in result.stdout
    assert "\n  slice " in result.stdout

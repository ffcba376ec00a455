"""What people read agrees with the table of settings."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from p2pmesh.config import SETTINGS, Setting, settings_table
from tests.repository import ROOT


def undocumented(help_text: str, settings: tuple[Setting, ...] = SETTINGS) -> list[str]:
    """The settings whose option, value or sentence a help text lacks, however it is wrapped."""
    compact = "".join(help_text.split())
    return [
        setting.name
        for setting in settings
        if any(
            "".join(part.split()) not in compact
            for part in (f"--{setting.name}", setting.unit, setting.help)
        )
    ]


@pytest.fixture(scope="module")
def help_of_up() -> str:
    command = [sys.executable, "-m", "p2pmesh", "up", "--help"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("P2PMESH_")}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_shows_the_table_of_settings() -> None:
    assert settings_table() in (ROOT / "README.md").read_text("utf-8")


def test_help_shows_every_setting(help_of_up: str) -> None:
    assert undocumented(help_of_up) == []


def test_a_setting_that_help_lacks_is_found() -> None:
    rows = [f"--{setting.name} {setting.unit}  {setting.help}" for setting in SETTINGS]
    assert undocumented("\n".join(rows).replace(" ", "\n    ")) == []
    for lost, setting in enumerate(SETTINGS):
        assert undocumented("\n".join(rows[:lost] + rows[lost + 1 :])) == [setting.name]

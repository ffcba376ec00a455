"""The linter, the formatter and the type checker have nothing to say about the repository."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.repository import ROOT

LOCK = ".ci/lock"  # Python without a suffix: found only when it is named

CHECKS = {
    "ruff check": ["ruff", "check", ".", LOCK],
    "ruff format": ["ruff", "format", "--check", ".", LOCK],
    "mypy": ["mypy"],
    "mypy of the lock": ["mypy", LOCK],
}


@pytest.mark.parametrize("command", CHECKS.values(), ids=CHECKS)
def test_nothing_to_say(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout

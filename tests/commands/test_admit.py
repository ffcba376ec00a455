from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands.admit import admit
from p2pmesh.config import Settings
from p2pmesh.control import NoNodeError
from p2pmesh.errors import ConfigError


def call(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(admit, list(arguments), obj=Settings(home=home))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dddddddd"], ["admit target=dddddddd"]),
    ],
)
def test_the_node_is_told_what_to_do(
    running_home: Path, arguments: list[str], said: list[str]
) -> None:
    done = call(running_home, *arguments)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == said


def test_a_refusal_is_the_nodes_sentence(running_home: Path) -> None:
    failure = call(running_home, "nonsense").exception
    assert isinstance(failure, ConfigError)
    assert str(failure) == "there is nothing of that name"


def test_without_a_node_nothing_is_done(tmp_path: Path) -> None:
    assert isinstance(call(tmp_path, "anna").exception, NoNodeError)


@pytest.mark.parametrize("arguments", [[], ["anna", "bert"]])
def test_a_wrong_number_of_arguments_is_a_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    assert call(tmp_path, *arguments).exit_code == 2

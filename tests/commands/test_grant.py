from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands.grant import grant
from p2pmesh.config import Settings
from p2pmesh.control import NoNodeError
from p2pmesh.errors import LocalError


def call(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(grant, list(arguments), obj=Settings(home=home))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["anna", "stage"], ["grant target=anna", "grant what=stage"]),
        (["anna", "admin"], ["grant target=anna", "grant what=admin"]),
    ],
)
def test_the_node_is_told_what_to_do(
    running_home: Path, arguments: list[str], said: list[str]
) -> None:
    done = call(running_home, *arguments)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == said


def test_a_refusal_is_the_nodes_sentence(running_home: Path) -> None:
    failure = call(running_home, "impossible", "admin").exception
    assert isinstance(failure, LocalError)
    assert str(failure) == "this node may not do that"


def test_without_a_node_nothing_is_done(tmp_path: Path) -> None:
    assert isinstance(call(tmp_path, "anna", "admin").exception, NoNodeError)


@pytest.mark.parametrize("arguments", [[], ["anna"]])
def test_a_wrong_number_of_arguments_is_a_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    assert call(tmp_path, *arguments).exit_code == 2

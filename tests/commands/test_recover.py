from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands.recover import recover
from p2pmesh.config import Settings
from p2pmesh.control import NoNodeError
from p2pmesh.errors import ConfigError
from p2pmesh.identity.recovery import recovery_code


def call(home: Path, *arguments: str, typed: str = "") -> Result:
    return CliRunner().invoke(recover, list(arguments), obj=Settings(home=home), input=typed)


CODE = recovery_code(b"s" * 32)


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [([CODE], ""), (["-"], f" {CODE[:20]}\n{CODE[20:]}\n"), ([], f"{CODE}\n")],
)
def test_the_node_is_told_the_code(running_home: Path, arguments: list[str], typed: str) -> None:
    done = call(running_home, *arguments, typed=typed)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"recover code={CODE}"]


def test_on_a_terminal_it_is_asked_for_and_not_shown(
    running_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    for module in ("orders", "recover"):
        terminal = type("Sys", (), {"stdin": Terminal()})
        monkeypatch.setattr(f"p2pmesh.commands.{module}.sys", terminal)
    done = call(running_home, typed=f"{CODE}\n")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == f"recover code={CODE}"
    assert done.stdout.count(CODE) == 1


def test_nothing_on_standard_input_is_a_wrong_usage(tmp_path: Path) -> None:
    failure = call(tmp_path).exception
    assert isinstance(failure, ConfigError)
    assert "p2pmesh recover CODE" in str(failure)


def test_a_refusal_is_the_nodes_sentence(running_home: Path) -> None:
    failure = call(running_home, "misspelt").exception
    assert isinstance(failure, ConfigError)
    assert str(failure) == "this recovery code is incomplete"


def test_without_a_node_nothing_is_done(tmp_path: Path) -> None:
    assert isinstance(call(tmp_path, "anna").exception, NoNodeError)


def test_two_codes_are_a_wrong_usage(tmp_path: Path) -> None:
    assert call(tmp_path, CODE, CODE).exit_code == 2

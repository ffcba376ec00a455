from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands import up
from p2pmesh.commands.join import join
from p2pmesh.config import Address, Settings
from p2pmesh.errors import ConfigError
from tests.console.fake import TOKEN_TEXT

HALF = len(TOKEN_TEXT) // 2
MAIL = f"  {TOKEN_TEXT[:HALF]}\n   {TOKEN_TEXT[HALF:]}\n\n"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, dict[str, Any]]]:
    """The settings and options of each node that would have been run."""
    started: list[tuple[Settings, dict[str, Any]]] = []

    def run_node(ctx: click.Context, **options: Any) -> None:
        started.append((ctx.obj, options))

    monkeypatch.setattr(up, "run_node", run_node)
    return started


def call(settings: Settings, *arguments: str, said: str = "") -> Result:
    return CliRunner().invoke(join, list(arguments), obj=settings, input=said)


@pytest.mark.parametrize(
    ("arguments", "said", "way"),
    [
        ([TOKEN_TEXT], "", TOKEN_TEXT),
        (["-"], MAIL, TOKEN_TEXT),
        ([], MAIL, TOKEN_TEXT),
        (["192.168.1.20:9338"], "", Address("192.168.1.20", 9338)),
        (["kitchen-pc"], "", Address("kitchen-pc", 9338)),
    ],
)
def test_without_a_node_one_is_run_that_joins(
    tmp_path: Path,
    started: list[tuple[Settings, dict[str, Any]]],
    arguments: list[str],
    said: str,
    way: Address | str,
) -> None:
    done = call(Settings(home=tmp_path, slots=2), *arguments, "--json", said=said)
    assert (done.exit_code, done.output) == (0, "")
    [(settings, options)] = started
    assert settings == Settings(home=tmp_path, slots=2, join=(way,), given=frozenset({"join"}))
    assert options == {"as_json": True, "until_eof": False}


def test_the_argument_goes_before_the_setting_and_that_before_standard_input(
    tmp_path: Path, started: list[tuple[Settings, dict[str, Any]]]
) -> None:
    configured = Settings(home=tmp_path, join=(TOKEN_TEXT,))
    call(configured, said="10.0.0.1:1")
    call(configured, "10.0.0.2:2", said="10.0.0.1:1")
    call(configured, "-", said="10.0.0.1:1")
    assert [settings.join for settings, _ in started] == [
        (TOKEN_TEXT,),
        (Address("10.0.0.2", 2),),
        (Address("10.0.0.1", 1),),
    ]


def test_a_node_that_runs_is_told_to_join(running_home: Path) -> None:
    done = call(Settings(home=running_home), TOKEN_TEXT)
    assert (done.exit_code, done.stdout) == (0, f"join join={TOKEN_TEXT}\n")
    done = call(Settings(home=running_home), "[fd00::2]:9338")
    assert done.stdout == "join join=[fd00::2]:9338\n"
    done = call(Settings(home=running_home, join=(Address("10.0.0.2", 2),)))
    assert done.stdout == "join join=10.0.0.2:2\n"


def test_a_node_that_runs_joins_one_mesh(running_home: Path) -> None:
    two = Settings(home=running_home, join=(TOKEN_TEXT, Address("10.0.0.2", 2)))
    assert isinstance(call(two).exception, ConfigError)


@pytest.mark.parametrize("arguments", [[], ["-"], [""]])
def test_no_invitation_is_a_wrong_usage(
    tmp_path: Path, started: list[object], arguments: list[str]
) -> None:
    failure = call(Settings(home=tmp_path), *arguments, said="\n").exception
    assert isinstance(failure, ConfigError)
    assert "p2pmesh join TOKEN" in str(failure)
    assert started == []


def test_on_a_terminal_nothing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

        def read(self, size: int | None = -1, /) -> str:
            raise AssertionError("a person is not asked to type a token")

    monkeypatch.setattr("p2pmesh.commands.orders.sys", type("Sys", (), {"stdin": Terminal()}))
    assert isinstance(call(Settings(home=tmp_path)).exception, ConfigError)


def test_what_is_neither_token_nor_address_is_a_wrong_usage(
    tmp_path: Path, started: list[object]
) -> None:
    failure = call(Settings(home=tmp_path), ":::").exception
    assert isinstance(failure, ConfigError)
    assert "HOST:PORT" in str(failure)
    assert started == []


def test_json_of_a_node_that_runs_is_the_order_alone(running_home: Path) -> None:
    done = call(Settings(home=running_home), TOKEN_TEXT, "--json")
    assert json.loads(done.stdout)["sentences"] == [f"join join={TOKEN_TEXT}"]

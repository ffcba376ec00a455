from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import segno
from click.testing import CliRunner, Result

from p2pmesh.commands.invite import (
    QUIET_ZONE_MODULES,
    explain,
    invite,
    parse_addresses,
    parse_duration,
    parse_uses,
    qr_code,
)
from p2pmesh.config import Settings
from p2pmesh.control import NoNodeError
from p2pmesh.errors import ConfigError
from p2pmesh.identity.tokens import parse_token
from tests.console.fake import MADE, TOKEN_TEXT


def call(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(invite, list(arguments), obj=Settings(home=home))


def test_the_token_is_alone_on_standard_output(running_home: Path) -> None:
    done = call(running_home)
    assert (done.exit_code, done.stdout) == (0, f"{TOKEN_TEXT}\n")
    assert done.stderr.splitlines()[0] == "On the other machine: p2pmesh join TOKEN"


def test_programs_get_what_the_node_answered_and_options_reach_it(running_home: Path) -> None:
    done = call(running_home, "--json", "--for=30m", "--uses=any", "--role=use", "--no-stage")
    assert (done.exit_code, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert answer["token"] == TOKEN_TEXT
    assert answer["sentences"] == [
        "invite for_s=1800",
        "invite uses=0",
        "invite role=use",
        "invite stage=False",
    ]
    usual = json.loads(call(running_home, "--json").stdout)["sentences"]
    assert usual == ["invite for_s=86400", "invite uses=1", "invite role=serve"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("24h", 86_400), (" 7D ", 604_800), ("1m", 60)]
)
def test_a_duration_is_minutes_hours_or_days(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "7", "0h", "-1h", "1.5h", "7w", "1h30m", "9999999m"])
def test_any_other_duration_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="30m, 24h or 7d"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "uses"), [("1", 1), ("12", 12), ("0", 0), (" ANY ", 0)])
def test_uses_are_a_number_or_any(text: str, uses: int) -> None:
    assert parse_uses(text) == uses


@pytest.mark.parametrize("text", ["", "-1", "many", "1.0", "٣", "12345678"])
def test_any_other_number_of_uses_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="whole number"):
        parse_uses(text)


def test_a_person_may_say_where_this_node_is_found(running_home: Path) -> None:
    done = call(running_home, "--json", "--address=kitchen.tail1.ts.net", "--address=[fd00::1]:7")
    said = json.loads(done.stdout)["sentences"]
    assert "invite addresses=['kitchen.tail1.ts.net:9338', '[fd00::1]:7']" in said


@pytest.mark.parametrize("texts", [["no address"], [":"], ["a:1", "b:2", "c:3"]])
def test_other_addresses_are_refused(texts: list[str]) -> None:
    with pytest.raises(click.BadParameter):
        parse_addresses(texts)


@pytest.mark.parametrize("argument", ["--for=soon", "--uses=lots", "--role=king", "extra"])
def test_a_wrong_argument_is_a_wrong_usage(running_home: Path, argument: str) -> None:
    assert call(running_home, argument).exit_code == 2


def test_a_code_is_not_json(running_home: Path) -> None:
    assert isinstance(call(running_home, "--qr", "--json").exception, ConfigError)


def test_without_a_node_there_is_no_invitation(tmp_path: Path) -> None:
    assert isinstance(call(tmp_path).exception, NoNodeError)


def test_what_an_invitation_gives_is_said() -> None:
    lines = explain(MADE)
    assert lines[0] == "On the other machine: p2pmesh join TOKEN"
    assert lines[1].startswith("For 1 machine, until 20")
    assert lines[1].endswith(", with the role serve.")
    assert lines[2].endswith("p2pmesh revoke cccccccc")
    assert "code on this machine" in lines[3]
    assert "--no-stage" in lines[3]
    assert len(lines) == 4
    less = explain({**MADE, "uses": 0, "stage": False, "role": "use"})
    assert less[1].startswith("For any number of machines, until ")
    assert len(less) == 3


@pytest.mark.parametrize(
    ("addresses", "only_here"),
    [
        (["127.0.0.1:9338"], True),
        (["[::1]:9338", "localhost:1"], True),
        ([], True),
        (["127.0.0.1:9338", "192.168.1.20:9338"], False),
        (["[fd00::2]:9338"], False),
        (["kitchen-pc.tail1234.ts.net:9338"], False),
    ],
)
def test_an_invitation_that_no_other_machine_can_use_says_so(
    addresses: list[str],
    only_here: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    lines = explain({**MADE, "addresses": addresses})
    assert any("Only this machine can use it" in line for line in lines) == only_here


def matrix_of(drawn: str) -> list[list[int]]:
    """The modules of a code as text; a dark one is where the terminal's ground is seen."""
    halves = {"█": (0, 0), "▀": (0, 1), "▄": (1, 0), " ": (1, 1)}
    rows: list[list[int]] = []
    for line in drawn.splitlines():
        upper, lower = zip(*(halves[char] for char in line), strict=True)
        rows += [list(upper), list(lower)]
    size = len(rows[0])
    edge = QUIET_ZONE_MODULES
    assert all(not any(row[:edge] + row[-edge:]) for row in rows[:size])
    return [row[edge:-edge] for row in rows[edge : size - edge]]


def test_the_code_on_the_terminal_is_that_of_the_token(running_home: Path) -> None:
    done = call(running_home, "--qr")
    *drawn, last = done.stdout.splitlines()
    assert last == TOKEN_TEXT
    code = segno.make_qr(TOKEN_TEXT.upper(), error="l")
    assert matrix_of("\n".join(drawn)) == [list(row) for row in code.matrix]
    assert code.mode == "alphanumeric"
    assert len(drawn) <= 24  # of a small terminal
    assert parse_token(TOKEN_TEXT.upper()) == parse_token(TOKEN_TEXT)


def test_another_token_is_another_code() -> None:
    assert qr_code(TOKEN_TEXT) != qr_code(TOKEN_TEXT[:-1] + "a")

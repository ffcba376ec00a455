from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from p2pmesh.errors import LocalError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.keys import MeshId, NodeId, show_id
from p2pmesh.node import roster as module
from p2pmesh.node.roster import Roster, Seen
from tests.identity.builders import MESH, credential
from tests.node.members import key_of


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path)
    home.create()
    return home


def seen(number: int, name: str = "anna", role: Role = Role.SERVE, ttl_s: int = 1000) -> Seen:
    return Seen(name=name, credential=credential(key_of(number), role, ttl_s=ttl_s))


def node(number: int) -> NodeId:
    return NodeId(key_of(number).id)


def test_who_was_here_is_remembered_when_it_is_away(home: Home) -> None:
    roster = Roster(home, MESH)
    assert roster.seen == {}
    roster.note([seen(1), seen(2, "bert")])
    roster.note([seen(2, "bert", Role.ADMIN)])
    expected = {node(1): seen(1), node(2): seen(2, "bert", Role.ADMIN)}
    assert roster.seen == expected
    assert Roster(home, MESH).seen == expected


def test_members_of_another_mesh_are_not_those_of_this(home: Home) -> None:
    Roster(home, MESH).note([seen(1)])
    assert Roster(home, MeshId(b"x" * 16)).seen == {}


def test_the_file_is_written_for_news_only(home: Home) -> None:
    roster = Roster(home, MESH)
    roster.note([seen(1)])
    home.members_file.unlink()
    roster.note([seen(1)])
    roster.note([])
    assert not home.members_file.exists()
    roster.note(iter([seen(1, "annas-laptop")]))
    assert Roster(home, MESH).seen == {node(1): seen(1, "annas-laptop")}


def test_whose_membership_ends_first_is_forgotten_first(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEEN_MAX", 3)
    roster = Roster(home, MESH)
    roster.note(seen(number, ttl_s=1000 - number) for number in range(1, 6))
    assert set(roster.seen) == {node(1), node(2), node(3)}


def test_a_full_disk_loses_nothing_meanwhile(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LocalError("Cannot write members.json (no space left on device)")

    monkeypatch.setattr(module, "write_atomic", fail)
    roster = Roster(home, MESH)
    with capture_logs() as logs:
        roster.note([seen(1)])
    assert [one["event"] for one in logs] == ["members_not_saved"]
    assert roster.seen == {node(1): seen(1)}


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        "\udcff",
        f'{{"mesh": "{show_id(MESH)}"}}',
        f'{{"mesh": "{show_id(MESH)}", "nodes": 5}}',
        f'{{"mesh": "{show_id(MESH)}", "nodes": [5]}}',
        f'{{"mesh": "{show_id(MESH)}", "nodes": [{{"name": "x", "credential": "%"}}]}}',
        f'{{"mesh": "{show_id(MESH)}", "nodes": [{{"name": "x", "credential": "aaaa"}}]}}',
    ],
)
def test_a_damaged_file_is_only_a_loss(home: Home, damaged: str) -> None:
    home.members_file.write_text(damaged, "utf-8", errors="surrogateescape")
    with capture_logs() as logs:
        assert Roster(home, MESH).seen == {}
    assert [one["event"] for one in logs] == ["members_unreadable"]

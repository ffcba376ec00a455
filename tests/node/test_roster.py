from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from p2pmesh.errors import LocalError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.keys import MeshId, NodeId
from p2pmesh.node import roster as module
from p2pmesh.node.roster import Roster, Seen
from tests.identity.builders import MESH, credential
from tests.state.builders import KEYS

ANNA = Seen(name="anna", credential=credential(KEYS[0]))
BERT = Seen(name="bert", credential=credential(KEYS[1]))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path)
    home.create()
    return home


def of(seen: Seen) -> NodeId:
    return seen.credential.node


def test_who_was_seen_is_remembered_with_the_last_name_and_credential(home: Home) -> None:
    roster = Roster(home, MESH)
    roster.note([ANNA, BERT])
    promoted = Seen(name="anna-2", credential=credential(KEYS[0], Role.INVITE))
    roster.note([promoted])  # and bert is away
    assert Roster(home, MESH).seen == {of(ANNA): promoted, of(BERT): BERT}


def test_members_of_another_mesh_are_not_mixed_in(home: Home) -> None:
    Roster(home, MESH).note([ANNA])
    assert Roster(home, MeshId(b"x" * 16)).seen == {}


def test_the_file_is_written_only_when_something_is_new(home: Home) -> None:
    roster = Roster(home, MESH)
    roster.note([ANNA])
    home.members_file.unlink()
    roster.note([ANNA])
    assert not home.members_file.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"mesh": 1}', '{"nodes": [{}]}', "\x00"])
def test_a_damaged_file_is_a_loss_and_no_more(home: Home, text: str) -> None:
    home.members_file.write_text(text)
    roster = Roster(home, MESH)
    assert roster.seen == {}
    roster.note([ANNA])
    assert Roster(home, MESH).seen == {of(ANNA): ANNA}


def test_of_too_many_those_are_kept_whose_credentials_last(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEEN_MAX", 1)
    short = replace(ANNA, credential=credential(KEYS[0], ttl_s=60))
    roster = Roster(home, MESH)
    roster.note([short, BERT])
    assert roster.seen == {of(BERT): BERT}


def test_a_full_disk_is_no_reason_to_end(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise LocalError("No space left on device")

    monkeypatch.setattr(module, "write_atomic", full)
    roster = Roster(home, MESH)
    roster.note([ANNA])
    assert roster.seen == {of(ANNA): ANNA}

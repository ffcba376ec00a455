from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from p2pmesh.commands.members import came_in, how_to_invite, members, screen
from p2pmesh.config import Settings
from p2pmesh.control import NoNodeError
from p2pmesh.errors import LocalError
from tests.console.fake import AWAY, INVITATION, NEWCOMER, SELF_ID, three_nodes
from tests.console.running import console, write_run_file

NOW = 1_800_000_000 - 86_400 - 3600


def inviting() -> dict[str, Any]:
    snapshot = three_nodes()
    elsewhere = {**INVITATION, "id": "e" * 26, "used": None, "by": "annas-laptop"}
    for_all = {**INVITATION, "id": "f" * 26, "used": None, "uses": 0, "stage": False}
    snapshot["invitations"] = [INVITATION, elsewhere, for_all]
    snapshot["newcomers"] = [NEWCOMER]
    snapshot["away"] = [AWAY]
    return snapshot


def test_members_invitations_and_newcomers_are_shown() -> None:
    assert click.unstyle(screen(inviting(), NOW)).splitlines() == [
        "Mesh amber-otter (open): 4 members",
        "NODE               ID        ROLE   STAGE  STATE    ENDS IN  CAME IN",
        "kitchen-pc (this)  mk3v7q2a  admin  yes    live     -        founded it",
        "annas-laptop       aaaaaaaa  serve  no     live     1 d 1 h  network of kitchen-pc",
        "living-room-mac    bbbbbbbb  serve  no     suspect  1 d 1 h  network of kitchen-pc",
        "berts-tablet       gggggggg  serve  no     away     1 d 1 h  network of kitchen-pc",
        "",
        "INVITATION  ROLE   STAGE  ENDS IN  USED        MADE BY",
        "cccccccc    serve  yes    1 d 1 h  1 of 2      kitchen-pc",
        "eeeeeeee    serve  yes    1 d 1 h  ? of 2      annas-laptop",
        "ffffffff    serve  no     1 d 1 h  any number  kitchen-pc",
        "",
        "carls-laptop at 192.168.1.33 waits to join; to let it in: p2pmesh admit dddddddd",
        "To invite another machine: p2pmesh invite",
    ]


def test_a_private_mesh_of_one_is_shown() -> None:
    snapshot = three_nodes()
    snapshot["mesh"]["open"] = False
    snapshot["nodes"] = snapshot["nodes"][:1]
    lines = click.unstyle(screen(snapshot, NOW)).splitlines()
    assert lines[0] == "Mesh amber-otter (private): 1 member"
    assert lines[3:] == ["", "To invite another machine: p2pmesh invite"]


def test_a_guest_is_told_that_it_is_one() -> None:
    snapshot = three_nodes()
    snapshot["mesh"]["open"] = None
    snapshot["nodes"] = []
    assert click.unstyle(screen(snapshot, NOW)) == (
        "This node only uses the mesh amber-otter; its members are shown on any of them"
    )


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        (("admin", "serve", "serve"), "p2pmesh invite"),
        (("invite", "admin", "serve"), "p2pmesh invite"),
        (("serve", "use", "invite"), "p2pmesh invite, on living-room-mac"),
        (("serve", "serve", ""), "p2pmesh invite, on a node of an admin"),
    ],
)
def test_who_may_invite_is_named(roles: tuple[str, ...], says: str) -> None:
    snapshot = three_nodes()
    for node, role in zip(snapshot["nodes"], roles, strict=True):
        node["role"] = role
    assert how_to_invite(snapshot) == says


@pytest.mark.parametrize(
    ("basis", "says"),
    [
        ("founder", "founded it"),
        ("invite", "invitation cccccccc of anna"),
        ("lan", "network of anna"),
        ("grant", "granted by anna"),
        ("", "-"),
        ("a later one", "-"),
    ],
)
def test_how_a_member_came_in_is_said(basis: str, says: str) -> None:
    assert came_in({"basis": basis, "by": "anna", "via": "c" * 26}) == says


def test_programs_get_what_concerns_the_members(tmp_path: Path) -> None:
    with console() as running:
        write_run_file(tmp_path / "run.json", pid=running.process.pid, console_port=running.port)
        running.show(inviting())
        told: dict[str, Any] = {"invitations": []}
        while not told["invitations"]:  # the fake reads its input when it comes to it
            done = CliRunner().invoke(members, ["--json"], obj=Settings(home=tmp_path))
            assert (done.exit_code, done.stderr) == (0, "")
            told = json.loads(done.stdout)
        assert set(told) == {"mesh", "members", "invitations", "newcomers", "away"}
        assert told["members"][0] == {
            "id": SELF_ID,
            "name": "kitchen-pc",
            "self": True,
            "state": "live",
            "role": "admin",
            "stage": True,
            "basis": "founder",
            "by": "",
            "via": "",
            "expires_at": 4_102_444_800,
        }
        assert told["newcomers"] == [NEWCOMER]
        assert told["mesh"]["open"] is True


def test_a_status_of_another_version_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Older:
        def status(self) -> dict[str, Any]:
            return {"mesh": {"name": "amber-otter"}, "nodes": []}

    monkeypatch.setattr("p2pmesh.commands.members.find_node", lambda _home: Older())
    failure = CliRunner().invoke(members, [], obj=Settings(home=tmp_path)).exception
    assert isinstance(failure, LocalError)
    assert "restart it" in str(failure)


def test_no_node_is_said(tmp_path: Path) -> None:
    failure = CliRunner().invoke(members, [], obj=Settings(home=tmp_path)).exception
    assert isinstance(failure, NoNodeError)


def test_hostile_names_cannot_steer_the_terminal() -> None:
    hostile = inviting()
    hostile["nodes"][1]["name"] = "\x1b[2Jgone\nliving"
    hostile["newcomers"][0] = {**NEWCOMER, "name": "\x07bell\n", "host": "\x1b[0m"}
    hostile["invitations"][0] = {**INVITATION, "by": "\x1b]0;title\x07"}
    text = click.unstyle(screen(hostile, NOW))
    assert not set(text) & {"\x1b", "\x07"}
    assert len(text.splitlines()) == 14

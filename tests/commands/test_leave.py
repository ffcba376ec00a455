from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands import leave as module
from p2pmesh.commands.leave import is_only_admin, leave
from p2pmesh.config import Settings
from p2pmesh.errors import LocalError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Role, issue
from p2pmesh.identity.keys import SigningKey
from p2pmesh.node.keystore import found_mesh, load_mesh, node_key, save_book
from p2pmesh.node.roster import Roster, Seen
from tests.console.fake import SELF_ID, three_nodes
from tests.console.running import console, write_run_file

NOW = 1_790_000_000.0


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path)
    home.create()
    return home


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody sits at standard input."""
    monkeypatch.setattr(module, "is_asked_by_person", lambda: True)


def call(home: Home, *arguments: str, said: str = "") -> Result:
    return CliRunner().invoke(leave, list(arguments), obj=Settings(home=home.root), input=said)


def in_mesh(home: Home, *others: Role) -> None:
    """Let a node have founded a mesh, and have seen others of these roles there."""
    mesh = found_mesh(home, node_key(home), name="amber-otter", is_open=True, now=NOW)
    save_book(home, mesh.id, {})
    given = [
        issue(
            mesh.credential,
            node_key(home),
            SigningKey(bytes([n]) * 32).public,
            role=role,
            stage=False,
            basis="grant",
            now=NOW,
            ttl_s=1000,
        )
        for n, role in enumerate(others)
    ]
    Roster(home, mesh.id).note(
        Seen(name="other", credential=one) for one in (mesh.credential, *given)
    )


def left(home: Home) -> bool:
    files = home.mesh_file, home.statements_file, home.peers_file, home.members_file
    return not any(file.exists() for file in files)


# No node runs


def test_a_node_that_was_alone_forgets_its_mesh(home: Home) -> None:
    in_mesh(home)
    done = call(home)
    assert (done.exit_code, done.stdout) == (0, "This node has left the mesh amber-otter.\n")
    assert left(home)
    assert home.node_key.exists()


def test_an_admin_of_others_has_to_mean_it(home: Home) -> None:
    in_mesh(home, Role.SERVE)
    failure = call(home).exception
    assert isinstance(failure, LocalError)
    assert "nobody can revoke members" in str(failure)
    assert "--yes" in str(failure)
    assert load_mesh(home) is not None
    assert call(home, "--yes").exit_code == 0
    assert left(home)


@pytest.mark.parametrize(("answer", "leaves"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_a_person_is_asked(
    home: Home,
    terminal: None,
    answer: str,
    leaves: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    in_mesh(home, Role.SERVE)
    done = call(home, said=answer)
    assert "nobody can revoke members" in done.stdout
    assert (done.exit_code == 0) == leaves
    assert left(home) == leaves


def test_of_two_admins_one_may_leave(home: Home) -> None:
    in_mesh(home, Role.SERVE, Role.ADMIN)
    assert call(home).exit_code == 0
    assert left(home)


def test_a_damaged_mesh_can_be_left(home: Home) -> None:
    home.mesh_file.write_text("{", "utf-8")
    assert call(home).exit_code == 0
    assert left(home)


def test_who_is_in_no_mesh_is_told(home: Home, tmp_path: Path) -> None:
    for nowhere in (home, Home.at(tmp_path / "not made yet")):
        failure = call(nowhere).exception
        assert isinstance(failure, LocalError)
        assert "in no mesh" in str(failure)
    assert not (tmp_path / "not made yet").exists()


def test_a_node_that_is_starting_keeps_its_mesh(home: Home) -> None:
    in_mesh(home)
    with home.locked():
        failure = call(home).exception
    assert isinstance(failure, LocalError)
    assert "running" in str(failure)
    assert not left(home)


# A node runs


def status(only_admin: str, nodes: int, away: int = 0) -> dict[str, Any]:
    shown = three_nodes()
    shown["away"] = [{"name": "x"}] * away
    shown["mesh"]["only_admin"] = only_admin
    shown["nodes"] = shown["nodes"][:nodes]
    return shown


def test_only_the_last_admin_of_others_is_one() -> None:
    assert is_only_admin(status(SELF_ID, 2))
    assert not is_only_admin(status(SELF_ID, 1))
    assert is_only_admin(status(SELF_ID, 1, away=1)), "it comes back to a mesh without an admin"
    assert not is_only_admin(status("a" * 26, 2))
    assert not is_only_admin(status("", 3))


def test_a_node_that_runs_is_told_to_leave(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with console() as running:
        pid = running.process.pid
        write_run_file(home.run_file, pid=pid, console_port=running.port)
        assert call(home).stdout == "leave was done.\n"
        monkeypatch.setattr(module, "is_only_admin", lambda _status: True)
        assert isinstance(call(home).exception, LocalError)
        assert call(home, "--yes").stdout == "leave was done.\n"

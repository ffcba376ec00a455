"""People and their meshes: invite, join, grant, revoke, leave, move, with real nodes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.mesh.nodes import (
    ANY_PORTS,
    STOP_TIMEOUT_S,
    Node,
    assert_sentence,
    cli,
    end,
    environment,
    program,
    start,
    wait_until,
)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def run(
    stack: ExitStack, folder: Path, name: str, *options: str, command: tuple[str, ...] = ("up",)
) -> Node:
    node = start(folder / name, *options, name=name, command=command)
    stack.callback(end, node)
    return node


def told(node: Node, *arguments: str) -> str:
    """What a command says that this node carries out."""
    done = cli(*arguments, "--home", node.me["home"])
    assert done.returncode == 0, done.stderr
    return done.stdout


def members(node: Node) -> dict[str, dict[str, Any]]:
    listed = json.loads(told(node, "members", "--json"))["members"]
    return {one["name"]: one for one in listed}


def test_a_member_is_invited_given_more_and_revoked(tmp_path: Path, stack: ExitStack) -> None:
    kitchen = run(stack, tmp_path, "kitchen")
    token = told(kitchen, "invite", "--no-stage").strip()
    attic = run(stack, tmp_path, "attic", command=("join", token))
    anna = members(kitchen)["attic"]
    assert (anna["role"], anna["stage"], anna["basis"]) == ("serve", False, "invite")
    assert anna["by"] == "kitchen"
    assert members(attic)["kitchen"]["role"] == "admin"

    # The invitation was for one machine, and its maker shows that it is used up.
    again = cli("join", token, f"--home={tmp_path / 'garage'}", "--peer=127.0.0.1:0")
    assert_sentence(again, 1, "Cannot join", "this invitation was used once, as often as it may be")
    assert "1 of 1" in told(kitchen, "members")
    assert token not in told(kitchen, "status", "--json")

    # A member may invite only once somebody let it.
    refused = cli("invite", "--home", attic.me["home"])
    assert_sentence(refused, 1, "p2pmesh grant attic invite")
    assert "attic has the role invite" in told(kitchen, "grant", "attic", "invite")
    wait_until(lambda: members(attic)["attic"]["role"] == "invite", "the grant is taken up")
    assert told(attic, "invite", "--no-stage", "--uses=any", "--for=30m").startswith("p2pmesh1-")
    assert_sentence(
        cli("invite", "--role=admin", "--home", attic.me["home"]), 1, "may not give the role admin"
    )
    [notice] = kitchen.status()["mesh"]["notices"]
    assert "only admin" in notice
    told(kitchen, "grant", "attic", "admin")
    wait_until(lambda: kitchen.status()["mesh"]["notices"] == [], "two admins")

    assert "attic is out of the mesh." in told(kitchen, "revoke", "attic")
    assert attic.process.wait(STOP_TIMEOUT_S) == 1
    sentence = attic.said().splitlines()[-1]
    assert sentence.startswith("p2pmesh: this node's membership was revoked by kitchen; ")
    assert sentence.endswith("p2pmesh join TOKEN")
    wait_until(lambda: list(members(kitchen)) == ["kitchen"], "only the kitchen is left")

    # It knows so when it is started again, without asking anybody.
    once_more = cli("up", *ANY_PORTS, f"--home={attic.me['home']}")
    assert_sentence(once_more, 1, "membership of this node", "is over", "p2pmesh join TOKEN")


@pytest.mark.full
def test_a_mesh_that_lost_its_only_admin_is_recovered(tmp_path: Path, stack: ExitStack) -> None:
    kitchen = run(stack, tmp_path, "kitchen", "--recovery-code")
    [code] = [word for word in kitchen.said().split() if word.startswith("p2pmesh-recovery1-")]
    code = code.removesuffix(".")
    token = told(kitchen, "invite", "--uses=any").strip()
    attic = run(stack, tmp_path, "attic", "--join", token)
    cellar = run(stack, tmp_path, "cellar", "--join", token)
    kitchen.process.kill()
    kitchen.process.wait()
    home = attic.me["home"]
    for log in (tmp_path / "kitchen", tmp_path / "attic"):
        assert not any(code in path.read_text() for path in log.rglob("*.log"))

    assert_sentence(cli("recover", code[:-1], "--home", home), 2, "copy the whole of it again")
    assert_sentence(
        cli("revoke", "kitchen", "--home", home), 1, "has the role serve and may not revoke"
    )
    assert "This node is an admin of" in told(attic, "recover", code)
    wait_until(lambda: members(cellar)["attic"]["basis"] == "recovery", "it is an admin")
    assert "kitchen is out of the mesh." in told(attic, "revoke", "kitchen")
    wait_until(lambda: sorted(members(cellar)) == ["attic", "cellar"], "the kitchen is out")
    garage = run(stack, tmp_path, "garage", "--join", told(attic, "invite").strip())
    wait_until(lambda: sorted(members(garage)) == ["attic", "cellar", "garage"], "one mesh")
    assert "refuses this node" not in attic.said()

    end(attic)
    again = run(stack, tmp_path, "attic", "--recovery-code")
    assert members(again)["attic"]["basis"] == "recovery"
    assert "No recovery code: one is told only when a mesh is founded" in again.said()


@pytest.mark.full
def test_a_node_that_runs_moves_to_another_mesh_and_leaves_it(
    tmp_path: Path, stack: ExitStack
) -> None:
    kitchen, cellar = run(stack, tmp_path, "kitchen", "--private"), run(stack, tmp_path, "cellar")
    laptop = run(stack, tmp_path, "laptop", "--join", kitchen.invite())
    ours, theirs = kitchen.line["mesh"]["name"], cellar.line["mesh"]["name"]
    token = told(cellar, "invite").strip()

    # A member that may only serve lets nobody into a private mesh.
    assert "(private): 2 members" in told(laptop, "members")
    refused = cli("admit", "somebody", "--home", laptop.me["home"])
    assert_sentence(refused, 1, "into a private mesh", "p2pmesh grant laptop invite")
    assert_sentence(
        cli("admit", "somebody", "--home", kitchen.me["home"]), 2, "there is no node waiting"
    )

    # By a pipe, as from another program.
    piped = subprocess.run(
        [*program(), "join", "--home", laptop.me["home"]],
        input=f"  {token}\n",
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=True,
    )
    assert piped.stdout == f"This node leaves {ours} and joins {theirs}.\n"
    wait_until(lambda: set(members(cellar)) == {"cellar", "laptop"}, "the laptop is in the cellar")
    wait_until(lambda: set(members(kitchen)) == {"kitchen"}, "the laptop left the kitchen")
    wait_until(lambda: laptop.status()["mesh"]["name"] == theirs, "the laptop says so")
    already = told(laptop, "join", token)
    assert already == f"This node is in the mesh {theirs} already.\n"

    said = told(laptop, "leave")
    assert said == f"This node leaves the mesh {theirs} and stops.\n"
    assert laptop.process.wait(STOP_TIMEOUT_S) == 0
    assert not (Path(laptop.me["home"]) / "mesh.json").exists()
    assert (Path(laptop.me["home"]) / "node.key").exists()
    assert_sentence(cli("leave", "--home", laptop.me["home"]), 1, "This node is in no mesh")
    wait_until(lambda: list(members(cellar)) == ["cellar"], "the laptop said goodbye")


def at(node: Node) -> str:
    return f"--home={node.me['home']}"


@pytest.mark.full
def test_a_guest_that_was_granted_more_is_a_member_after_a_restart(
    tmp_path: Path, stack: ExitStack
) -> None:
    kitchen = run(stack, tmp_path, "kitchen")
    token = told(kitchen, "invite", "--role=use").strip()
    guest = run(stack, tmp_path, "phone", command=("join", token))
    assert "only uses the mesh" in told(guest, "members")
    said = told(kitchen, "grant", "phone", "serve")
    assert said == "phone has the role serve as soon as it is started again.\n"
    end(guest)
    run(stack, tmp_path, "phone")
    wait_until(lambda: "phone" in members(kitchen), "it is a member")
    assert members(kitchen)["phone"]["role"] == "serve"
    assert members(kitchen)["phone"]["state"] == "live"

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from socket import AF_INET
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import trio
import trio.testing

from p2pmesh.commands.up import (
    LINES_MAX,
    OPEN,
    JsonUi,
    TextUi,
    url_elsewhere,
    wait_stdin_eof,
    who_may_join,
)
from p2pmesh.node import interfaces
from p2pmesh.node.run import Ui
from p2pmesh.node.status import NodeStatus
from tests.console.fake import three_nodes
from tests.mesh.nodes import ANY_PORTS, environment, program

LINE = {
    "id": "abc",
    "name": "kitchen-pc",
    "pid": 4242,
    "api": "127.0.0.1:9337",
    "console": "127.0.0.1:3131",
    "peer": "192.168.1.20:9338",
    "home": "/home/kim/.local/share/p2pmesh",
}


class Told:
    """As much of a node's status as is shown."""

    def __init__(self, snapshot: dict[str, Any]) -> None:
        self._snapshot = snapshot

    def snapshot(self) -> dict[str, Any]:
        return self._snapshot

    def ready_line(self) -> dict[str, Any]:
        return LINE


def told(snapshot: dict[str, Any] | None = None) -> NodeStatus:
    return cast("NodeStatus", Told(snapshot or three_nodes()))


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("ui", [JsonUi(), TextUi()])
def test_both_are_uis(ui: Ui, capsys: pytest.CaptureFixture[str]) -> None:
    ui.note("Port 9337 is taken: api is at 127.0.0.1:9338")
    said = capsys.readouterr()
    assert said.out + said.err == "Port 9337 is taken: api is at 127.0.0.1:9338\n"


# For programs


def test_a_program_gets_one_line_when_all_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    ui = JsonUi()
    ui.hashing("tiny", 5, 10)
    ui.hashing("tiny", 10, 10)
    ui.listening(told())
    assert capsys.readouterr() == ("", "")
    ui.ready(told())
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    snapshot = three_nodes()
    assert json.loads(out) == {
        "mesh": {"id": snapshot["mesh"]["id"], "name": snapshot["mesh"]["name"]},
        "nodes": [LINE],
    }


def test_notes_leave_the_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    JsonUi().note("Stopping")
    assert capsys.readouterr() == ("", "Stopping\n")


# For people


def test_a_person_sees_where_everything_is(capsys: pytest.CaptureFixture[str]) -> None:
    TextUi().listening(told())
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "Mesh     amber-otter (open), 3 nodes",
        f"Join     {OPEN}",
        "Invite   p2pmesh invite",
        "API      http://127.0.0.1:9337/v1",
        "Console  http://127.0.0.1:3131/",
        "Engine   embedded b11434",
        "         GPU found but unused: p2pmesh engine install",
    ]


@pytest.mark.parametrize(
    ("nodes", "company"),
    [(1, "no other node"), (2, "2 nodes"), (12, "12 nodes")],
)
def test_others_are_counted_in_words(
    capsys: pytest.CaptureFixture[str], nodes: int, company: str
) -> None:
    snapshot = three_nodes()
    snapshot["mesh"]["nodes"] = nodes
    TextUi().listening(told(snapshot))
    assert capsys.readouterr().out.splitlines()[0] == f"Mesh     amber-otter (open), {company}"


def test_a_person_sees_what_is_served_and_what_is_not_and_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    snapshot = three_nodes()
    ready, loading, unserved = snapshot["models"]
    replica = ready["replicas"][0]
    ready["replicas"] = [
        {**replica, "name": "anna", "state": "ready"},
        {**replica, "name": "bert", "state": "loading"},
        {**replica, "name": "carl", "state": "ready"},
    ]
    loading.update(state="not served", replicas=[], wanted_by=["x"], reason="needs 43.1 GiB")
    unserved.update(replicas=[], wanted_by=[], copies=0)  # a file that nobody asked for
    TextUi().ready(told(snapshot))
    assert capsys.readouterr().out.splitlines() == [
        f"Ready    {ready['id']} on anna, carl",
        f"Waiting  {loading['id']}: not served: needs 43.1 GiB",
    ]


def test_on_a_terminal_reading_a_file_is_a_line_that_fills_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for done_bytes in (0, 5, 10):
        TextUi().hashing("tiny", done_bytes, 10)
    assert terminal.getvalue() == "\rReading tiny: 0 %\rReading tiny: 50 %\rReading tiny: 100 %\n"


def test_on_a_pipe_only_the_end_of_reading_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for done_bytes in (0, 5, 10):
        TextUi().hashing("tiny", done_bytes, 10)
    assert capsys.readouterr() == ("Read tiny\n", "")


def test_an_empty_file_divides_nothing_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    TextUi().hashing("tiny", 0, 0)
    assert terminal.getvalue() == "\rReading tiny: 0 %\n"


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        ("127.0.0.1:9338", "--peer 127.0.0.1:9338 is a loopback address"),
        ("[::1]:9338", "--peer [::1]:9338 is a loopback address"),
        ("0.0.0.0:9338", "this one has no network address"),
    ],
)
def test_that_no_other_machine_can_join_is_said(peer: str, why: str) -> None:
    snapshot = three_nodes()
    snapshot["node"]["peer"] = peer
    snapshot["nodes"][0]["address"] = "127.0.0.1:9338"
    assert snapshot["nodes"][0]["self"]
    assert who_may_join(snapshot) == f"Other machines cannot join: {why}."


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        (
            {"open": True, "admits": True, "announced": True},
            (
                "Anyone on this network can join, and the node that answers can read the prompt. "
                "Only you: --private"
            ),
        ),
        (
            {"open": True, "admits": True, "announced": False},
            (
                "Anyone on this network can join who knows 192.168.1.20:9338, and the node that "
                "answers can read the prompt. Only you: --private"
            ),
        ),
        (
            {"open": True, "admits": False, "announced": False},
            (
                "Whoever is invited can join; on this network that is all, unless you say --open. "
                "The node that answers can read the prompt."
            ),
        ),
        (
            {"open": False, "admits": False, "announced": True},
            "Whoever is invited can join. The node that answers can read the prompt.",
        ),
    ],
)
def test_who_may_join_is_what_this_node_does(mesh: dict[str, bool], says: str) -> None:
    snapshot = three_nodes()
    snapshot["nodes"].reverse()  # this node's own address, wherever it stands
    snapshot["nodes"][0]["address"] = "192.168.1.30:9338"
    snapshot["mesh"].update(mesh)
    assert who_may_join(snapshot) == says


@pytest.mark.parametrize(
    ("notes", "warnings", "models"), [(3, 5, 1), (3, 1, 9), (0, 9, 9), (5, 2, 0)]
)
def test_a_start_takes_twelve_lines(
    capsys: pytest.CaptureFixture[str], notes: int, warnings: int, models: int
) -> None:
    snapshot = three_nodes()
    snapshot["node"]["warnings"] = [f"warning {n}" for n in range(warnings)]
    snapshot["models"] = [{**snapshot["models"][0], "id": f"model-{n}"} for n in range(models)]
    ui = TextUi()
    ui.hashing("model-0", 10, 10)
    for n in range(notes):
        ui.note(f"note {n}")
    ui.listening(told(snapshot))
    ui.ready(told(snapshot))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= LINES_MAX == 12
    assert sum(line.startswith("note ") for line in lines) == notes
    assert any(line.startswith("Ready") for line in lines) == bool(models)
    for n in range(20):
        ui.note(f"news {n}")
    assert capsys.readouterr().out.count("news") == 20


def test_listeners_on_all_interfaces_are_shown_with_addresses_that_can_be_reached(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = three_nodes()
    snapshot["node"].update(api="0.0.0.0:9337", console="[::1]:3131")
    monkeypatch.setattr(
        interfaces, "_outgoing", lambda family: "192.168.1.20" if family == AF_INET else ""
    )
    addresses = [
        SimpleNamespace(family=AF_INET, address=ip) for ip in ("127.0.0.1", "192.168.1.20")
    ]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"any": addresses})
    TextUi().listening(told(snapshot))
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:6] == [
        "API      http://127.0.0.1:9337/v1",
        "         http://192.168.1.20:9337/v1 for other machines",
        "Console  http://[::1]:3131/",
    ]


@pytest.mark.parametrize("address", ["127.0.0.1:9337", "192.168.1.20:9337", "[::1]:9337"])
def test_an_address_that_was_chosen_is_shown_alone(address: str) -> None:
    assert url_elsewhere(address) == ""


def test_a_demo_model_without_room_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = three_nodes()
    model = snapshot["models"][2]
    model.update(wanted_by=[], copies=1, reason="needs 217.6 MiB, the largest budget is 0.0 MiB")
    wanted = {**snapshot["models"][1], "state": "not served", "replicas": [], "reason": "no room"}
    snapshot["models"] = [model, wanted]
    TextUi().ready(told(snapshot))
    assert capsys.readouterr().out.splitlines() == [
        f"Waiting  {wanted['id']}: not served: no room",
        f"Waiting  {model['id']}: not served: needs 217.6 MiB, the largest budget is 0.0 MiB",
    ]


# The end of standard input


async def test_the_end_of_standard_input_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        ended = trio.Event()

        async def wait() -> None:
            await wait_stdin_eof()
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            os.write(writer, b"what comes before the end is of no interest\n")
            await trio.testing.wait_all_tasks_blocked()
            assert not ended.is_set()
            os.close(writer)
            with trio.fail_after(10):
                await ended.wait()


async def test_no_standard_input_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with trio.move_on_after(10) as waiting:
        await wait_stdin_eof()
    assert not waiting.cancelled_caught


END_S = 20.0


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT", "EOF"])
def test_a_node_with_open_standard_input_ends_in_order(tmp_path: Path, end: str) -> None:
    with subprocess.Popen(
        [*program(), "up", "--json", "--until-eof", f"--home={tmp_path}", *ANY_PORTS],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        if end == "EOF":
            process.stdin.close()
        else:
            process.send_signal(signal.Signals[end])
        code = process.wait(END_S)
        said = process.stderr.read().decode()
    assert code == 0, said
    assert "Fatal Python error" not in said
    assert not (tmp_path / "run.json").exists()

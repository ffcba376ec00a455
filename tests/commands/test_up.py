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

from p2pmesh.commands.up import JsonUi, TextUi, join_lines, url_elsewhere, wait_stdin_eof
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
        "Mesh     amber-otter, 2 other nodes",
        "API      http://127.0.0.1:9337/v1",
        "Console  http://127.0.0.1:3131/",
        "Join     p2pmesh up --join 192.168.1.20:9338",
        "         Whoever reaches that port can join; prompts are answered anywhere.",
        "Engine   embedded b11434",
        "         GPU found but unused: p2pmesh engine install",
    ]


@pytest.mark.parametrize(
    ("nodes", "company"),
    [(1, "no other node yet"), (2, "1 other node"), (12, "11 other nodes")],
)
def test_others_are_counted_in_words(
    capsys: pytest.CaptureFixture[str], nodes: int, company: str
) -> None:
    snapshot = three_nodes()
    snapshot["mesh"]["nodes"] = nodes
    TextUi().listening(told(snapshot))
    assert capsys.readouterr().out.splitlines()[0] == f"Mesh     amber-otter, {company}"


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


def test_the_address_to_join_is_this_nodes_first_one() -> None:
    snapshot = three_nodes()
    snapshot["nodes"].reverse()
    assert join_lines(snapshot)[0] == "Join     p2pmesh up --join 192.168.1.20:9338"


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        ("127.0.0.1:9338", "--peer 127.0.0.1:9338 is a loopback address"),
        ("[::1]:9338", "--peer [::1]:9338 is a loopback address"),
        ("0.0.0.0:9338", "this one has no network address"),
    ],
)
def test_other_machines_are_not_asked_to_join_a_loopback_address(peer: str, why: str) -> None:
    snapshot = three_nodes()
    snapshot["node"]["peer"] = peer
    snapshot["nodes"][0]["address"] = "127.0.0.1:9338"
    assert snapshot["nodes"][0]["self"]
    assert join_lines(snapshot) == [
        "Join     p2pmesh up --join 127.0.0.1:9338   (on this machine)",
        f"         Other machines cannot join: {why}.",
    ]


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
    assert lines[1:4] == [
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

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands.status import LOST, screen, status
from p2pmesh.config import Settings
from p2pmesh.control import NoNodeError
from p2pmesh.errors import LocalError
from tests.console.fake import NEWCOMER, SELF_ID, three_nodes
from tests.console.running import ROOT, console, write_run_file

PATIENCE_S = 10.0


def call(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(status, list(arguments), obj=Settings(home=home))


def test_the_screen_shows_mesh_node_nodes_and_models() -> None:
    lines = click.unstyle(screen(three_nodes())).splitlines()
    two_models = "p2pmesh-demo-tiny, Qwen3-30B-A3B-Q4_K_M layers 1-24 (loading)"
    counted = "2 of 3 nodes live, 1 of 3 models ready, all nodes agree on the plan"
    assert lines == [
        f"Mesh amber-otter (open): {counted}",
        f"  This node  kitchen-pc ({SELF_ID}), p2pmesh 0.1.0, process 4242, up 1 h 10 min",
        "  API        http://127.0.0.1:9337/v1",
        "  Console    http://127.0.0.1:3131/",
        "  Peers      192.168.1.20:9338",
        "  Home       /home/kim/.local/share/p2pmesh",
        "  Memory     1.0 GiB of 12.0 GiB for models in use",
        "  Engine     embedded b11434 (wheel), CPU AMD Ryzen 7 5700U",
        "             not confined: the embedded engine is a Python program",
        "  Warning    GPU found but unused: p2pmesh engine install",
        "",
        "NODE               ROLE   STATE      MEMORY  ENGINE    ROUND TRIP  MODELS",
        "kitchen-pc (this)  admin  live     12.0 GiB  embedded           -  p2pmesh-demo-tiny",
        f"annas-laptop       serve  live     24.0 GiB  embedded      1.8 ms  {two_models}",
        "living-room-mac    serve  suspect   8.0 GiB  embedded       38 ms  -",
        "",
        *lines[16:],
    ]
    assert "annas-laptop layers 1-24 (loading: reading weights)" in lines[18]
    assert lines[19].endswith("  needs 43.1 GiB; the largest node has 24.0 GiB")


def test_a_guest_shows_what_it_knows() -> None:
    snapshot = three_nodes()
    snapshot["mesh"]["open"] = None
    snapshot["nodes"] = []
    snapshot["node"].update(engine=None, memory={"budget_bytes": 0, "used_bytes": 0}, warnings=[])
    lines = click.unstyle(screen(snapshot)).splitlines()
    assert lines[0] == "Mesh amber-otter (used through its members): 1 of 3 models ready"
    terms = ["This", "API", "Console", "Peers", "Home", "", "MODEL"]
    assert [line.strip().partition(" ")[0] for line in lines[1:8]] == terms


def test_what_concerns_the_membership_is_noted() -> None:
    snapshot = three_nodes()
    snapshot["mesh"].update(
        open=False, notices=["This node is the only admin"], others=["jolly-fox", "a; rm b"]
    )
    snapshot["newcomers"] = [NEWCOMER]
    lines = click.unstyle(screen(snapshot)).splitlines()
    assert lines[0].startswith("Mesh amber-otter (private): ")
    waits = "carls-laptop at 192.168.1.33 waits to join; to let it in: p2pmesh admit dddddddd"
    assert [line for line in lines if line.startswith("  Note")] == [
        "  Note       This node is the only admin",
        "  Note       Another open mesh 'jolly-fox' is here: p2pmesh up --mesh jolly-fox",
        "  Note       Another open mesh 'a; rm b' is here: p2pmesh up --mesh 'a; rm b'",
        f"  Note       {waits}",
    ]


def test_no_model_says_how_to_serve_one() -> None:
    lonely = three_nodes()
    lonely["models"] = []
    lonely["mesh"]["agreed"] = False
    lonely["node"]["engine"] = None
    text = screen(lonely)
    assert "p2pmesh up --model FILE.gguf" in text
    assert "nodes are agreeing on a plan" in text
    assert "Engine     none" in text


def test_status_once_and_as_json(tmp_path: Path) -> None:
    with console() as running:
        pid = running.process.pid
        write_run_file(tmp_path / "run.json", pid=pid, console_port=running.port)
        shown = call(tmp_path)
        assert shown.exit_code == 0
        assert shown.stdout == click.unstyle(screen(three_nodes())) + "\n"
        assert json.loads(call(tmp_path, "--json").stdout) == three_nodes()


def test_no_node_is_said(tmp_path: Path) -> None:
    for arguments in ([], ["--watch"], ["--json"]):
        assert isinstance(call(tmp_path, *arguments).exception, NoNodeError)


def test_a_status_of_another_version_is_one_sentence(tmp_path: Path) -> None:
    with console() as running:
        pid = running.process.pid
        write_run_file(tmp_path / "run.json", pid=pid, console_port=running.port)
        other = three_nodes()
        del other["mesh"]["agreed"]
        running.show(other)
        deadline = time.monotonic() + PATIENCE_S
        while (result := call(tmp_path)).exit_code == 0 and time.monotonic() < deadline:
            pass
        assert isinstance(result.exception, LocalError)
        assert "restart it" in str(result.exception)


SCRIPT = """
import sys, pathlib
from p2pmesh.commands.status import status
from p2pmesh.config import Settings
status.main(sys.argv[2:], obj=Settings(home=pathlib.Path(sys.argv[1])))
"""


def test_watch_prints_each_change_survives_a_restart_and_ends_quietly(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "--watch", "--json"]
    with console() as first:
        write_run_file(tmp_path / "run.json", pid=first.process.pid, console_port=first.port)
        watching = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert watching.stdout is not None
            assert watching.stderr is not None
            assert json.loads(watching.stdout.readline()) == three_nodes()
            changed = three_nodes()
            changed["nodes"][2]["state"] = "dead"
            first.show(changed)
            assert json.loads(watching.stdout.readline()) == changed
            first.stop()
            assert watching.stderr.readline().strip() == LOST
            with console() as second:
                pid = second.process.pid
                write_run_file(tmp_path / "run.json", pid=pid, console_port=second.port)
                assert json.loads(watching.stdout.readline()) == three_nodes()
                watching.send_signal(signal.SIGINT)
                out, err = watching.communicate(timeout=PATIENCE_S)
        finally:
            if watching.poll() is None:
                watching.kill()
                watching.communicate()
    assert (watching.returncode, out, err) == (0, "", "")


def test_watch_redraws_a_terminal_in_colour(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    with console() as running:
        write_run_file(tmp_path / "run.json", pid=running.process.pid, console_port=running.port)
        ours, theirs = pty.openpty()
        watching = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), "--watch"],
            cwd=ROOT,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "COLUMNS": "80"},
        )
        os.close(theirs)
        try:
            text = _read_until(ours, "Llama-3.3")
            assert text.startswith("\x1b[H\x1b[2J")
            assert "\x1b[32mlive" in text
            table = text[text.index("NODE") :].splitlines()
            assert all(len(click.unstyle(line)) <= 80 for line in table[1:4])
            watching.send_signal(signal.SIGINT)
            assert watching.wait(PATIENCE_S) == 0
        finally:
            if watching.poll() is None:
                watching.kill()
                watching.wait()
            os.close(ours)


def _read_until(handle: int, mark: str) -> str:
    text, deadline = "", time.monotonic() + PATIENCE_S
    while mark not in text and (left := deadline - time.monotonic()) > 0:
        if select.select([handle], [], [], left)[0]:
            text += os.read(handle, 4096).decode("utf-8", "replace")
    return text


def test_hostile_names_cannot_steer_the_terminal() -> None:
    hostile: dict[str, Any] = three_nodes()
    hostile["nodes"][1]["name"] = "\x1b[2Jgone\nliving"
    hostile["mesh"]["name"] = "a\x07b"
    text = click.unstyle(screen(hostile))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[2Jgone living" in text

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import pytest

from p2pmesh.config import Address
from p2pmesh.control import (
    NO_NODE,
    Control,
    NoNodeError,
    dial,
    error_message,
    find_node,
    read_run_file,
    server_events,
)
from p2pmesh.errors import LocalError
from p2pmesh.home import Home
from tests.console.fake import TOKEN, three_nodes
from tests.console.running import STOP_S, Console, console, write_run_file


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.at(tmp_path)


@contextmanager
def node(home: Home) -> Iterator[Console]:
    with console() as running:
        write_run_file(home.run_file, pid=running.process.pid, console_port=running.port)
        yield running


def test_the_status_of_the_running_node(home: Home) -> None:
    with node(home):
        assert find_node(home).status() == three_nodes()


def test_events_begin_with_the_status_follow_it_and_end_with_the_node(home: Home) -> None:
    with node(home) as running:
        events = find_node(home).events()
        assert next(events) == three_nodes()
        changed = three_nodes()
        changed["mesh"]["name"] = "brave-heron"
        running.show(changed)
        assert next(events)["mesh"]["name"] == "brave-heron"
        assert running.stop() == 0
        assert list(events) == []


def test_events_end_when_the_node_is_killed(home: Home) -> None:
    with node(home) as running:
        events = find_node(home).events()
        next(events)
        running.process.kill()
        try:
            assert list(events) == []
        except LocalError as exc:  # where the system resets the connections of the dead
            assert "connection to the node was lost" in str(exc)  # noqa: PT017


def test_stop_stops_the_node(home: Home) -> None:
    with node(home) as running:
        find_node(home).stop()
        running.process.wait(STOP_S)
        assert running.process.returncode == 0


def test_stop_with_a_wrong_token_says_so(home: Home) -> None:
    with node(home) as running:
        fields = write_run_file(home.run_file, pid=running.process.pid, console_port=running.port)
        home.run_file.write_text(json.dumps({**fields, "token": "other"}))
        with pytest.raises(LocalError, match=r"refused: This needs the token"):
            find_node(home).stop()


def test_no_run_file_is_no_node(home: Home) -> None:
    with pytest.raises(NoNodeError, match=NO_NODE) as caught:
        find_node(home)
    assert caught.value.exit_code == 1


def test_a_dead_process_is_no_node(home: Home) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_run_file(home.run_file, pid=gone.pid, console_port=9)
    with pytest.raises(NoNodeError, match=NO_NODE):
        find_node(home)


def test_a_process_that_does_not_listen_is_named(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    write_run_file(home.run_file, pid=os.getpid(), console_port=port)
    with pytest.raises(
        LocalError, match=rf"\(process {os.getpid()}\) does not answer on"
    ) as caught:
        find_node(home)
    assert not isinstance(caught.value, NoNodeError)


def test_another_node_on_the_port_is_not_this_one(home: Home) -> None:
    with node(home) as running:
        fields = write_run_file(home.run_file, pid=running.process.pid, console_port=running.port)
        home.run_file.write_text(json.dumps({**fields, "id": "z" * 26}))
        with pytest.raises(NoNodeError):
            find_node(home)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"\xff", b'{"node": 1}'])
def test_another_program_on_the_port_is_not_a_node(home: Home, body: bytes) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        write_run_file(home.run_file, pid=os.getpid(), console_port=server.server_port)
        with pytest.raises(LocalError):
            find_node(home)
        thread.join()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"pid": "x"}', "\xff\xfe"],
)
def test_a_damaged_run_file_is_one_sentence(home: Home, text: str) -> None:
    home.run_file.write_text(text, "latin1")
    with pytest.raises(LocalError, match="is damaged"):
        read_run_file(home.run_file)


def test_a_wrong_address_is_damage(home: Home) -> None:
    fields = write_run_file(home.run_file, pid=1, console_port=9)
    home.run_file.write_text(json.dumps({**fields, "console": "nowhere"}))
    with pytest.raises(LocalError, match="is damaged"):
        read_run_file(home.run_file)


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root reads everything")
def test_somebody_else_s_run_file_is_one_sentence(home: Home) -> None:
    write_run_file(home.run_file, pid=1, console_port=9)
    home.run_file.chmod(0)
    with pytest.raises(LocalError, match="Cannot read"):
        read_run_file(home.run_file)


def test_the_token_is_not_shown(home: Home) -> None:
    write_run_file(home.run_file, pid=1, console_port=9)
    run = read_run_file(home.run_file)
    assert run.token == TOKEN
    assert TOKEN not in repr(run)
    assert TOKEN not in repr(Control(run))


def test_wildcard_addresses_are_dialled_on_loopback() -> None:
    assert dial(Address("0.0.0.0", 1), 1).host == "127.0.0.1"
    assert dial(Address("::", 1), 1).host == "::1"
    assert dial(Address("192.168.1.5", 1), 1).host == "192.168.1.5"


def test_server_events_are_read_as_browsers_read_them() -> None:
    text = (
        b"\xef: keep-alive\n\nid: 1\nevent: a\ndata:one\ndata: two\r\n\r\ndata: x\n\nevent: e\n\n"
    )
    stream = cast("Any", BytesIO(text))
    assert list(server_events(stream)) == [("a", "one\ntwo"), ("message", "x")]


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b'{"error": "no"}', b'{"error": {}}', b"\xff"])
def test_errors_without_a_message_say_nothing(body: bytes) -> None:
    assert error_message(body) == ""

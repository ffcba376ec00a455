from __future__ import annotations

import http.server
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands import chat as module
from p2pmesh.commands.chat import chat
from p2pmesh.config import Settings
from p2pmesh.control import NoNodeError
from p2pmesh.errors import ConfigError, EngineError, LocalError
from tests.console.running import ROOT, Console, console, write_run_file

PATIENCE_S = 10.0
SERVED_BY = "k%C3%BCche/0"


class Api(http.server.ThreadingHTTPServer):
    """An OpenAI API that answers with what a test says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.status = 200
        self.events: list[str] = []
        self.release = threading.Event()
        self.release.set()
        self.left = threading.Event()

    def say(self, *texts: str, end: bool = True) -> None:
        """Answer with these pieces of text."""
        pieces: list[dict[str, Any]] = [
            {"delta": {"role": "assistant", "content": None}, "finish_reason": None}
        ]
        pieces += [{"delta": {"content": text}, "finish_reason": None} for text in texts]
        if end:
            pieces.append({"delta": {}, "finish_reason": "stop"})
        self.events = [json.dumps({"model": "tiny", "choices": [piece]}) for piece in pieces]
        if end:
            usage = {"completion_tokens": len(texts)}
            self.events.append(json.dumps({"model": "tiny", "choices": [], "usage": usage}))
            self.events.append("[DONE]")


class Handler(http.server.BaseHTTPRequestHandler):
    server: Api
    protocol_version = "HTTP/1.0"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append({"path": self.path, **json.loads(body)})
        self.send_response(self.server.status)
        self.send_header("X-P2PMesh-Served-By", SERVED_BY)
        self.end_headers()
        for event in self.server.events:
            line = f"data: {event}\n\n" if self.server.status == 200 else event
            self.wfile.write(line.encode())
        self.wfile.flush()
        while not self.server.release.wait(0.05):
            try:
                self.wfile.write(b": waiting\n\n")
            except OSError:
                self.server.left.set()
                return

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def node() -> Iterator[Console]:
    with console() as running:
        yield running


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def home(tmp_path: Path, node: Console, api: Api) -> Path:
    write_run_file(
        tmp_path / "run.json",
        pid=node.process.pid,
        console_port=node.port,
        api_port=api.server_port,
    )
    return tmp_path


def call(home: Path, *arguments: str, piped: str = "") -> Result:
    return CliRunner().invoke(chat, list(arguments), obj=Settings(home=home), input=piped)


def test_one_message_streams_its_answer_and_says_who_gave_it(home: Path, api: Api) -> None:
    api.say("The capital of France", " is Paris.")
    result = call(home, "What", "is it?", "--model", "tiny", "--system", "Be brief.")
    assert result.stdout == "The capital of France is Paris.\n"
    assert result.stderr == "— tiny on küche/0\n"
    (request,) = api.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["model"] == "tiny"
    assert request["stream"] is True
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert request["messages"][1] == {"role": "user", "content": "What is it?"}


def test_a_piped_message_to_any_model(home: Path, api: Api) -> None:
    api.say("Yes.")
    assert call(home, piped="Really?\n").stdout == "Yes.\n"
    assert api.requests[0]["model"] == "auto"
    assert api.requests[0]["messages"] == [{"role": "user", "content": "Really?\n"}]


def test_json_is_one_line_with_the_whole_answer(home: Path, api: Api) -> None:
    api.say("A", "\nB")
    assert json.loads(call(home, "--json", "x").stdout) == {
        "model": "tiny",
        "served_by": "küche/0",
        "answer": "A\nB",
        "finish_reason": "stop",
        "usage": {"completion_tokens": 2},
    }


def test_nothing_to_ask_is_a_usage_error(home: Path) -> None:
    for piped in ("", " \n"):
        result = call(home, piped=piped)
        assert isinstance(result.exception, ConfigError)


def test_no_node_is_said(tmp_path: Path) -> None:
    assert isinstance(call(tmp_path, "x").exception, NoNodeError)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ConfigError),
        (404, ConfigError),
        (409, ConfigError),
        (429, EngineError),
        (503, EngineError),
    ],
)
def test_a_refusal_is_passed_on_as_its_sentence(
    home: Path, api: Api, status: int, kind: type[Exception]
) -> None:
    api.status = status
    api.events = [json.dumps({"error": {"message": "No model is called 'x'"}})]
    result = call(home, "hello", "--model", "x")
    assert type(result.exception) is kind
    assert str(result.exception) == "No model is called 'x'"


def test_a_refusal_without_words_has_its_number(home: Path, api: Api) -> None:
    api.status = 502
    api.events = ["<html>"]
    assert str(call(home, "hello").exception) == "The API answered HTTP 502"


def test_an_answer_that_breaks_off_is_an_error_and_what_came_is_shown(home: Path, api: Api) -> None:
    api.say("The capital", end=False)
    result = call(home, "x")
    assert result.stdout == "The capital\n"
    assert isinstance(result.exception, EngineError)
    assert "broke off" in str(result.exception)


@pytest.mark.parametrize("event", ["{", "[]", "{}", '{"choices": [1]}', '{"choices": [{}]}'])
def test_what_is_no_chat_answer_is_one_sentence(home: Path, api: Api, event: str) -> None:
    api.events = [event]
    result = call(home, "x")
    assert isinstance(result.exception, EngineError)
    assert "no chat answer" in str(result.exception)


def test_an_error_within_the_stream_is_told(home: Path, api: Api) -> None:
    api.events = [json.dumps({"error": {"message": "the context is full"}})]
    assert str(call(home, "x").exception) == "the context is full"


def test_a_model_cannot_steer_the_terminal(home: Path, api: Api) -> None:
    api.say("a\x1b]0;owned\x07b")
    assert call(home, "x").stdout == "a]0;ownedb\n"


def test_an_api_that_is_gone_is_one_sentence(
    home: Path, node: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run_file(home / "run.json", pid=node.process.pid, console_port=node.port, api_port=1)
    result = call(home, "x")
    assert isinstance(result.exception, LocalError)
    assert "API does not answer on 127.0.0.1:1" in str(result.exception)


def test_silence_has_an_end(home: Path, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.1)
    monkeypatch.setattr(Handler, "do_POST", lambda _self: time.sleep(0.5))
    assert "Nothing came" in str(call(home, "x").exception)


SCRIPT = """
import sys, pathlib
from p2pmesh.commands.chat import chat
from p2pmesh.config import Settings
chat.main(sys.argv[2:], obj=Settings(home=pathlib.Path(sys.argv[1])))
"""


class Terminal:
    """A conversation on a pseudo-terminal."""

    def __init__(self, home: Path) -> None:
        pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
        self.handle, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(home)],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def expect(self, mark: str, *, interrupting: bool = False) -> None:
        """Read up to `mark`; with Ctrl-C, and later once more, for one may come too early."""
        now = time.monotonic()
        deadline, next_interrupt = now + PATIENCE_S, now
        while mark not in self.text and (now := time.monotonic()) < deadline:
            if interrupting and now >= next_interrupt:
                self.process.send_signal(signal.SIGINT)
                next_interrupt = now + PATIENCE_S / 4
            if select.select([self.handle], [], [], 0.1)[0]:
                self.text += os.read(self.handle, 4096).decode("utf-8", "replace")
        assert mark in self.text
        self.text = self.text.split(mark, 1)[1]


def test_a_conversation_survives_ctrl_c_and_errors_and_ends_with_ctrl_d(
    home: Path, api: Api
) -> None:
    api.say("Once upon", end=False)
    api.release.clear()
    terminal = Terminal(home)
    try:
        terminal.expect("> ")
        terminal.type("Tell a story\n")
        terminal.expect("Once upon")
        terminal.expect("stopped", interrupting=True)
        assert api.left.wait(PATIENCE_S)  # the request was closed, not left running
        api.release.set()

        api.status, api.events = 503, [json.dumps({"error": {"message": "All are busy"}})]
        terminal.expect("> ")
        terminal.type("Go on\n")
        terminal.expect("All are busy")

        api.status = 200
        api.say("a time.")
        terminal.expect("> ")
        terminal.type("Go on\n")
        terminal.expect("a time.")
        terminal.expect("tiny on")
        terminal.expect("> ")
        terminal.expect("> ", interrupting=True)
        terminal.type("\x04")
        assert terminal.process.wait(PATIENCE_S) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.handle)
    assert api.requests[-1]["messages"] == [
        {"role": "user", "content": "Tell a story"},
        {"role": "assistant", "content": "Once upon"},
        {"role": "user", "content": "Go on"},
    ]

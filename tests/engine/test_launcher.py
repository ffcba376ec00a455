"""The launcher with small real programs as engines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from p2pmesh.engine import launcher
from p2pmesh.engine.server import LISTENING
from tests.engine.samples import lives, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

LAUNCHER = (sys.executable, "-I", "-S", launcher.__file__)
SLEEPER = "import time; print('hello', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('hello', flush=True); time.sleep(600)"
)


class Launched:
    """A launcher and what it said."""

    def __init__(self, log: Path, code: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*LAUNCHER, str(log), LISTENING, "--", sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
            env=env,
        )
        self.engine_pid = int(self.line().removeprefix("pid "))

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().rstrip("\n")

    def close_pipe(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "engine.log"


@pytest.fixture
def launched(log: Path) -> Iterator[list[Launched]]:
    started: list[Launched] = []
    yield started
    for each in started:
        each.process.kill()
        each.process.wait()
        for stream in (each.process.stdin, each.process.stdout):
            assert stream is not None
            stream.close()
        if lives(each.engine_pid):
            os.kill(each.engine_pid, signal.SIGKILL)


def start(
    launched: list[Launched], log: Path, code: str, env: dict[str, str] | None = None
) -> Launched:
    launched.append(Launched(log, code, env))
    return launched[-1]


@pytest.mark.parametrize("code", [SLEEPER, STUBBORN])
def test_the_engine_goes_when_the_pipe_closes(
    log: Path, launched: list[Launched], code: str
) -> None:
    one = start(launched, log, code)
    assert one.line() == "log hello"
    one.close_pipe()
    assert wait_until(lambda: not lives(one.engine_pid), 1.0)
    assert one.process.wait(1.0) == -signal.SIGKILL


def test_a_polite_word_ends_it_politely(log: Path, launched: list[Launched]) -> None:
    one = start(launched, log, SLEEPER)
    assert one.line() == "log hello"
    assert one.process.stdin is not None
    one.process.stdin.write(b"t")
    one.process.stdin.flush()
    assert one.line() == f"exit {-signal.SIGTERM}"
    assert one.process.wait(1.0) == 128 + signal.SIGTERM
    assert not lives(one.engine_pid)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
@pytest.mark.parametrize("stopped", [False, True])
def test_the_engine_goes_when_its_launcher_is_killed(
    log: Path, launched: list[Launched], *, stopped: bool
) -> None:
    one = start(launched, log, STUBBORN)
    assert one.line() == "log hello"
    if stopped:
        one.process.send_signal(signal.SIGSTOP)
    one.process.kill()
    assert wait_until(lambda: not lives(one.engine_pid), 1.0)


def test_a_stopped_engine_goes_as_well(log: Path, launched: list[Launched]) -> None:
    one = start(launched, log, SLEEPER)
    os.kill(one.engine_pid, signal.SIGSTOP)
    one.close_pipe()
    assert wait_until(lambda: not lives(one.engine_pid), 1.0)


def test_the_end_and_its_words_are_told(log: Path, launched: list[Launched]) -> None:
    code = (
        "import sys; print('listening on http://127.0.0.1:4711'); print('failed to think');"
        "sys.exit(3)"
    )
    one = start(launched, log, code)
    said = [one.line() for _ in range(4)]
    assert said == [
        "log listening on http://127.0.0.1:4711",
        "listening 127.0.0.1 4711",
        "log failed to think",
        "exit 3",
    ]
    assert log.read_bytes() == b"listening on http://127.0.0.1:4711\nfailed to think\n"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("srv init: listening on http://127.0.0.1:8080", "listening 127.0.0.1 8080"),
        ("srv init: listening on http://[::1]:8080", "listening ::1 8080"),
        (
            "main: HTTP server is listening, hostname: 127.0.0.1, port: 8080, http threads: 3",
            "listening 127.0.0.1 8080",
        ),
        (
            "main: server is listening on http://127.0.0.1:80 - starting the main loop",
            "listening 127.0.0.1 80",
        ),
    ],
)
def test_all_known_forms_of_the_address(
    log: Path, launched: list[Launched], line: str, told: str
) -> None:
    one = start(launched, log, f"print({line!r})")
    assert one.line() == f"log {line}"
    assert one.line() == told


def test_a_program_that_is_not_there(log: Path) -> None:
    done = subprocess.run(
        [*LAUNCHER, str(log), LISTENING, "--", "/nowhere/llama-server"],
        input=b"",
        stdout=subprocess.PIPE,
        check=False,
        process_group=0,
    )
    assert done.stdout == (
        b"log error: cannot start /nowhere/llama-server: No such file or directory\nexit 127\n"
    )
    assert done.returncode == 127


def test_a_client_that_hangs_up_ends_no_engine(log: Path) -> None:
    """SIGPIPE would, in an engine that writes to a connection without thinking of it."""
    with subprocess.Popen(
        [*LAUNCHER, str(log), LISTENING, "--", "sh", "-c", "kill -PIPE $$; echo alive"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read().splitlines()[1:] == [b"log alive", b"exit 0"]


def test_the_key_is_in_no_log(log: Path, launched: list[Launched]) -> None:
    code = "import os; print('key ' + os.environ['LLAMA_API_KEY'])"
    one = start(launched, log, code, env={"LLAMA_API_KEY": "s3cret", "PATH": "/bin"})
    assert one.line() == "log key ***"
    assert one.line() == "exit 0"
    assert log.read_bytes() == b"key ***\n"


def test_the_log_turns_over_and_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = launcher.Log(str(path), size_bytes_max=100)
    for number in range(100):
        log.write(b"line %03d\n" % number)
    log.close()
    assert path.stat().st_size <= 100
    assert (tmp_path / "x.log.1").stat().st_size <= 100
    assert path.read_bytes().endswith(b"line 099\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.log", "x.log.1"]


def test_a_log_that_was_full_before_is_turned_over(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"x" * 100)
    log = launcher.Log(str(path), size_bytes_max=100)
    log.write(b"new\n")
    log.close()
    assert path.read_bytes() == b"new\n"


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    log = launcher.Log(str(tmp_path / "missing" / "x.log"))
    log.write(b"a\n")
    (tmp_path / "missing").mkdir()
    log.write(b"b\n")
    log.close()
    assert (tmp_path / "missing" / "x.log").read_bytes() == b"b\n"


def test_it_is_small_and_quick(log: Path, launched: list[Launched]) -> None:
    begun_s = time.monotonic()
    one = start(launched, log, SLEEPER)
    assert time.monotonic() - begun_s < 1.0  # 0.02 s alone on a machine
    assert psutil.Process(one.process.pid).memory_info().rss < 24 * 1024 * 1024

"""Small programs that go right and wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from p2pmesh.engine.subprocesses import TAIL_LINES, CommandError, run
from tests.engine.samples import lives


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_lines_are_seen_logged_and_returned(tmp_path: Path) -> None:
    seen: list[str] = []
    log = tmp_path / "log"
    log.write_text("before\n")
    code = "import os, sys; print('a'); print(); print(os.environ['EXTRA']); sys.stdout.flush();"
    code += "print('b', file=sys.stderr)"
    tail = run(python(code), on_line=seen.append, log=log, extra_environ={"EXTRA": "x"})
    assert seen == ["a", "x", "b"] == list(tail)
    assert log.read_text() == "before\na\n\nx\nb\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('Make Error: no'); print('stopped'); exit(1)", "failed: Make Error: no$"),
        ("print('fine'); print('stopped'); exit(1)", "failed: stopped$"),
        ("print('CMake Error in x:'); print('  no GPU.'); exit(1)", "CMake Error in x: no GPU$"),
        ("print('CMake Error in x:'); exit(1)", "failed: CMake Error in x:$"),
        ("exit(3)", "failed: it said nothing$"),
        ("print('x.o: No space left on device'); exit(1)", "^The disk is full; make room"),
        ("print('b'); print('x: error: y'); print('f: fatal error: z'); exit(1)", "error: z$"),
    ],
)
def test_failure_is_one_sentence(code: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        run(python(code))


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(CommandError, match=r"^Cannot run /nowhere/x: No such file or directory$"):
        run(["/nowhere/x"])


def test_only_the_end_is_kept() -> None:
    with pytest.raises(CommandError) as failed:
        run(python("print('x\\n' * 1000); exit(1)"))
    assert len(failed.value.lines) == TAIL_LINES


def test_an_interrupt_ends_the_program_as_well() -> None:
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        assert psutil.pid_exists(pids[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            python("import os, time; print(os.getpid(), flush=True); time.sleep(600)"),
            on_line=interrupt,
        )
    assert not lives(pids[0])

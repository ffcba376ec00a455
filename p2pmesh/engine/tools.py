"""Run a tool of llama.cpp on the user's own model and text, and hear what it says.

    this process ──pipe──► launcher ──► tool

It runs below the launcher, as engines do: when this process goes away, by whatever means, so does
the tool. It is not confined.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from p2pmesh.engine import launcher
from p2pmesh.engine.argv import passed_on
from p2pmesh.engine.find import Engine
from p2pmesh.errors import ConfigError, EngineError, LocalError

CHUNK_TOKENS = 256  # few, so that short texts are enough
TEXT_TOKENS_MIN = 2 * CHUNK_TOKENS  # the tools refuse shorter texts
LINES_KEPT = 40  # of what a tool says, for its complaint
END_S = 5.0

_LAUNCHER = (sys.executable, "-I", "-S", launcher.__file__)
# On a busy machine, threads that spin while they wait keep a tool from writing its last lines.
_PATIENT = {"OMP_WAIT_POLICY": "passive"}
_NEVER = r"(?!)()()"  # a tool listens nowhere, so all that it says is passed on


def tool_program(engine: Engine, name: str) -> Path:
    """Return a tool of an engine, such as `llama-imatrix`.

    Raises:
        EngineError: The engine has none.
    """
    suffix = ".exe" if sys.platform == "win32" else ""
    program = Path(engine.command[0]).with_name(f"{name}{suffix}")
    if engine.kind == "embedded" or not program.is_file():
        raise EngineError(
            f"The {engine.kind} engine {engine.version} ({engine.source}) comes without "
            f"{name}; p2pmesh engine install builds one that has it"
        )
    return program


class Tool:
    """A running tool.

    Attributes:
        pid: Of the tool itself; 0 until it was started.
        exit_code: None until it ended, or when its launcher was ended.
    """

    def __init__(self, process: trio.Process, hear: Callable[[str], None]) -> None:
        self._process = process
        self._hear = hear
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self.pid = 0
        self.exit_code: int | None = None

    async def listen(self) -> None:
        """Take in what the tool says, until it has ended."""
        assert self._process.stdout is not None
        buffer = b""
        async for data in self._process.stdout:
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._take(line.decode("utf-8", "replace"))

    def complaint(self, advice: str) -> str:
        """Return what the tool said about its failure, as a clause.

        Args:
            advice: What to do when its last lines were lost: it often ends before they are written.
        """
        errors = [line for line in self._lines if " E " in line or "error" in line.lower()]
        if errors:
            return "; ".join(line.partition(" E ")[2] or line for line in errors[:2])
        return f"it ended with {self.exit_code} and did not say why; {advice}"

    def _take(self, line: str) -> None:
        match line.split(" ", 1):
            case ["pid", pid]:
                self.pid = int(pid)
            case ["exit", code]:
                self.exit_code = int(code)
            case ["log", said] if said.strip():
                self._lines.append(said)
                self._hear(said)


@contextlib.asynccontextmanager
async def started(argv: Sequence[str], hear: Callable[[str], None]) -> AsyncIterator[Tool]:
    """Start a tool, which is ended at the latest with the block.

    Args:
        argv: The program and its arguments.
        hear: Called with each line that it says, while somebody waits in `Tool.listen`.
    """
    # A process group of its own: the launcher ends the whole group.
    options: dict[str, Any] = {"process_group": 0}
    if sys.platform == "win32":
        options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    process = await trio.lowlevel.open_process(
        [*_LAUNCHER, os.devnull, _NEVER, "--", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**_PATIENT, **passed_on(os.environ)},
        **options,
    )
    try:
        yield Tool(process, hear)
    finally:
        with trio.CancelScope(shield=True):
            await _end(process)


async def check_text(path: Path) -> None:
    """See that a text is not so small that no tool would read it.

    Raises:
        ConfigError: It is too short.
        LocalError: The system does not let it be read.
    """
    try:
        status = await trio.Path(path).stat()
    except OSError as exc:
        raise LocalError(f"Cannot read {path} ({exc.strerror}); check the path") from exc
    if status.st_size < TEXT_TOKENS_MIN:  # a token has a byte
        raise too_short(path)


def is_too_short(said: str) -> bool:
    """Whether a line of a tool says that its text has less than two chunks."""
    return "you need at least" in said


def too_short(text: Path) -> ConfigError:
    """Return the error that says so of a text."""
    return ConfigError(
        f"{text} is too short: the model reads less than {TEXT_TOKENS_MIN} tokens in it; "
        "give a text of some thousand words"
    )


async def _end(process: trio.Process) -> None:
    """Close the pipe, at which the launcher kills its group; then by force."""
    assert process.stdin is not None
    assert process.stdout is not None
    await process.stdin.aclose()
    with trio.move_on_after(END_S):
        await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()
    await process.stdout.aclose()

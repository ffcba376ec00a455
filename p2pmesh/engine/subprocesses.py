"""Run the programs that a build needs, and say in one sentence what went wrong.

Blocking, for commands that a person waits for. Whatever ends the wait, Ctrl-C included, the
program is ended as well: a build never goes on behind the user's back.
"""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from p2pmesh.errors import LocalError

Step = Literal["download", "tools", "unpack", "configure", "build", "check", "done"]

TAIL_LINES = 60
TERMINATE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an installation is.

    Attributes:
        step: What is being done.
        done: Units of this step that are done: bytes, files or build steps.
        total: All of them; 0 when unknown.
        detail: What else there is to say.
    """

    step: Step
    done: int = 0
    total: int = 0
    detail: str = ""


Report = Callable[[Progress], None]


class CommandError(LocalError):
    """A program ended with an error.

    Attributes:
        lines: The last lines that it printed.
    """

    def __init__(self, message: str, lines: Sequence[str]) -> None:
        """Args: what to tell the user, and what the program printed last."""
        super().__init__(message)
        self.lines = tuple(lines)


def run(
    argv: Sequence[str],
    *,
    on_line: Callable[[str], None] = lambda _: None,
    log: Path | None = None,
    extra_environ: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Run a program to its end.

    Args:
        argv: The program and its arguments.
        on_line: Called with every line that it prints.
        log: A file that gets all of it, appended.
        extra_environ: Variables added to this process's own.

    Returns:
        The last lines that it printed.

    Raises:
        CommandError: It could not be started, or ended with an error.
    """
    lines: deque[str] = deque(maxlen=TAIL_LINES)
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(extra_environ or {})},
        )
    except OSError as exc:
        raise CommandError(f"Cannot run {argv[0]}: {exc.strerror}", ()) from exc
    try:
        assert process.stdout is not None
        _collect(process.stdout, lines, on_line, log)
        code = process.wait()
    finally:
        _end(process)
    if code != 0:
        if any("No space left on device" in line for line in lines):
            raise CommandError("The disk is full; make room and run it again", lines)
        raise CommandError(f"{Path(argv[0]).name} failed: {_complaint(lines)}", lines)
    return tuple(lines)


def _collect(
    output: IO[str], lines: deque[str], on_line: Callable[[str], None], log: Path | None
) -> None:
    with open(log or os.devnull, "a", encoding="utf-8") as copy:  # noqa: PTH123 - may be devnull
        for line in output:
            copy.write(line)
            text = line.rstrip()
            if text:
                lines.append(text)
                on_line(text)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(TERMINATE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _complaint(lines: Sequence[str]) -> str:
    """The first line that sounds like an error, else the last one.

    One that ends in a colon only says where (cmake's do): what is wrong follows.
    """
    for word in ("fatal error", "error:", "error", "failed"):
        for number, line in enumerate(lines):
            if word in line.lower():
                ends = number + (2 if line.endswith(":") else 1)
                return " ".join(text.strip() for text in list(lines)[number:ends]).rstrip(".")
    return lines[-1].strip() if lines else "it said nothing"

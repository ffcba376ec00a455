"""Run llama-imatrix, which sends text through a model and counts what its experts do.

    this process ──pipe──► launcher ──► llama-imatrix ──► FILE.gguf, rewritten every few chunks

It runs below the launcher, as engines do: when this process goes away, by whatever means, so does
llama-imatrix. It works on the user's own model and text, writes a file, and is not confined.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import trio

from p2pmesh.engine import launcher
from p2pmesh.engine.argv import passed_on
from p2pmesh.engine.find import Engine
from p2pmesh.errors import ConfigError, EngineError, LocalError
from p2pmesh.models.imatrix import saved_chunks

CHUNK_TOKENS = 256  # few, so that short texts are enough
TEXT_TOKENS_MIN = 2 * CHUNK_TOKENS  # llama-imatrix refuses shorter texts
SAVE_CHUNKS = 4  # between two saves; a file is up to 1 GB, and a chunk of so large a model minutes
POLL_S = 0.2
SAVE_S = 60.0  # for the end of a save that the deadline met
END_S = 5.0
WORDS = 40  # lines that are kept of what it says

_PROGRAM = f"llama-imatrix{'.exe' if sys.platform == 'win32' else ''}"
_LAUNCHER = (sys.executable, "-I", "-S", launcher.__file__)
_NEVER = r"(?!)()()"  # it listens nowhere, so all that it says is passed on

Progress = Callable[[int, int], None]
"""Called with chunks done, as far as they are saved, and chunks in all; 0 while unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """What llama-imatrix shall do.

    Attributes:
        program: llama-imatrix itself.
        model: First file of the model.
        text: A file of UTF-8 text.
        output: The file that it writes; none may be there.
        deadline_s: Seconds that it may take.
    """

    program: Path
    model: Path
    text: Path
    output: Path
    deadline_s: float


def imatrix_program(engine: Engine) -> Path:
    """Return the llama-imatrix of an engine.

    Raises:
        EngineError: It has none.
    """
    program = Path(engine.command[0]).with_name(_PROGRAM)
    if engine.kind == "embedded" or not program.is_file():
        raise EngineError(
            f"The {engine.kind} engine {engine.version} ({engine.source}) comes without "
            "llama-imatrix; p2pmesh engine install builds one that has it"
        )
    return program


async def collect(job: Collection, progress: Progress) -> bool:
    """Run llama-imatrix until it ends, or until its deadline.

    Returns:
        Whether all of the text was seen; at the deadline `output` holds what was saved until then.

    Raises:
        ConfigError: The text is too short.
        LocalError: The system does not let the text be read.
        EngineError: It failed, or its deadline came before it had saved anything.
    """
    if await trio.to_thread.run_sync(_size, job.text) < TEXT_TOKENS_MIN:  # a token has a byte
        raise _too_short(job.text)
    process = await _start(job)
    run = _Run(job, progress)
    is_complete = False
    try:
        with trio.move_on_after(job.deadline_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.poll)
                await run.listen(process)
                nursery.cancel_scope.cancel()
            is_complete = True
        if not is_complete:
            await run.stop_between_saves()
    finally:
        with trio.CancelScope(shield=True):
            await _end(process)
    if is_complete and run.exit_code != 0:
        if run.is_too_short:
            raise _too_short(job.text)
        raise EngineError(f"llama-imatrix failed: {run.complaint()}")
    if saved_chunks(job.output) == 0:
        raise EngineError(
            f"llama-imatrix saw less than {SAVE_CHUNKS} pieces of {job.text.name} within "
            f"{job.deadline_s:.0f} s; give it more time, or another machine"
        )
    return is_complete


class _Run:
    """What is known of a running llama-imatrix."""

    def __init__(self, job: Collection, progress: Progress) -> None:
        self._job = job
        self._progress = progress
        self._pid = 0
        self._chunks = 0
        self._lines: list[str] = []
        self.exit_code: int | None = None

    async def listen(self, process: trio.Process) -> None:
        """Take in what the launcher says, to its end."""
        assert process.stdout is not None
        buffer = b""
        async for data in process.stdout:
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._take(line.decode("utf-8", "replace"))

    def _take(self, line: str) -> None:
        match line.split(" "):
            case ["pid", pid]:
                self._pid = int(pid)
            case ["exit", code]:
                self.exit_code = int(code)
            case ["log", *words] if any(words):
                self._lines = [*self._lines, " ".join(words)][-WORDS:]
                if "over" in words and "chunks," in words:  # "computing over 7 chunks, n_ctx=…"
                    count = words[words.index("over") + 1]
                    self._chunks = int(count) if count.isdigit() else 0

    async def poll(self) -> None:
        """Report how far it is, by what it has saved."""
        done = 0
        while True:
            saved = await trio.to_thread.run_sync(saved_chunks, self._job.output)
            done = max(done, saved)  # in the middle of a save the file says nothing
            self._progress(done, self._chunks)
            await trio.sleep(POLL_S)

    async def stop_between_saves(self) -> None:
        """Stop it at a moment in which its file is whole.

        It is stopped before the file is looked at, since it might begin to write it anew after.
        """
        with trio.move_on_after(SAVE_S):
            while self._job.output.exists():
                try:
                    process = psutil.Process(self._pid)
                    process.suspend()
                    if saved_chunks(self._job.output):
                        return
                    process.resume()
                except psutil.NoSuchProcess:
                    return  # it has just ended by itself
                await trio.sleep(POLL_S)

    @property
    def is_too_short(self) -> bool:
        """Whether it said that the text has less than two chunks."""
        return any("you need at least" in line for line in self._lines)

    def complaint(self) -> str:
        """Return what it said about its failure, or what to do if its last lines were lost."""
        errors = [line for line in self._lines if " E " in line or "error" in line.lower()]
        if errors:
            return "; ".join(line.partition(" E ")[2] or line for line in errors[:2])
        # It often ends before its last lines are written.
        return (
            f"it ended with {self.exit_code} and did not say why; give a text of some thousand "
            f"words, or see by p2pmesh up --model {self._job.model} whether this engine runs it"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as exc:
        raise LocalError(f"Cannot read {path} ({exc.strerror}); check the path") from exc


def _too_short(text: Path) -> ConfigError:
    return ConfigError(
        f"{text} is too short: the model reads less than {TEXT_TOKENS_MIN} tokens in it; "
        "give a text of some thousand words"
    )


async def _start(job: Collection) -> trio.Process:
    # A process group of its own: the launcher ends the whole group.
    options: dict[str, Any] = {"process_group": 0}
    if sys.platform == "win32":
        options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return await trio.lowlevel.open_process(
        [*_LAUNCHER, os.devnull, _NEVER, "--", *_argv(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=passed_on(os.environ),
        **options,
    )


def _argv(job: Collection) -> Sequence[str]:
    size = str(CHUNK_TOKENS)
    return (
        str(job.program), "--model", str(job.model), "--file", str(job.text),
        "--output", str(job.output), "--output-frequency", str(SAVE_CHUNKS),
        # One chunk at a time, so that a save is never far.
        "--ctx-size", size, "--batch-size", size, "--ubatch-size", size, "--no-ppl",
    )  # fmt: skip


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

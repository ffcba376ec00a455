"""Run llama-imatrix, which sends text through a model and counts what its experts do.

this process ──pipe──► launcher ──► llama-imatrix ──► FILE.gguf, rewritten every few chunks

`tools.py` starts and ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import trio

from p2pmesh.engine.find import Engine
from p2pmesh.engine.tools import (
    CHUNK_TOKENS,
    Tool,
    check_text,
    is_too_short,
    started,
    too_short,
    tool_program,
)
from p2pmesh.errors import EngineError
from p2pmesh.models.imatrix import saved_chunks

SAVE_CHUNKS = 4  # between two saves; a file is up to 1 GB, and a chunk of so large a model minutes
POLL_S = 0.2
SAVE_S = 60.0  # for the end of a save that the deadline met

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
    return tool_program(engine, "llama-imatrix")


async def collect(job: Collection, progress: Progress) -> bool:
    """Run llama-imatrix until it ends, or until its deadline.

    Returns:
        Whether all of the text was seen; at the deadline `output` holds what was saved until then.

    Raises:
        ConfigError: The text is too short.
        LocalError: The system does not let the text be read.
        EngineError: It failed, or its deadline came before it had saved anything.
    """
    await check_text(job.text)
    run = _Run(job, progress)
    is_complete = False
    async with started(_argv(job), run.hear) as tool:
        with trio.move_on_after(job.deadline_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.poll)
                await tool.listen()
                nursery.cancel_scope.cancel()
            is_complete = True
        if not is_complete:
            await run.stop_between_saves(tool)
    if is_complete and tool.exit_code != 0:
        if run.is_too_short:
            raise too_short(job.text)
        advice = (
            "give a text of some thousand words, or see by p2pmesh up --model "
            f"{job.model} whether this engine runs it"
        )
        raise EngineError(f"llama-imatrix failed: {tool.complaint(advice)}")
    if saved_chunks(job.output) == 0:
        raise EngineError(
            f"llama-imatrix saw less than {SAVE_CHUNKS} pieces of {job.text.name} within "
            f"{job.deadline_s:.0f} s; give it more time, or another machine"
        )
    return is_complete


class _Run:
    """What is known of a running llama-imatrix.

    Attributes:
        is_too_short: Whether it said that the text has less than two chunks.
    """

    def __init__(self, job: Collection, progress: Progress) -> None:
        self._job = job
        self._progress = progress
        self._chunks = 0
        self.is_too_short = False

    def hear(self, said: str) -> None:
        """Take in a line that it says."""
        words = said.split(" ")
        if "over" in words and "chunks," in words:  # "computing over 7 chunks, n_ctx=…"
            count = words[words.index("over") + 1]
            self._chunks = int(count) if count.isdigit() else 0
        self.is_too_short |= is_too_short(said)

    async def poll(self) -> None:
        """Report how far it is, by what it has saved."""
        done = 0
        while True:
            saved = await trio.to_thread.run_sync(saved_chunks, self._job.output)
            done = max(done, saved)  # in the middle of a save the file says nothing
            self._progress(done, self._chunks)
            await trio.sleep(POLL_S)

    async def stop_between_saves(self, tool: Tool) -> None:
        """Stop it at a moment in which its file is whole.

        It is stopped before the file is looked at, since it might begin to write it anew after.
        """
        with trio.move_on_after(SAVE_S):
            while self._job.output.exists():
                try:
                    process = psutil.Process(tool.pid)
                    process.suspend()
                    if saved_chunks(self._job.output):
                        return
                    process.resume()
                except psutil.NoSuchProcess:
                    return  # it has just ended by itself
                await trio.sleep(POLL_S)


def _argv(job: Collection) -> Sequence[str]:
    size = str(CHUNK_TOKENS)
    return (
        str(job.program), "--model", str(job.model), "--file", str(job.text),
        "--output", str(job.output), "--output-frequency", str(SAVE_CHUNKS),
        # One chunk at a time, so that a save is never far.
        "--ctx-size", size, "--batch-size", size, "--ubatch-size", size, "--no-ppl",
    )  # fmt: skip

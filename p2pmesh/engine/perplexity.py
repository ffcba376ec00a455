"""Run llama-perplexity, which says how far the answers of one model are from those of another.

It keeps what the whole model answers to a text in a file, all probabilities of every second half of
a chunk; then it runs the other model on the same tokens and compares.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pmesh.engine.find import Engine
from p2pmesh.engine.tools import (
    CHUNK_TOKENS,
    check_text,
    is_too_short,
    started,
    too_short,
    tool_program,
)
from p2pmesh.errors import EngineError, LocalError

SCORED_TOKENS = CHUNK_TOKENS - CHUNK_TOKENS // 2 - 1  # of a chunk; those before are context only
# Its last lines are lost when it ends before it has written them, about every third time where the
# model is tiny, whose memory is given back in no time.
ATTEMPTS = 8

_HEAD = struct.Struct("<8s3i")  # "_logits_", tokens of a chunk, vocabulary, chunks
_TOKEN_BYTES = 4
_DIVERGENCE = re.compile(r"Mean +KLD: +(-?\d+\.\d+)")
_RATIO = re.compile(r"Mean +ln\(PPL\(Q\)/PPL\(base\)\) +: +(-?\d+\.\d+)")
_AGREEMENT = re.compile(r"Same top p: +(\d+\.\d+)")
# A line after each chunk, about all until then: perplexity, the logarithm of its ratio, divergence,
# change of probabilities, agreement.
_STEP = re.compile(
    r" *(?P<chunk>\d+) +\S+ ± +\S+ +(?P<ratio>-?\d+\.\d+) ± +\S+"
    r" +(?P<divergence>-?\d+\.\d+) ± .* ± .* %"
    r" +(?P<agreement>\d+\.\d+) ± .* %"
)

Progress = Callable[[int, int], None]
"""Called with chunks done and chunks in all."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How far the answers of a model are from those of the whole one.

    Attributes:
        divergence: Kullback-Leibler divergence, the mean per token, in nats. Rounding may make it
            slightly negative where the models are the same.
        agreement: Share of the tokens for which both prefer the same one, from 0 to 1.
        perplexity: Of the text, by that of the whole model; 1.1 is ten percent worse.
    """

    divergence: float
    agreement: float
    perplexity: float


class Reading:
    """What llama-perplexity has said of its comparison so far.

    Args:
        total: The chunks that it compares.

    Attributes:
        chunks: Of them, those that are done.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self.chunks = 0
        self._divergence: float | None = None
        self._agreement: float | None = None
        self._log_ratio: float | None = None

    def hear(self, said: str) -> None:
        """Take in a line that it says."""
        if match := _STEP.match(said):
            self.chunks = int(match["chunk"])
            if self.chunks == self._total:  # in case that the lines after it are lost
                self._divergence = float(match["divergence"])
                self._agreement = float(match["agreement"]) / 100
                self._log_ratio = float(match["ratio"])
        elif match := _RATIO.match(said):
            self._log_ratio = float(match[1])
        elif match := _DIVERGENCE.match(said):  # with a decimal more
            self._divergence = float(match[1])
        elif match := _AGREEMENT.match(said):
            self._agreement = float(match[1]) / 100

    @property
    def figures(self) -> Figures | None:
        """Return what it found; None unless it has said all of it."""
        if self._divergence is None or self._agreement is None or self._log_ratio is None:
            return None
        return Figures(self._divergence, self._agreement, math.exp(self._log_ratio))


def perplexity_program(engine: Engine) -> Path:
    """Return the llama-perplexity of an engine.

    Raises:
        EngineError: It has none.
    """
    return tool_program(engine, "llama-perplexity")


def saved_chunks(answers: Path) -> int:
    """Return how many chunks a file of answers has; 0 unless it is whole."""
    with answers.open("rb") as file:
        head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return 0
    _, _, vocabulary, chunks = _HEAD.unpack(head)
    is_whole = answers.stat().st_size == _HEAD.size + chunks * _answer_bytes(vocabulary)
    return int(chunks) if is_whole else 0


async def save_answers(program: Path, model: Path, text: Path, answers: Path, chunks: int) -> int:
    """Run a text through the whole model and keep its answers.

    Cancelling ends the program.

    Args:
        program: llama-perplexity itself.
        model: First file of the model.
        text: A file of UTF-8 text.
        answers: The file to write.
        chunks: How many to run at most, each of `CHUNK_TOKENS`.

    Returns:
        How many chunks there are.

    Raises:
        ConfigError: The text is too short.
        LocalError: The system does not let the text be read, or the answers be written.
        EngineError: The model cannot be run here.
    """
    await check_text(text)
    said: list[str] = []
    argv = (*_argv(program, model, answers), "--file", str(text), "--chunks", str(chunks))
    async with started(argv, said.append) as tool:
        await tool.listen()
    if any(map(is_too_short, said)):
        raise too_short(text)
    if tool.exit_code != 0:
        advice = f"see by p2pmesh up --model {model} whether this engine runs it"
        raise EngineError(
            f"The whole model does not run here: {tool.complaint(advice)}. Measure on a machine "
            "with the memory for it; where there is none, shards that have 90 % of the importance "
            "of each layer are used unmeasured"
        )
    try:
        saved = saved_chunks(answers)
    except OSError as exc:
        raise LocalError(f"Cannot read {answers} ({exc.strerror}); choose another --home") from exc
    if not saved:
        raise LocalError(
            f"llama-perplexity has not written all answers into {answers.parent}; make room, or "
            "choose another --home"
        )
    return saved


async def compare(program: Path, model: Path, answers: Path, progress: Progress) -> Figures:
    """Run a model on the tokens of a file of answers, and compare its own with them.

    Cancelling ends the program.

    Args:
        program: llama-perplexity itself.
        model: The other model, with the same vocabulary.
        answers: As `save_answers` wrote it.
        progress: Called when chunks are done.

    Raises:
        EngineError: It failed, or its figures were lost each time.
    """
    total = saved_chunks(answers)
    for _ in range(ATTEMPTS):
        reading = Reading(total)

        def hear(said: str, reading: Reading = reading) -> None:
            reading.hear(said)
            progress(reading.chunks, total)

        async with started((*_argv(program, model, answers), "--kl-divergence"), hear) as tool:
            await tool.listen()
        if tool.exit_code != 0:
            advice = "run it again, or see by p2pmesh doctor whether the engine is in order"
            raise EngineError(f"llama-perplexity failed on a shard: {tool.complaint(advice)}")
        if reading.figures is not None:
            return reading.figures
    raise EngineError(
        f"llama-perplexity ended {ATTEMPTS} times without its figures; run the command again, and "
        "p2pmesh engine install if that does not help"
    )


def _answer_bytes(vocabulary: int) -> int:
    """Return what the answers to one chunk take in a file, where there are so many tokens."""
    # Two bytes for each probability, made even in number, and two floats to scale them by.
    token = 2 * (2 * ((vocabulary + 1) // 2) + 4)
    return SCORED_TOKENS * token + CHUNK_TOKENS * _TOKEN_BYTES


def _argv(program: Path, model: Path, answers: Path) -> Sequence[str]:
    size = str(CHUNK_TOKENS)
    return (
        str(program), "--model", str(model), "--kl-divergence-base", str(answers),
        # One chunk at a time: the probabilities of many take as much memory as a small model.
        "--ctx-size", size, "--batch-size", size, "--ubatch-size", size,
    )  # fmt: skip

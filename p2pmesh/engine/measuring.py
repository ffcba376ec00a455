"""Measure how good the shards of a model are, on several texts, within a time and some disk.

What the whole model answers to each text is kept in a file, once for all shards. Shards are
written one at a time and deleted when they were compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Protocol

import trio

from p2pmesh.engine.perplexity import Figures, compare, save_answers
from p2pmesh.errors import LocalError
from p2pmesh.models.parts import ShardKind, ShardQuality
from p2pmesh.models.store import Progress
from p2pmesh.sharing import DIVERGENCE_LIMIT, MILLION

CHUNKS_MAX = 40  # of a text: with so many, other tools agree to 0.0003 nats
CHUNKS_MIN = 4  # some 500 tokens; with fewer the figures are chance
PILOT_CHUNKS = 2  # enough to learn what one costs

Report = Callable[[str, int, int], None]
"""Called with what is being done, the chunks that are done, and all of them; 0 while unknown."""


class Candidate(Protocol):
    """A shard before it is written: see `candidates.Candidate`."""

    @property
    def kind(self) -> ShardKind:
        """Return whether it leaves out experts or neurons."""

    @property
    def quality(self) -> ShardQuality:
        """Return its kind, ranking, places and coverage; unmeasured."""

    @property
    def holds(self) -> str:
        """Return what it holds, for people."""

    def write(self, output: Path, progress: Progress) -> int:
        """Write its file and return the size of that in bytes; blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to measure.

    Attributes:
        program: llama-perplexity itself.
        model: First file of the whole model.
        texts: Files of UTF-8 text by the name of their domain; at least one.
        candidates: The shards, those of each kind together and ascending.
        sizes: How many of each kind to measure at most.
        divergence_max: Of shards that are good enough, in millionths of a nat.
        folder: For files that are not needed afterwards.
        answers_bytes_max: What the answers of the whole model may take there.
        deadline_s: Seconds for all of it.
    """

    program: Path
    model: Path
    texts: Mapping[str, Path]
    candidates: Sequence[Candidate]
    sizes: int
    divergence_max: int
    folder: Path
    answers_bytes_max: int
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A shard that was measured.

    Attributes:
        quality: What was measured on the domain where the shard is worst.
        holds: What the shard holds, for people.
        size_bytes: Of its file.
        figures: By domain.
    """

    quality: ShardQuality
    holds: str
    size_bytes: int
    figures: Mapping[str, Figures]

    @property
    def agreement(self) -> float:
        """Return on what share of the tokens it agrees with the model, in its worst domain."""
        return min(one.agreement for one in self.figures.values())


async def measure(task: Task, keep: Callable[[Measured], None], report: Report) -> bool:
    """Measure shards, to find the smallest of each kind that is good enough.

    Larger shards are taken to be better, so that each measure halves what is left to search.

    Args:
        task: What to measure.
        keep: Called with each shard when all texts are done.
        report: Called now and then.

    Returns:
        Whether it got through before its deadline.

    Raises:
        ConfigError: A text is too short.
        EngineError: The whole model cannot be run here, or a shard fails.
        ModelError: The model cannot be cut, is damaged, or changed meanwhile.
        LocalError: There is no room, or the system does not let files be read or written.
    """
    with trio.move_on_after(task.deadline_s) as scope:
        answers = await _answers(task, report)
        for _, group in groupby(task.candidates, lambda one: one.kind):
            ladder = tuple(group)
            bad, good = -1, len(ladder)  # places in it
            for _ in range(task.sizes):
                if good - bad == 1:
                    break
                middle = (bad + good) // 2
                measured = await _measured(task, ladder[middle], answers, report)
                keep(measured)
                if measured.quality.divergence <= task.divergence_max:
                    good = middle
                else:
                    bad = middle
    return not scope.cancelled_caught


async def _answers(task: Task, report: Report) -> Mapping[str, Path]:
    """Return files with what the whole model answers, by domain."""
    chunks = await _chunks(task, report)
    answers: dict[str, Path] = {}
    for number, (domain, text) in enumerate(sorted(task.texts.items())):
        report(f"The whole model on {domain}", 0, 0)
        answers[domain] = task.folder / f"{number}.answers"
        await save_answers(task.program, task.model, text, answers[domain], chunks)
    return answers


async def _chunks(task: Task, report: Report) -> int:
    """Return how many chunks of each text there are disk and time for."""
    pilot = task.folder / "pilot.answers"
    [text, *_] = task.texts.values()
    report("The first pieces of text", 0, 0)
    start_s = trio.current_time()
    done = await save_answers(task.program, task.model, text, pilot, PILOT_CHUNKS)
    each_s = (trio.current_time() - start_s) / done
    each_bytes = pilot.stat().st_size // done * len(task.texts)
    pilot.unlink()
    if each_bytes * CHUNKS_MIN > task.answers_bytes_max:
        raise LocalError(
            f"The answers of this model take {each_bytes * CHUNKS_MIN >> 20} MiB of disk at least, "
            f"and they may take {task.answers_bytes_max >> 20} MiB; make room, allow more with "
            "--disk, or choose another --home"
        )
    chunks = min(CHUNKS_MAX, task.answers_bytes_max // each_bytes)
    kinds = groupby(task.candidates, lambda one: one.kind)
    shards = sum(min(len(tuple(group)), task.sizes) for _, group in kinds)
    runs = len(task.texts) * (1 + shards)
    if runs * chunks * each_s > task.deadline_s:
        chunks = max(CHUNKS_MIN, int(task.deadline_s / (runs * each_s)))
    return chunks


async def _measured(
    task: Task, candidate: Candidate, answers: Mapping[str, Path], report: Report
) -> Measured:
    path = task.folder / "shard.gguf"
    report(f"Writing {candidate.holds}", 0, 0)
    # What asks whether the work was cancelled ends the thread.
    size_bytes = await trio.to_thread.run_sync(
        candidate.write, path, lambda _done, _total: trio.from_thread.check_cancelled()
    )
    figures = {
        domain: await compare(
            task.program, path, file, partial(report, f"{candidate.holds} on {domain}")
        )
        for domain, file in answers.items()
    }
    path.unlink()
    worst = max(one.divergence for one in figures.values())
    return Measured(
        quality=candidate.quality._replace(
            divergence=min(max(round(worst * MILLION), 0), DIVERGENCE_LIMIT)
        ),
        holds=candidate.holds,
        size_bytes=size_bytes,
        figures=figures,
    )

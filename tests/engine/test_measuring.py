"""Which shards are measured, on how much text; the figures themselves are made up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from p2pmesh.engine import measuring as module
from p2pmesh.engine.measuring import CHUNKS_MAX, CHUNKS_MIN, PILOT_CHUNKS, Measured, Task, measure
from p2pmesh.engine.perplexity import Figures, Progress
from p2pmesh.errors import LocalError
from p2pmesh.models.parts import UNMEASURED, ShardKind, ShardQuality
from p2pmesh.models.store import Progress as Written

CHUNK_BYTES = 1000
PLACES = 16
DEADLINE_S = 600.0


@dataclass(frozen=True)
class Made:
    """A candidate whose file says how far it diverges on code and on prose."""

    critical: int
    code: float
    prose: float
    kind: ShardKind = ShardKind.EXPERTS

    @property
    def quality(self) -> ShardQuality:
        return ShardQuality(self.kind, "ab" * 32, PLACES, self.critical, UNMEASURED, 900_000)

    @property
    def holds(self) -> str:
        return f"{self.critical} of {PLACES} experts"

    def write(self, output: Path, progress: Written) -> int:
        progress(0, 1)
        output.write_text(f"{self.code} {self.prose}")
        return self.critical


@dataclass
class Tool:
    """In place of llama-perplexity, and of the time that it takes."""

    clock: trio.testing.MockClock = field(default_factory=trio.testing.MockClock)
    chunk_s: float = 0.0
    asked: list[int] = field(default_factory=list)

    async def save(
        self, _program: Path, _model: Path, text: Path, answers: Path, chunks: int
    ) -> int:
        self.asked.append(chunks)
        self.clock.jump(chunks * self.chunk_s)
        await trio.Path(answers).write_bytes(text.name.encode().ljust(chunks * CHUNK_BYTES))
        return chunks

    async def compare(
        self, _program: Path, shard: Path, answers: Path, progress: Progress
    ) -> Figures:
        content = await trio.Path(answers).read_bytes()
        chunks = len(content) // CHUNK_BYTES
        self.clock.jump(chunks * self.chunk_s)
        progress(chunks, chunks)
        code, prose = (await trio.Path(shard).read_text()).split()
        divergence = float(code if content.startswith(b"code") else prose)
        return Figures(divergence, 1 - divergence, 1.0)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Tool:
    made = Tool()
    monkeypatch.setattr(module, "save_answers", made.save)
    monkeypatch.setattr(module, "compare", made.compare)
    return made


def task(folder: Path, candidates: Iterable[Made], answers_bytes_max: int = 10**9) -> Task:
    return Task(
        program=Path("none"),
        model=Path("none"),
        texts={name: Path(name) for name in ("code", "prose")},
        candidates=list(candidates),
        sizes=4,
        divergence_max=100_000,
        folder=folder,
        answers_bytes_max=answers_bytes_max,
        deadline_s=DEADLINE_S,
    )


def quiet(_what: str, _done: int, _total: int) -> None:
    pass


async def test_the_worst_domain_counts(tool: Tool, tmp_path: Path) -> None:
    found: list[Measured] = []
    told: list[str] = []
    made = [Made(8, code=0.4, prose=0.25), Made(12, code=0.1, prose=0.2)]
    work = task(tmp_path, made)
    assert await measure(work, found.append, lambda what, *_: told.append(what))
    assert [one.quality.divergence for one in found] == [400_000, 200_000]
    assert [one.quality.critical for one in found] == [8, 12], "neither is good enough"
    assert found[0].figures == {"code": Figures(0.4, 0.6, 1.0), "prose": Figures(0.25, 0.75, 1.0)}
    assert found[0].agreement == 0.6
    assert found[1].size_bytes == 12
    assert "12 of 16 experts on prose" in told
    assert tool.asked == [PILOT_CHUNKS, CHUNKS_MAX, CHUNKS_MAX]
    assert {one.name for one in await trio.Path(tmp_path).iterdir()} == {"0.answers", "1.answers"}


async def test_noise_below_nothing_is_nothing(tool: Tool, tmp_path: Path) -> None:
    found: list[Measured] = []
    assert await measure(task(tmp_path, [Made(15, -1e-6, -2e-6)]), found.append, quiet)
    assert found[0].quality.divergence == 0
    assert tool.asked


@pytest.mark.parametrize("least", range(1, 17))
async def test_of_each_kind_the_smallest_that_is_good_enough_is_found(
    tool: Tool, tmp_path: Path, least: int
) -> None:
    found: list[Measured] = []
    made = [
        Made(size, code=0.1 if size >= least else 0.11, prose=0.05, kind=kind)
        for kind in ShardKind
        for size in range(1, 16)
    ]
    assert await measure(task(tmp_path, made), found.append, quiet)
    for kind in ShardKind:
        own = [one.quality for one in found if one.quality.kind is kind]
        assert len(own) <= 4
        good = [one.critical for one in own if one.divergence <= 100_000]
        assert min(good, default=16) == least
        assert (
            max((one.critical for one in own if one.critical not in good), default=0) == least - 1
        )
    assert tool.asked


async def test_no_more_sizes_are_measured_than_are_asked_for(tool: Tool, tmp_path: Path) -> None:
    found: list[Measured] = []
    made = [Made(size, code=0.5, prose=0.5) for size in range(1, 101)]
    assert await measure(task(tmp_path, made), found.append, quiet)
    assert [one.quality.critical for one in found] == [50, 75, 88, 94]
    assert tool.asked


async def test_there_is_less_text_where_time_is_short(
    tool: Tool, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    tool.clock, tool.chunk_s = mock_clock, 10.0  # 60 chunks in all
    found: list[Measured] = []
    await measure(task(tmp_path, [Made(8, 0.5, 0.5)]), found.append, quiet)
    assert tool.asked[1:] == [15, 15]


async def test_at_the_deadline_what_was_measured_counts(
    tool: Tool, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    tool.clock, tool.chunk_s = mock_clock, 30.0
    found: list[Measured] = []
    made = [Made(size, 0.5, 0.5) for size in (8, 9, 10, 11, 12)]
    assert not await measure(task(tmp_path, made), found.append, quiet)
    assert tool.asked[1:] == [CHUNKS_MIN, CHUNKS_MIN]
    assert [one.quality.critical for one in found] == [10]


async def test_there_is_less_text_where_disk_is_short(tool: Tool, tmp_path: Path) -> None:
    made = [Made(8, 0.5, 0.5)]
    await measure(task(tmp_path, made, 2 * 7 * CHUNK_BYTES), lambda _: None, quiet)
    assert tool.asked[1:] == [7, 7]
    with pytest.raises(LocalError, match="make room, allow more with --disk"):
        await measure(task(tmp_path, made, 2 * 3 * CHUNK_BYTES), lambda _: None, quiet)

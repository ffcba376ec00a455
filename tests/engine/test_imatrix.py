"""llama-imatrix of a real engine on the embedded model: what it counts, and how it is ended."""

from __future__ import annotations

import functools
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing

import p2pmesh
from p2pmesh.engine.find import SERVER, Engine, find_engine
from p2pmesh.engine.imatrix import Collection, collect, imatrix_program
from p2pmesh.engine.tools import CHUNK_TOKENS
from p2pmesh.errors import ConfigError, EngineError, LocalError
from p2pmesh.home import Home
from p2pmesh.models.expert_scores import layer_scores
from p2pmesh.models.imatrix import down_tensors, read_imatrix
from p2pmesh.models.store import Store
from tests.engine.samples import MODEL, native

PROSE = Path(p2pmesh.__file__).parent / "models" / "data" / "prose.txt"
USED = 4  # experts of the embedded model that each token reaches
DEADLINE_S = 60.0


@functools.cache
def engine() -> Engine:
    return find_engine(native() / SERVER, Path("none"), {})


def job(
    folder: Path, *, text: Path = PROSE, model: Path = MODEL, deadline_s: float = DEADLINE_S
) -> Collection:
    return Collection(
        program=imatrix_program(engine()),
        model=model,
        text=text,
        output=folder / "imatrix.gguf",
        deadline_s=deadline_s,
    )


def endless(folder: Path) -> Path:
    """A text that keeps llama-imatrix busy for minutes."""
    path = folder / "endless.txt"
    path.write_text(PROSE.read_text("utf-8") * 500, "utf-8")
    return path


def running(program: str) -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [one for one in children if one.is_running() and program in one.name()]


async def test_every_token_reaches_its_experts(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    assert await collect(job(tmp_path), lambda *step: told.append(step))
    tensors = down_tensors(Store(Home.at(tmp_path / "home"), environ={}).open(MODEL))
    matrix = read_imatrix(tmp_path / "imatrix.gguf", tensors)
    assert matrix.chunks > 2
    for statistics in matrix.layers.values():
        assert statistics.counts.sum() == matrix.chunks * CHUNK_TOKENS * USED
    scores = list(layer_scores(tensors, [matrix], lambda _done, _total: None))
    # Router weights are not in these statistics, but an expert that many tokens reach does more.
    assert all(
        (one.energy > 0).any() and (one.energy[one.counts == 0] == 0).all() for one in scores
    )
    assert told


async def test_at_the_deadline_what_was_saved_counts(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    mock_clock.rate = 1
    work = job(tmp_path, text=endless(tmp_path))
    saved: list[int] = []

    def note(done: int, _total: int) -> None:
        saved.append(done)
        if done:
            mock_clock.jump(DEADLINE_S)

    assert not await collect(work, note)
    tensors = down_tensors(Store(Home.at(tmp_path / "home"), environ={}).open(MODEL))
    assert read_imatrix(work.output, tensors).chunks >= max(saved) > 0
    assert not running("llama-imatrix")


async def test_no_process_is_left_when_the_work_is_cancelled(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:

            def stop(done: int, _total: int) -> None:
                if done:
                    nursery.cancel_scope.cancel()

            await collect(job(tmp_path, text=endless(tmp_path)), stop)
    assert nursery.cancel_scope.cancelled_caught
    assert not running("llama-imatrix")


def nothing(_done: int, _total: int) -> None:
    pass


async def test_a_text_that_is_too_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Good morning.")
    with pytest.raises(ConfigError, match=r"short\.txt is too short: .* less than 512 tokens"):
        await collect(job(tmp_path, text=tmp_path / "short.txt"), nothing)
    # llama-imatrix may end before it has said so, but what to do about it is said either way.
    (tmp_path / "short.txt").write_text("Good morning. " * 100)
    with pytest.raises((ConfigError, EngineError), match="give a text of some thousand words"):
        await collect(job(tmp_path, text=tmp_path / "short.txt"), nothing)
    with pytest.raises(LocalError, match=r"none\.txt .*; check the path"):
        await collect(job(tmp_path, text=tmp_path / "none.txt"), nothing)


async def test_a_model_that_it_cannot_load_is_its_failure(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(MODEL.read_bytes()[:10_000])
    with pytest.raises(EngineError, match="llama-imatrix failed: "):
        await collect(job(tmp_path, model=tmp_path / "model.gguf"), nothing)


async def test_no_time_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="give it more time"):
        await collect(job(tmp_path, text=endless(tmp_path), deadline_s=0), nothing)


def test_an_engine_without_the_program_says_how_to_get_it() -> None:
    with pytest.raises(EngineError, match="p2pmesh engine install builds one that has it"):
        imatrix_program(
            Engine(command=("elsewhere/llama-server",), source="path", kind="native", version="b1")
        )

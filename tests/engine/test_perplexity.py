"""llama-perplexity: how its figures are read, and a real one on shards of the embedded model."""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path

import pytest

from p2pmesh.engine import perplexity as module
from p2pmesh.engine.find import SERVER, find_engine
from p2pmesh.engine.perplexity import (
    Figures,
    Reading,
    compare,
    perplexity_program,
    save_answers,
    saved_chunks,
)
from p2pmesh.errors import ConfigError, EngineError, LocalError
from p2pmesh.home import Home
from p2pmesh.models.experts import first_experts
from p2pmesh.models.slice import read_layout, write_shard
from p2pmesh.models.store import Store
from tests.engine.samples import MODEL, native

TEXT = MODEL.parent / "manual.txt"
CHUNKS = 4
# Captured from build 11434 on a shard of 8 of 16 experts.
SAID = """\
0.00.671.741 I kl_divergence: computing over 4 chunks, n_ctx=256, batch_size=256, n_seq=1
0.00.726.137 I kl_divergence: 0.05 seconds per pass - ETA 0.00 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              \
Δp RMS            Same top p
   1     355.5571 ±   86.9347       0.55576 ±    0.10497       0.39312 ±    0.05329     \
6.154 ±  0.710 %    57.480 ±  4.404 %
   2     283.7044 ±   49.3541       0.41281 ±       -nan       0.39406 ±    0.03437     \
7.081 ±  0.830 %    61.024 ±  3.066 %

====== Perplexity statistics ======
Mean PPL(Q)                   : 273.143135 ±  33.671527
Cor(ln(PPL(Q)), ln(PPL(base))):  93.71%
Mean ln(PPL(Q)/PPL(base))     :   0.351991 ±   0.044241

====== KL divergence statistics ======
Mean    KLD:   0.402316 ±   0.022057
Maximum KLD:   3.361394
95.0%   KLD:   1.433357
 5.0%   KLD:   0.060436
Minimum KLD:   0.011455

====== Token probability statistics ======
Mean    Δp: -2.061 ± 0.387 %
 5.0%   Δp: -20.722%
RMS Δp    :  8.952 ± 0.840 %
Same top p: 59.646 ± 2.179 %
"""


def read(said: str, total: int = 4) -> Reading:
    reading = Reading(total)
    for line in said.splitlines():
        reading.hear(line)
    return reading


def test_the_figures_are_read() -> None:
    reading = read(SAID)
    assert reading.figures == Figures(0.402316, 59.646 / 100, math.exp(0.351991))
    assert reading.chunks == 2
    none = read(SAID.replace("0.402316", "-0.000000").replace("59.646 ±", "100.000 ±"))
    assert none.figures == Figures(0.0, 1.0, math.exp(0.351991))


@pytest.mark.parametrize(
    "lost",
    ["Mean    KLD:   0.402316", "Same top p: 59.646", "Mean ln(PPL(Q)/PPL(base))     :   0.351991"],
)
def test_half_of_the_figures_are_none(lost: str) -> None:
    assert read(SAID.replace(lost, "")).figures is None
    assert read(SAID.replace(lost, lost.rstrip("0123456789.") + "nan")).figures is None


def test_the_line_of_the_last_chunk_is_enough() -> None:
    steps = SAID.partition("\n======")[0]
    assert read(steps).figures is None
    assert read(steps, 2).figures == Figures(0.39406, 61.024 / 100, math.exp(0.41281))
    assert read(steps, 1).figures == Figures(0.39312, 57.48 / 100, math.exp(0.55576))
    assert read(SAID, 2).figures == Figures(0.402316, 59.646 / 100, math.exp(0.351991))


async def test_it_is_asked_again_when_it_said_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "answers").touch()
    mark = tmp_path / "mark"
    source = (
        "import pathlib, sys; mark = pathlib.Path(sys.argv[1]); again = mark.exists(); mark.touch()"
        "\nif again: print(*sys.argv[2:], sep='\\n')"
    )
    said = ("Mean    KLD:   0.5", "Mean ln(PPL(Q)/PPL(base)) : 0.0", "Same top p: 60.0")
    argv = [sys.executable, "-X", "utf8", "-c"]
    program, model = Path("none"), Path("none")

    def steps(_done: int, _total: int) -> None:
        pass

    monkeypatch.setattr(
        module,
        "_argv",
        lambda *_: (*argv, source, str(mark), *said),
    )
    assert await compare(program, model, tmp_path / "answers", steps) == Figures(0.5, 0.6, 1.0)
    monkeypatch.setattr(module, "_argv", lambda *_: (*argv, "pass"))
    with pytest.raises(EngineError, match="ended 8 times without its figures; run the command"):
        await compare(program, model, tmp_path / "answers", steps)
    monkeypatch.setattr(module, "_argv", lambda *_: (*argv, "exit(1)"))
    with pytest.raises(EngineError, match="failed on a shard: it ended with 1"):
        await compare(program, model, tmp_path / "answers", steps)


# A real engine


@functools.cache
def program() -> Path:
    return perplexity_program(find_engine(native() / SERVER, Path("none"), {}))


def nothing(_done: int, _total: int) -> None:
    pass


async def figures(folder: Path, kept: int, *texts: Path, chunks: int = CHUNKS) -> list[Figures]:
    """How far a shard with the first experts is from the embedded model on each text."""
    model = Store(Home.at(folder / "home"), environ={}).open(MODEL)
    shard = folder / f"{kept}.gguf"
    write_shard(model, first_experts(read_layout(model), kept), shard)
    found = []
    for text in texts:
        answers = folder / "answers"
        assert await save_answers(program(), MODEL, text, answers, chunks)
        found.append(await compare(program(), shard, answers, nothing))
    return found


async def test_more_experts_diverge_less_and_all_of_them_not_at_all(tmp_path: Path) -> None:
    [whole] = await figures(tmp_path, 16, TEXT)
    [most] = await figures(tmp_path, 15, TEXT)
    [half] = await figures(tmp_path, 8, TEXT)
    assert abs(whole.divergence) < 1e-4
    assert whole.agreement > 0.99
    assert whole.divergence < most.divergence < half.divergence
    assert whole.agreement > most.agreement > half.agreement > 0


@pytest.mark.full
async def test_each_size_diverges_less_on_each_text(tmp_path: Path) -> None:
    texts = (TEXT, MODEL.parent / "prose2.txt")
    rows = [await figures(tmp_path, kept, *texts, chunks=40) for kept in (8, 10, 12, 14, 15)]
    for column in zip(*rows, strict=True):
        divergences = [one.divergence for one in column]
        assert divergences == sorted(divergences, reverse=True)


async def test_answers_are_whole_or_count_as_none(tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    assert await save_answers(program(), MODEL, TEXT, answers, CHUNKS) == CHUNKS
    assert saved_chunks(answers) == CHUNKS
    data = answers.read_bytes()
    for size in (0, 12, 100, len(data) - 1):
        answers.write_bytes(data[:size])
        assert saved_chunks(answers) == 0
    told: list[tuple[int, int]] = []
    answers.write_bytes(data)
    await compare(program(), MODEL, answers, lambda *step: told.append(step))
    assert told[-1] == (CHUNKS, CHUNKS)


async def test_what_cannot_be_run_says_what_to_do(tmp_path: Path) -> None:
    answers, short = tmp_path / "answers", tmp_path / "short.txt"
    short.write_text("Good morning. " * 100)
    # It ends well, perhaps without its words; its file shows that nothing was read.
    with pytest.raises((ConfigError, LocalError), match=r"too short|has not written all answers"):
        await save_answers(program(), MODEL, short, answers, CHUNKS)
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(MODEL.read_bytes()[:10_000])
    with pytest.raises(EngineError, match=r"does not run here: .*Measure on a machine with the me"):
        await save_answers(program(), damaged, TEXT, answers, CHUNKS)
    assert await save_answers(program(), MODEL, TEXT, answers, CHUNKS) == CHUNKS
    with pytest.raises(EngineError, match="failed on a shard: "):
        await compare(program(), damaged, answers, nothing)

from __future__ import annotations

from pathlib import Path

import pytest

from p2pmesh.engine.speed import ANSWERS_MAX, TAIL_BYTES, read_speed, tokens_per_s

STARTED = "main: server is listening on http://127.0.0.1:18999"
PROMPT = (
    "0.00.674.833 I slot print_timing: id  1 | task 15 | prompt eval time ="
    "       0.74 ms /     1 tokens (    0.74 ms per token,  1353.18 tokens per second)"
)


def answer(ms: float, tokens: int, unit: str = "tokens") -> str:
    return (
        f"0.00.674.839 I slot print_timing: id  1 | task 15 |        eval time ="
        f"  {ms:9.2f} ms /  {tokens:4d} {unit} (    0.45 ms per token,  2220.70 tokens per second)"
    )


def test_the_speed_is_that_of_all_answers_together() -> None:
    lines = [STARTED, PROMPT, answer(1000, 10), PROMPT, answer(1000, 30), "graphs reused = 27"]
    assert tokens_per_s(lines) == 20.0


def test_older_engines_count_runs() -> None:
    assert tokens_per_s([answer(500, 20, "runs")]) == 40.0


def test_an_engine_that_answered_nothing_has_no_speed() -> None:
    assert tokens_per_s([]) is None
    assert tokens_per_s([STARTED, PROMPT, answer(0.3, 1)]) is None
    assert tokens_per_s(["eval time = 1.2.3 ms / 64 tokens", answer(0, 64)]) is None


def test_earlier_processes_count_for_nothing() -> None:
    assert tokens_per_s([STARTED, answer(1000, 10), STARTED]) is None
    assert tokens_per_s([STARTED, answer(1000, 10), STARTED, answer(1000, 30)]) == 30.0


def test_only_the_latest_answers_count() -> None:
    latest = [answer(1000, 50)] * ANSWERS_MAX
    assert tokens_per_s([answer(1000, 10), *latest]) == 50.0


def test_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "engine-model.log"
    assert read_speed(log) is None
    padding = "x" * 99 + "\n"
    log.write_text(padding * (2 * TAIL_BYTES // 100) + answer(1000, 25) + "\n")
    assert read_speed(log) == 25.0


def test_a_log_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        read_speed(tmp_path)

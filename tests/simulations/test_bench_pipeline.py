from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simulations.bench_pipeline import COUNTS, GOALS, Goal, question, show
from tests.engine.samples import native
from tests.repository import ROOT


def report() -> dict[str, Any]:
    """A report that reaches every goal exactly."""
    speeds = {"tokens_per_s": 20.0, "prefill_per_s": 90.0}
    row = {
        "layers": [4, 4],
        "threads": 1,
        "straight": speeds,
        "mesh": speeds,
        "added_ms": 1.5,
        "load_s": 2.0,
        "recovery_s": 4.0,
    }
    load = {"load_s": 1.5, "bytes": 1000}
    return {
        "figures": {key: min(goal.most, max(goal.least, 1e9)) for key, goal in GOALS.items()},
        "speeds": dict.fromkeys(COUNTS, row),
        "loads": {"head_only": load, "both": load, "weight_bytes": 100_000},
        "token_bytes": {"output_on_head": 9e3, "output_on_stage": 2e4, "planned": 8192},
        "delays": {2: {"plain_ms": 50.0, "delayed_ms": 61.0, "expected_ms": 60.0}},
        "rounds": 3,
        "model_bytes": 285_000_000,
        "took_s": 200.0,
    }


def test_the_report_says_what_was_missed() -> None:
    told = report()
    assert "MISSED" not in show(told)
    told["figures"]["token_ratio_2"] = 0.96
    told["figures"]["relay_cpu_ms"] = 1.01
    assert show(told).count("MISSED") == 2
    assert "adds 1.50 ms per token; 0.97 from 48 ms per token on" in show(told)


def test_a_goal_bounds_on_one_side() -> None:
    assert Goal("a ratio", least=0.97).verdict(0.97) == "at least 0.97: ok"
    assert Goal("a ratio", least=0.97).verdict(0.96) == "at least 0.97: MISSED"
    assert Goal("a time", most=2).verdict(2.0) == "at most 2: ok"
    assert Goal("a time", most=2).verdict(2.1) == "at most 2: MISSED"


@pytest.mark.parametrize("characters", [1, 10, 64, 128])
def test_a_prompt_has_as_many_characters_as_asked_for(characters: int) -> None:
    [message] = question(8, characters)["messages"]
    assert len(message["content"]) == characters


def run_bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "simulations.bench_pipeline", "--quick", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_path_that_is_no_engine_is_named(tmp_path: Path) -> None:
    finished = run_bench("--engine", str(tmp_path / "llama-server"))
    assert finished.returncode == 1
    assert "llama-server: there is no such file" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.full
def test_it_runs_and_prints_every_figure() -> None:
    finished = run_bench("--json", "--engine", str(native()))
    assert finished.returncode == 0, finished.stderr[-3000:]
    told = json.loads(finished.stdout)
    assert set(told["figures"]) == set(GOALS)
    for count in COUNTS:
        row = told["speeds"][str(count)]
        assert len(row["layers"]) == count
        for arm in ("straight", "mesh"):
            assert all(figure > 0 for figure in row[arm].values())
        delay = told["delays"][str(count)]
        assert delay["delayed_ms"] - delay["plain_ms"] > 5 * 2 * (count - 1) * 0.5
    assert told["loads"]["head_only"]["bytes"] > told["loads"]["weight_bytes"]
    assert told["loads"]["both"]["bytes"] < told["loads"]["weight_bytes"] / 10
    assert told["token_bytes"]["output_on_stage"] > told["token_bytes"]["output_on_head"]

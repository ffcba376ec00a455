from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from p2pmesh.engine.argv import Launch, server_argv
from simulations.bench_gateway import TARGETS, Command, launch_of, show
from tests.repository import ROOT

ARMS = ("engine straight", "local gateway", "one hop")


@pytest.mark.parametrize("threads", [None, 2])
def test_the_second_engine_has_the_command_line_of_the_first(threads: int | None) -> None:
    launch = Launch(
        model_paths=(Path("a.gguf"),), alias="a", context=2048, slots=4, threads=threads
    )
    command = server_argv(Command(("engine", "-x")), launch)
    assert launch_of(command) == (Command(("engine", "-x")), launch)


def test_an_engine_with_unknown_flags_is_not_imitated() -> None:
    launch = Launch(model_paths=(Path("a.gguf"),), alias="a", devices=("CUDA0",))
    with pytest.raises(RuntimeError, match="cannot start a second engine"):
        launch_of(server_argv(Command(("engine",)), launch))


def test_the_report_says_what_was_missed() -> None:
    row = {"p50_ms": 2.0, "p99_ms": 4.0, "requests_per_s": 500.0}
    report = {
        "rounds": 3,
        "requests": {1: dict.fromkeys(ARMS, row)},
        "streams": {1: {arm: {"events_per_s": 900.0, "first_ms": 5.0} for arm in ARMS}},
        **{key: limit for key, (_, limit) in TARGETS.items()},
    }
    assert "MISSED" not in show(report)
    assert show(report | {"rss_mib": 151.0}).count("MISSED") == 1


def test_it_runs_and_prints_every_figure() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "simulations.bench_gateway", "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    report = json.loads(finished.stdout)
    assert set(report["requests"]) == {"1", "8", "64"}
    for rows in report["requests"].values():
        assert set(rows) == set(ARMS)
        assert all(figure > 0 for row in rows.values() for figure in row.values())
    for rows in report["streams"].values():
        assert all(row["events_per_s"] > 0 for row in rows.values())
    assert report["first_token_s"] > 0
    assert report["rss_mib"] > 10

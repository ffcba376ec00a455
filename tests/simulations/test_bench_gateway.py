from __future__ import annotations

import json
import subprocess
import sys

import pytest

from simulations.bench_gateway import TARGETS, show
from tests.repository import ROOT

ARMS = ("engine straight", "local gateway", "one hop")


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


@pytest.mark.full
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

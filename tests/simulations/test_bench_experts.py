from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from p2pmesh.engine.perplexity import Figures
from simulations.bench_experts import Row, Variant, show, summary
from tests.engine.samples import native
from tests.repository import ROOT


def row(name: str, group: str, size_bytes: int, code: float, prose: float) -> Row:
    variant = Variant(name=name, group=group, write=Path.touch, coverage=0.9)
    figures = {
        "code": Figures(code, 1 - code, 1 + code),
        "prose": Figures(prose, 1 - prose, 1 + prose),
    }
    return Row(variant=variant, size_bytes=size_bytes, figures=figures)


def test_of_a_set_the_worst_shard_counts_and_of_chance_the_mean() -> None:
    rows = [
        row("2 nodes", "sets", 100, 0.1, 0.3),
        row("2 nodes", "sets", 120, 0.2, 0.1),
        row("chance", "10 of 16", 90, 0.5, 0.7),
        row("chance", "10 of 16", 90, 0.7, 0.5),
        row("chance", "12 of 16", 95, 0.1, 0.1),
    ]
    found = summary(rows)
    assert [(one["name"], one["group"]) for one in found] == [
        ("2 nodes", "sets"),
        ("chance", "10 of 16"),
        ("chance", "12 of 16"),
    ]
    nodes, chance, _ = found
    assert nodes["bytes"] == 120
    assert nodes["divergence"] == {"code": 0.2, "prose": 0.3}
    assert (nodes["worst"], nodes["agreement"]) == (0.3, pytest.approx(0.7))
    assert chance["divergence"] == {"code": pytest.approx(0.6), "prose": pytest.approx(0.6)}
    assert chance["worst"] == pytest.approx(0.7), "of each draw its worst text"


def test_a_report_is_shown_in_tables() -> None:
    entries = summary([row("2 nodes", "sets", 9_750_000, 0.1, 0.3)])
    shown = show({"entries": entries, "model_bytes": 13_540_000, "took_s": 75.4})
    assert "Whole model: 13.54 MB" in shown
    assert "0.300" in shown
    assert "code 0.100 +10.0 %, prose 0.300 +30.0 %" in shown


@pytest.mark.full
def test_the_bench_measures_what_it_promises() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "simulations.bench_experts", "--json"),
            *("--engine", str(native()), "--chunks", "2"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    worst = {one["name"]: one["worst"] for one in report["entries"]}
    assert worst["tokens x energy, per layer"] < worst["chance"]
    assert worst["Q6_K"] < worst["tokens x energy, per layer"]
    assert any(name.startswith("2 nodes, 8 critical: 12 experts") for name in worst)
    assert any(name.startswith("thin, ") for name in worst)

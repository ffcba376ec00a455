from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.run import main
from simulations.runner import play
from simulations.scenario import load
from tests.repository import ROOT

FEW = 5  # nodes: the quick tier looks at many small meshes rather than at few large ones


def test_the_same_seed_is_the_same_run() -> None:
    mixed = load("mixed")
    first = play(mixed, 1, FEW)
    assert first == play(mixed, 1, FEW)
    assert first.trace != play(mixed, 2, FEW).trace


@pytest.mark.full
def test_no_process_and_no_hash_seed_changes_a_run() -> None:
    # So many nodes that orders differ which a few nodes do not show.
    options = ["--seed", "3", "--nodes", "27", "--json"]
    command = [sys.executable, "-m", "simulations.run", "mixed", *options]
    said = [
        subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            timeout=120,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    first, second = (json.loads(one) for one in said)
    assert first.pop("machine").keys() == second.pop("machine").keys()
    assert first == second


@pytest.mark.parametrize(
    "name",
    [
        "clones",
        "crash",
        "half",
        "join",
        "liars",
        "mass_crash",
        "pair",
        "spread",
    ],
)
def test_each_scenario_keeps_its_limits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 0, capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "attack",
        "churn",
        "drop",
        "flipflop",
        "lopsided",
        "loss",
        "loss-heavy",
        "partition",
        "roam",
        "separation",
        "sleep",
        "undialable",
        "versions",
    ],
)
def test_each_long_scenario_keeps_its_limits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("nodes", ["2", "3"])
def test_the_smallest_meshes_find_each_other_again(
    nodes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pair", "--nodes", nodes, "--seeds", "1..3", "--jobs", "1"]) == 0, (
        capsys.readouterr().out
    )


def test_a_few_seeds_of_everything_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixed", "--seeds", "1..6", "--nodes", str(FEW)]) == 0, capsys.readouterr().out
    told = capsys.readouterr().out
    assert "6 runs, 5 nodes" in told
    assert len(told.splitlines()) < 40


@pytest.mark.full
def test_two_nodes_are_a_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    for nodes in ("2", "3"):
        status = main(["mixed", "--seeds", "1..2", "--jobs", "1", "--nodes", nodes])
        assert status == 0, capsys.readouterr().out


@pytest.mark.full
def test_many_seeds_of_everything_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixed", "--seeds", "1..40"]) == 0, capsys.readouterr().out


def test_a_missed_figure_fails_and_says_how_to_see_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'about = "Too much asked"\nsafety_s = 5\nliveness_s = 1\n[limits]\nmean_kb_per_s = 0\n',
        "utf-8",
    )
    assert main([str(own), "--seed", "7", "--nodes", "2"]) == 1
    told = capsys.readouterr().out
    assert "mean_kb_per_s is" in told
    assert f"again: python -m simulations.run {own} --seed 7 --nodes 2" in told
    assert "Ping" in told  # what happened last


def test_a_run_can_be_made_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.toml"
    own.write_text('about = "Brief"\nsafety_s = 5\n[limits]\nmean_kb_per_s = 0\n', "utf-8")
    assert main([str(own), "--nodes", "2", "--seconds", "20", "--json"]) == 1
    (failure,) = json.loads(capsys.readouterr().out)["failures"]
    assert failure["simulated_s"] > 20
    assert f"{own} --seconds 20 --seed 1 --nodes 2" in failure["replay"]


def test_goals_fail_a_run_only_when_they_are_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'about = "A wish"\nsafety_s = 5\nliveness_s = 1\n[goals]\nmean_kb_per_s = 0\n', "utf-8"
    )
    assert main([str(own), "--nodes", "2"]) == 0
    assert "Behind their goals: 1 runs" in capsys.readouterr().out
    assert main([str(own), "--nodes", "2", "--strict"]) == 1


def test_a_baseline_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["crash", "--nodes", "3"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    report["figures"]["queue_max"]["worst"] += 1
    before = tmp_path / "before.json"
    before.write_text(json.dumps(report), "utf-8")
    assert main([*arguments, "--baseline", str(before)]) == 0
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("queue_max ")]
    assert line.endswith("(-1)")


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["spread", "--baseline", "no-such-file"], ["spread", "--seeds", "9"]]
)
def test_what_is_not_understood_is_said(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as exc:
        status = int(exc.code or 0)
    assert status == 2
    assert capsys.readouterr().err

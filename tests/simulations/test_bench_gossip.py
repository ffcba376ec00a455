from __future__ import annotations

import json

import pytest

from simulations.bench_gossip import NAMES, TARGETS, main, show


def test_every_figure_is_measured_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == set(NAMES)
    assert all(value > 0 for value in figures.values())
    # A signature costs many times what it takes to see that a record is known.
    assert figures["stale_us"] < figures["signature_us"] < 2 * figures["accept_us"]


def test_the_report_says_what_was_missed() -> None:
    figures = dict.fromkeys(NAMES, 1.0)
    assert "MISSED" not in show(figures)
    assert show({**figures, "stale_us": TARGETS["stale_us"] + 1}).count("MISSED") == 1

from __future__ import annotations

import re

import pytest

from simulations.bench_node import changes, main


def test_it_runs_and_prints_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nodes", "30", "--changes", "1"]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert all(kind in heading for kind in changes())
    figures = [float(figure) for figure in re.findall(r"\d+\.\d+", row)]
    assert len(figures) == len(changes()) + 1
    assert all(figure > 0 for figure in figures[:-1])

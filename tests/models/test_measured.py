from __future__ import annotations

from pathlib import Path

import pytest

from p2pmesh.models import measured
from p2pmesh.models.parts import MEASURES_MAX, UNMEASURED, ShardKind, ShardQuality

RANKING = "ab" * 32
GOOD = ShardQuality(ShardKind.EXPERTS, RANKING, 16, 8, 50_000, 930_000)
THIN = GOOD._replace(kind=ShardKind.THIN)


def test_measures_survive_and_newer_ones_take_their_place(tmp_path: Path) -> None:
    assert measured.load(tmp_path, RANKING) == ()
    measured.add(tmp_path, RANKING, [GOOD, THIN])
    newer = GOOD._replace(divergence=40_000)
    measured.add(tmp_path, RANKING, [newer, GOOD._replace(critical=12)])
    assert measured.load(tmp_path, RANKING) == (newer, GOOD._replace(critical=12), THIN)


def test_only_what_was_measured_of_that_ranking_is_kept(tmp_path: Path) -> None:
    guess, other = GOOD._replace(divergence=UNMEASURED), GOOD._replace(ranking="cd" * 32)
    measured.add(tmp_path, RANKING, [guess, other])
    assert measured.load(tmp_path, RANKING) == ()


@pytest.mark.parametrize(
    "text",
    ["", "{", "{}", "[7]", '["x"]', '[["fat",16,8,1,1]]', '[["thin",16,16,1,1]]',
     '[["thin",16,8,-1,1]]', '[["thin",16,8,1]]', '[["thin",true,8,1,1]]'],
)  # fmt: skip
def test_what_is_damaged_counts_as_not_measured(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{RANKING}.measured").write_text(text)
    assert measured.load(tmp_path, RANKING) == ()
    measured.add(tmp_path, RANKING, [GOOD])
    assert measured.load(tmp_path, RANKING) == (GOOD,)


def test_no_more_is_read_than_one_ranking_can_have(tmp_path: Path) -> None:
    row = '["thin",1000,{},1,1]'
    rows = ",".join(row.format(number) for number in range(1, 200))
    (tmp_path / f"{RANKING}.measured").write_text(f"[{rows}]")
    assert len(measured.load(tmp_path, RANKING)) == MEASURES_MAX

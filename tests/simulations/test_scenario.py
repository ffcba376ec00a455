from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from p2pmesh.errors import ConfigError
from simulations.convergence import Gap
from simulations.scenario import FOLDER, limit_at, load, parse_scenario

NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_scenario_reads_and_is_limited(name: str) -> None:
    scenario = load(name)
    assert scenario.name == name
    assert scenario.limits
    assert "settled_s" in scenario.limits
    assert scenario.tolerates == ()


def test_the_scenarios_are_there() -> None:
    wanted = {"spread", "crash", "loss", "join", "partition", "churn", "attack", "mixed"}
    own = {"pair", "mass_crash", "half", "separation", "lopsided", "sleep", "roam", "clones"}
    more = {"undialable", "versions", "liars", "flipflop", "drop", "loss-heavy", "huge"}
    assert wanted | own | more == set(NAMES)


def test_a_limit_is_that_of_the_next_larger_mesh() -> None:
    table = {"10": 80.0, "100": 150.0}
    assert [limit_at(table, nodes) for nodes in (2, 10, 11, 100, 5000)] == [80, 80, 150, 150, 150]
    assert limit_at(3.0, 7) == 3


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({}, "what it is about"),
        ({"about": "x", "nodse": 3}, "nodse"),
        ({"about": "x", "steps": [{"fault": "meteor", "at_s": 1}]}, "no fault 'meteor'"),
        ({"about": "x", "steps": [{"fault": "crash"}]}, "needs at_s or every_s"),
        ({"about": "x", "steps": [{"fault": "crash", "at_s": 1, "every_s": 2}]}, "needs at_s or"),
        ({"about": "x", "steps": [{"fault": "crash", "at_s": 1, "hwo": "kill"}]}, "has no hwo"),
        ({"about": "x", "tolerates": ["murder"]}, "murder"),
    ],
)
def test_what_nobody_understands_is_refused(table: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_scenario("some", table)


def test_a_file_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('about = "x"\ntolerates = ["ghost"]\n', "utf-8")
    assert load(str(path)).tolerates == (Gap.GHOST,)
    path.write_text("about =", "utf-8")
    with pytest.raises(ConfigError, match="not TOML"):
        load(str(path))
    with pytest.raises(ConfigError, match="there are attack, churn"):
        load("nothing")

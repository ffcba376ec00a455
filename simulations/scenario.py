"""Scenarios: what happens in a run and what it must come to, as TOML files tell it.

A scenario has a safety phase, in which everything that it names may fail, and a liveness phase,
in which nothing fails any more and the mesh has to settle. `limits` are the figures that a run
must keep to; `goals` are those that the project promises and that are shown beside them, but only
fail a run with `--strict`. A number of either may depend on the number of nodes.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from p2pmesh.errors import ConfigError
from simulations.attacks import ATTACKS
from simulations.convergence import Gap
from simulations.faults import FAULTS

FOLDER = Path(__file__).parent / "scenarios"
ACTIONS: Mapping[str, Callable[..., None]] = {**FAULTS, **ATTACKS}

Limit = float | Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One fault.

    Attributes:
        fault: Its name.
        at_s: When, for one that happens once; a pair is drawn from.
        every_s: The mean time between two, for one that happens again and again.
        chance: Whether it happens in a run at all, which the seed decides.
        arguments: Of the fault; pairs of numbers are drawn from each time.
    """

    fault: str
    at_s: float | list[float] | None = None
    every_s: float | None = None
    chance: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One kind of run.

    Attributes:
        nodes: How many, or a pair to draw from.
        hostile: How many of them are.
        undialable: Share of them that others cannot dial.
        newer: Share of them that speak a newer version of the protocol as well.
        clocks_s: Their clocks are off by at most that much.
        terse: They have nothing to say of models.
        start_within_s: All start within that time.
        safety_s: Length of the first phase.
        liveness_s: Length of the second, at most; it ends soon after the mesh has settled.
        calm_s: Nothing that happens again and again begins before that.
        updates_per_s: Updates in the whole mesh, from then to the end of the safety phase.
        idle_s: Length of a quiet time at the end, in which bytes are counted.
        steps: What fails.
        limits: By the name of a figure, the most that it may be.
        tolerates: Kinds of `Gap` that the core does not close in time yet; a goal, no limit.
        goals: As `limits`.
    """

    name: str
    about: str
    nodes: int | list[int] = 10
    hostile: int = 0
    undialable: float = 0.0
    newer: float = 0.0
    clocks_s: float = 0.0
    terse: bool = False
    start_within_s: float = 0.0
    safety_s: float = 60.0
    liveness_s: float = 60.0
    calm_s: float = 10.0
    updates_per_s: float = 0.0
    idle_s: float = 0.0
    steps: tuple[Step, ...] = ()
    tolerates: tuple[Gap, ...] = ()
    limits: Mapping[str, Limit] = field(default_factory=dict)
    goals: Mapping[str, Limit] = field(default_factory=dict)


def load(name: str) -> Scenario:
    """The scenario of that name, or in that file.

    Raises:
        ConfigError: There is none, or it says something that nobody understands.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as exc:
        known = ", ".join(sorted(one.stem for one in FOLDER.glob("*.toml")))
        raise ConfigError(f"There is no scenario {name!r}; there are {known}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path.name} is not TOML: {exc}") from exc
    return parse_scenario(path.stem, table)


def parse_scenario(name: str, table: Mapping[str, Any]) -> Scenario:
    """A scenario from its table; raises as `load`."""
    known = {one.name for one in fields(Scenario)} - {"name"}
    if unknown := sorted(table.keys() - known):
        raise ConfigError(f"Scenario {name}: nobody understands {', '.join(unknown)}")
    if "about" not in table:
        raise ConfigError(f"Scenario {name} does not say what it is about")
    steps = tuple(_step(name, step) for step in table.get("steps", ()))
    try:
        tolerates = tuple(Gap(gap) for gap in table.get("tolerates", ()))
    except ValueError as exc:
        raise ConfigError(f"Scenario {name}: {exc}") from exc
    return Scenario(name=name, **{**table, "steps": steps, "tolerates": tolerates})


def limit_at(limit: Limit, nodes: int) -> float:
    """Return the limit for so many nodes: that of the next larger number it names."""
    if not isinstance(limit, Mapping):
        return limit
    sizes = sorted(int(size) for size in limit)
    return limit[str(next((size for size in sizes if size >= nodes), sizes[-1]))]


def _step(scenario: str, table: Mapping[str, Any]) -> Step:
    own = {key: value for key, value in table.items() if key in {"at_s", "every_s", "chance"}}
    fault = table.get("fault", "")
    arguments = {key: table[key] for key in table.keys() - own.keys() - {"fault"}}
    if fault not in ACTIONS:
        raise ConfigError(f"Scenario {scenario}: there is no fault {fault!r}")
    unknown = arguments.keys() - inspect.signature(ACTIONS[fault]).parameters.keys()
    if unknown or ("at_s" in own) == ("every_s" in own):
        what = f"has no {', '.join(sorted(unknown))}" if unknown else "needs at_s or every_s"
        raise ConfigError(f"Scenario {scenario}: {fault} {what}")
    return Step(fault=fault, arguments=dict(sorted(arguments.items())), **own)

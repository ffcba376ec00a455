"""One run: a scenario, a seed and a number of nodes come to figures, or to a violation.

The result is the same, byte for byte, whenever and wherever it is made.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from simulations.bodies import caps
from simulations.checkers import Safety
from simulations.convergence import Gap, misread, unsettled
from simulations.faults import Stage
from simulations.future_protocol import VERSIONS
from simulations.metrics import POLL_S, CatchUp, Idle, Removals, Spread, percentile
from simulations.removal_checker import Justice
from simulations.scenario import ACTIONS, Scenario, Step, limit_at
from simulations.schedule import ViolationError, branch
from simulations.trace import Trace
from simulations.world import SEEDS, World

GAPS_TOLD = 5
ON_ITS_WAY_S = 3.0  # a lease is renewed at any moment, and takes a while to reach everybody
AFTERWARDS_S = 3.0  # how long a mesh that has settled is still looked at
GARBAGE = 100_000  # objects made until young ones are looked through: nearly nothing is garbage


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a run.

    Attributes:
        figures: By name, the unit last.
        missed: What failed it, in words.
        behind: The goals that it did not reach, in words.
        tail: What happened last, for a run that failed.
        steps: Events handled.
        trace: Digest of everything that every node was told and answered.
        idle_cpu_s: What the quiet time at the end took this machine, of one core.
    """

    scenario: str
    seed: int
    nodes: int
    figures: dict[str, float]
    missed: list[str]
    behind: list[str]
    tail: list[str] = field(default_factory=list)
    steps: int
    simulated_s: float
    trace: str
    idle_cpu_s: float = field(default=0.0, compare=False)


def play(scenario: Scenario, seed: int, nodes: int | None = None) -> Result:
    """Run a scenario.

    Args:
        scenario: What happens.
        seed: Decides everything else.
        nodes: How many, instead of the scenario's number.
    """
    if nodes is None:
        given = scenario.nodes
        nodes = given if isinstance(given, int) else branch(seed, "size").randint(*given)
    run = _Run(scenario, seed, nodes)
    missed: list[str] = []
    try:
        with _little_collecting():
            run.play()
    except ViolationError as exc:
        missed.append(str(exc))
    figures = run.figures()
    if not missed:
        missed += run.shortfalls
        missed += _exceeded(figures, scenario.limits, nodes)
    return Result(
        scenario=scenario.name,
        seed=seed,
        nodes=nodes,
        figures=figures,
        missed=missed,
        behind=run.behind + _exceeded(figures, scenario.goals, nodes),
        tail=list(run.trace.tail) if missed else [],
        steps=run.trace.steps,
        simulated_s=round(run.world.schedule.now, 3),
        trace=run.trace.digest(),
        idle_cpu_s=run.idle_cpu_s,
    )


class _Run:
    def __init__(self, scenario: Scenario, seed: int, nodes: int) -> None:
        self.scenario = scenario
        self.world = World(seed, nodes, terse=scenario.terse)
        self._cast()
        self.stage = Stage(self.world)
        self.trace, self.safety = Trace(self.world), Safety(self.world)
        self.spread, self.removals = Spread(self.world), Removals(self.world)
        self.justice = Justice(self.world)
        self.world.watchers += [self.trace, self.safety]
        self.world.readers += [self.spread, self.removals, self.justice]
        self.shortfalls: list[str] = []
        self.behind: list[str] = []
        self.idle_cpu_s = 0.0
        self._rng = branch(seed, "scenario")
        self._figures: dict[str, float] = {}
        self._faults_end = False

    def _cast(self) -> None:
        """Choose the nodes that are hostile, hard to reach, newer, or have a wrong clock."""
        scenario, nodes = self.scenario, self.world.nodes
        rng = branch(self.world.seed, "cast")
        for node in nodes[len(nodes) - scenario.hostile :]:
            node.hostile = True
        others = nodes[SEEDS : len(nodes) - scenario.hostile]
        for node in rng.sample(others, round(scenario.undialable * len(others))):
            node.dialable = False
        for node in rng.sample(nodes, round(scenario.newer * len(nodes))):
            node.versions = VERSIONS
        for node in nodes if scenario.clocks_s else ():
            node.offset_s = rng.uniform(-scenario.clocks_s, scenario.clocks_s)

    def play(self) -> None:
        world, scenario = self.world, self.scenario
        world.start_all(scenario.start_within_s)
        world.schedule.after(scenario.start_within_s, self._time, "cold_start_s")
        for number, step in enumerate(scenario.steps):
            self._plan(step, branch(world.seed, f"step/{number}"))
        if scenario.updates_per_s:
            world.schedule.after(scenario.calm_s, self._update)
        world.run(scenario.safety_s)
        self._faults_end = True
        self.stage.heal()
        self._time("settled_s")
        self._calm_down()
        self._settle_up()
        self.shortfalls += list(misread(self.world))[:GAPS_TOLD]
        self.safety.check_plans([node for node in world.honest if node.awake])
        if scenario.idle_s:
            idle, begun_s = Idle(world), time.process_time()
            world.run(scenario.idle_s)
            self.idle_cpu_s = time.process_time() - begun_s
            mean, largest = idle.kb_per_s()
            self._figures |= {"idle_kb_per_s": mean, "idle_max_kb_per_s": largest}

    def _calm_down(self) -> None:
        """Until the mesh has settled and a little longer, or until its time is up."""
        ends_at = self.world.schedule.now + self.scenario.liveness_s
        while self.world.schedule.now < ends_at:
            self.world.run(min(1.0, ends_at - self.world.schedule.now))
            if "settled_s" in self._figures and not self.removals.pending:
                self.world.run(AFTERWARDS_S)
                return

    def _settle_up(self) -> None:
        """Nothing may differ now but what is on its way at this very moment."""
        tolerated = frozenset(self.scenario.tolerates)
        gaps: list[tuple[Gap, str]] = []
        for _ in range(int(ON_ITS_WAY_S / POLL_S)):
            gaps = list(unsettled(self.world))
            if all(gap in tolerated for gap, _ in gaps):
                break
            self.world.run(POLL_S)
        told = [f"at the end {text}" for gap, text in gaps if gap not in tolerated]
        self.shortfalls += told[:GAPS_TOLD]
        self.behind += [f"at the end {text}" for gap, text in gaps if gap in tolerated][:GAPS_TOLD]

    def figures(self) -> dict[str, float]:
        """All that was measured."""
        spread, removals = self.spread.latencies_s, self.removals.latencies_s
        figures = dict(self._figures)
        if spread or self.spread.lost:
            figures |= {
                "update_p50_ms": 1000 * percentile(spread, 50),
                "update_p99_ms": 1000 * percentile(spread, 99),
                "updates": len(spread),
                "updates_lost": self.spread.lost,
            }
        if removals or self.removals.pending:
            figures |= {
                "removal_p50_s": percentile(removals, 50),
                "removal_p99_s": percentile(removals, 99),
                "removals": len(removals),
                "removals_pending": self.removals.pending,
            }
        traffic = list(self.world.network.traffic.values())
        figures |= {
            "false_removals": len(self.justice.wronged),
            "certificates": self.justice.certificates,
            "queue_max": max(one.queue_max for one in traffic),
            "queue_max_kb": max(one.queue_bytes_max for one in traffic) / 1000,
            "overflows": sum(one.overflows for one in traffic),
            "mean_kb_per_s": sum(one.sent_bytes for one in traffic)
            / (1000 * len(traffic) * max(self.world.schedule.now, 1)),
        }
        return {name: round(value, 3) for name, value in figures.items()}

    def _time(self, name: str) -> None:
        def note(seconds: float) -> None:
            self._figures[name] = seconds

        CatchUp(self.world, note, frozenset(self.scenario.tolerates))

    def _plan(self, step: Step, rng: Random) -> None:
        if rng.random() >= step.chance:
            return
        if step.every_s is None:
            assert step.at_s is not None
            self.world.schedule.after(_drawn(step.at_s, rng), self._strike, step, rng)
        else:
            self.world.schedule.after(self.scenario.calm_s, self._again, step, rng)

    def _again(self, step: Step, rng: Random) -> None:
        assert step.every_s is not None
        wait_s = rng.expovariate(1 / step.every_s)
        self.world.schedule.after(wait_s, self._strike, step, rng)

    def _strike(self, step: Step, rng: Random) -> None:
        if self._faults_end:
            return
        arguments = {name: _drawn(value, rng) for name, value in step.arguments.items()}
        self.trace.note(f"{step.fault} {arguments}")
        ACTIONS[step.fault](self.stage, **arguments)
        if step.every_s is not None:
            self._again(step, rng)

    def _update(self) -> None:
        if self._faults_end:
            return
        awake = [node for node in self.world.honest if node.awake]
        if awake:
            node = self._rng.choice(awake)
            self.spread.publish(node, caps(self._rng.randrange(1, 1000)))
        wait_s = self._rng.expovariate(self.scenario.updates_per_s)
        self.world.schedule.after(wait_s, self._update)


@contextmanager
def _little_collecting() -> Iterator[None]:
    """Spare the collector what stays anyway; a large mesh is millions of objects."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _drawn(value: Any, rng: Random) -> Any:
    """A pair of numbers stands for something between them, a longer list for one of its items."""
    match value:
        case [bool(), *_]:
            return rng.choice(value)
        case [int(low), int(high)]:
            return rng.randint(low, high)
        case [int() | float() as low, int() | float() as high]:
            return rng.uniform(low, high)
        case list():
            return rng.choice(value)
    return value


def _exceeded(figures: dict[str, float], limits: Any, nodes: int) -> list[str]:
    missed = []
    for name, limit in limits.items():
        most, found = limit_at(limit, nodes), figures.get(name)
        if found is None:
            missed.append(f"{name} was never reached (at most {most:g})")
        elif found > most:
            missed.append(f"{name} is {found:g} (at most {most:g})")
    return missed

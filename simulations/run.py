"""Run scenarios: `python -m simulations.run SCENARIO [--seed N | --seeds A..B] [--nodes N]`.

Prints a report of one screen, or JSON, and exits with 1 when a figure or an invariant is missed;
then it also prints the command that plays the failing run again. Only speed and memory depend on
the machine; all else follows from the seed. With `--baseline` the report of an earlier `--json` is
compared, figure by figure. `--seconds` makes the safety phase longer or shorter than the scenario
has it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from p2pmesh.errors import ConfigError
from simulations.metrics import percentile
from simulations.runner import Result, play
from simulations.scenario import Scenario, limit_at, load

FAILURES_SHOWN = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _options(arguments)
    try:
        scenario = _lasting(load(options.scenario), options.seconds)
        before = _read_baseline(options.baseline)
    except ConfigError as exc:
        print(exc, file=sys.stderr)
        return 2
    began = time.perf_counter()
    timed = list(_play_all(scenario, options.seeds, options.nodes, options.jobs))
    elapsed_s = time.perf_counter() - began
    named = options.scenario
    if options.seconds is not None:
        named += f" --seconds {options.seconds:g}"
    report = summary(named, [one.result for one in timed], strict=options.strict)
    machine = cost(timed, elapsed_s, scenario.idle_s)
    if options.json:
        print(json.dumps({**report, "machine": machine}, indent=1))
    else:
        print(show(scenario, report, before))
        print(
            f"{machine['elapsed_s']} s on {options.jobs} cores at most; on one of them "
            f"{machine['speed']} simulated seconds per second, {machine['peak_mb']} MB at most"
        )
        if "idle_speed" in machine:
            print(f"{machine['idle_speed']} simulated seconds per second while nothing happens")
    return 1 if report["failures"] else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A result and what it cost this machine.

    Attributes:
        cpu_s: Of one core.
        peak_bytes: The most memory that its process ever had.
    """

    result: Result
    cpu_s: float
    peak_bytes: int


def cost(timed: Sequence[Timed], elapsed_s: float, idle_s: float = 0.0) -> dict[str, float]:
    """The figures that depend on the machine: simulated seconds per core second, and memory.

    Args:
        timed: All runs.
        elapsed_s: What they took together.
        idle_s: How long each was left in peace at its end.
    """
    cpu_s = sum(one.cpu_s for one in timed)
    idle_cpu_s = sum(one.result.idle_cpu_s for one in timed)
    idle = {"idle_speed": round(idle_s * len(timed) / idle_cpu_s, 1)} if idle_cpu_s else {}
    return idle | {
        "elapsed_s": round(elapsed_s, 1),
        "speed": round(sum(one.result.simulated_s for one in timed) / cpu_s, 1),
        "peak_mb": round(max(one.peak_bytes for one in timed) / 1e6),
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m simulations.run", description=__doc__)
    parser.add_argument("scenario", help="its name, or a TOML file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seed", type=int, default=1)
    which.add_argument("--seeds", type=_seeds, metavar="A..B", help="all of them, in parallel")
    parser.add_argument("--nodes", type=int, help="instead of the scenario's number")
    parser.add_argument("--seconds", type=float, help="of the safety phase, instead of its own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="an earlier --json")
    parser.add_argument("--strict", action="store_true", help="goals count like limits")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or range(options.seed, options.seed + 1)
    return options


def _lasting(scenario: Scenario, seconds: float | None) -> Scenario:
    return scenario if seconds is None else replace(scenario, safety_s=seconds)


def _seeds(text: str) -> range:
    first, dots, last = text.partition("..")
    if not dots or not first.isdigit() or not last.isdigit() or int(last) < int(first):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1..200")
    return range(int(first), int(last) + 1)


def _read_baseline(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        figures = json.loads(path.read_text("utf-8"))["figures"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{path} is not a report that --json printed") from exc
    assert isinstance(figures, dict)
    return figures


def _play_all(scenario: Scenario, seeds: range, nodes: int | None, jobs: int) -> Iterator[Timed]:
    if len(seeds) == 1 or jobs == 1:
        yield from (_play(scenario, nodes, seed) for seed in seeds)
        return
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(partial(_play, scenario, nodes), seeds)


def _play(scenario: Scenario, nodes: int | None, seed: int) -> Timed:
    began = time.process_time()
    result = play(scenario, seed, nodes)
    cpu_s = time.process_time() - began
    kilobytes = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes
    return Timed(result=result, cpu_s=cpu_s, peak_bytes=peak)


# --- what is told ---------------------------------------------------------------------------------


def summary(scenario: str, results: Sequence[Result], *, strict: bool) -> dict[str, Any]:
    """The report of one run or of many; the same whenever it is made.

    Of each figure the middle and the worst value over the runs, with the seed of the worst.

    Args:
        scenario: As the command line named it, with the length that it gave it.
        results: At least one.
        strict: Goals count like limits.
    """
    names = sorted({name for result in results for name in result.figures})
    figures = {}
    for name in names:
        having = [result for result in results if name in result.figures]
        worst = max(having, key=lambda result: result.figures[name])
        values = [result.figures[name] for result in having]
        figures[name] = {
            "p50": percentile(values, 50),
            "worst": worst.figures[name],
            "seed": worst.seed,
        }
    failed = [result for result in results if result.missed or (strict and result.behind)]
    return {
        "scenario": scenario,
        "runs": len(results),
        "nodes": sorted({result.nodes for result in results}),
        "steps": sum(result.steps for result in results),
        "figures": figures,
        "failures": [asdict(result) | {"replay": replay(scenario, result)} for result in failed],
        "behind": {result.seed: result.behind for result in results if result.behind},
        "traces": {result.seed: result.trace for result in results},
    }


def replay(scenario: str, result: Result) -> str:
    """The command that plays exactly this run again; `scenario` as it was named."""
    return f"python -m simulations.run {scenario} --seed {result.seed} --nodes {result.nodes}"


def show(scenario: Scenario, report: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """The report as people read it."""
    sizes = report["nodes"]
    nodes = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    lines = [
        f"{scenario.name}: {scenario.about}",
        f"{report['runs']} runs, {nodes} nodes, {report['steps']} steps",
        "loss is delay, as on TCP; drop and duplicate are knobs for stress, no link does that",
        "",
        f"{'figure':<22}{'p50':>12}{'worst':>12}{'limit':>10}{'goal':>10}  {'worst seed':<12}"
        + ("before (worst)" if before else ""),
    ]
    for name, figure in report["figures"].items():
        limit = _limit(scenario.limits, name, sizes[-1])
        goal = _limit(scenario.goals, name, sizes[-1])
        lines.append(
            f"{name:<22}{figure['p50']:>12.6g}{figure['worst']:>12.6g}{limit:>10}{goal:>10}"
            f"  {figure['seed']:<12}{_difference(figure, before.get(name))}".rstrip()
        )
    for failure in report["failures"][:FAILURES_SHOWN]:
        lines += ["", f"FAILED: seed {failure['seed']}, {failure['nodes']} nodes"]
        lines += [f"  {what}" for what in failure["missed"] or failure["behind"]]
        lines.append(f"  again: {failure['replay']}")
    if report["runs"] == 1:
        lines += ["", *(line for failure in report["failures"] for line in failure["tail"])]
    if len(report["failures"]) > FAILURES_SHOWN:
        lines.append(f"and {len(report['failures']) - FAILURES_SHOWN} more runs failed")
    if report["behind"]:
        seed, behind = next(iter(report["behind"].items()))
        lines += [
            "",
            f"Behind their goals: {len(report['behind'])} runs, the first with seed {seed}",
        ]
        lines += [f"  {what}" for what in behind]
    return "\n".join([*lines, "", "MISSED" if report["failures"] else "ok"])


def _limit(limits: Mapping[str, Any], name: str, nodes: int) -> str:
    return f"{limit_at(limits[name], nodes):g}" if name in limits else ""


def _difference(figure: Mapping[str, float], before: Mapping[str, float] | None) -> str:
    if before is None:
        return ""
    return f"{before['worst']:g} ({figure['worst'] - before['worst']:+g})"


if __name__ == "__main__":
    sys.exit(main())

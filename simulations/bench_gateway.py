"""The cost of the mesh beside the engine alone: `python -m simulations.bench_gateway`.

In one run, side by side: latencies and rates at 1, 8 and 64 connections for an engine asked
directly, for the API of the node that serves the model, and for the API of a node that has to ask
that one; events per second of streams the same way; from `p2pmesh up` to the first token; memory
and idle processor time of the nodes.

The arms take turns within each round, and what is reported is the median of the rounds, so that
what else the machine does falls on all of them alike. The engine asked directly is a second one
with the command line of the first. Load generator, nodes and engines share this machine: the
rates are of all of them together, and the differences between arms are what counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import trio

from p2pmesh.engine.server import LlamaServer
from simulations.engines import engine_process, launch_of
from simulations.load import Place, Sample, Streamed, ask_many, get_json, median, stream_many
from simulations.processes import NodeProcess, cpu_s, engine_command, node_process, rss_mib

STRAIGHT, LOCAL, HOP = "engine straight", "local gateway", "one hop"
NODES = 3
CONNECTIONS = (1, 8, 64)
PLACED_S = 30.0

# What the project promises of itself.
TARGETS: Mapping[str, tuple[str, float]] = {
    "added_local_ms": ("p50 added by the local gateway, ms", 1.5),
    "added_hop_ms": ("p50 added by one hop, ms", 3.0),
    "first_token_s": ("from `up` to the first token, s", 3.0),
    "rss_mib": ("memory of a node without its engine, MiB", 150.0),
    "idle_percent": ("idle processor time of a node, % of a core", 2.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: Turns of all arms.
        requests: Of each arm in each round.
        tokens: Of each stream.
        starts: Nodes started to time the first token.
        settle_s: Of quiet before idle is measured.
        idle_s: Of idling.
    """

    rounds: int
    requests: int
    tokens: int
    starts: int
    settle_s: float
    idle_s: float


FULL = Effort(rounds=7, requests=300, tokens=400, starts=5, settle_s=5, idle_s=30)
QUICK = Effort(rounds=1, requests=64, tokens=50, starts=1, settle_s=0.5, idle_s=2)


def tiny_question() -> dict[str, Any]:
    """A request that costs an engine next to nothing."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    return {"messages": messages, "temperature": 0, "max_tokens": 1}


def long_question(tokens: int) -> dict[str, Any]:
    """A request whose answer is one event per token, always as many."""
    streamed = {"stream": True, "max_tokens": tokens, "ignore_eos": True}
    return tiny_question() | streamed


@asynccontextmanager
async def second_engine(command: Sequence[str], logs: Path) -> AsyncIterator[Place]:
    """An engine of our own with the same command line; where it listens.

    With one difference: a thread for each connection. An engine keeps a thread with a connection
    for 5 s after its last request, so that with fewer of them clients would wait for idle ones.
    The gateway needs no more than the engine's own number, as it keeps the rest waiting itself.
    """
    engine, launch = launch_of(command)
    launch = replace(launch, http_threads=max(CONNECTIONS) + 2)
    async with engine_process(LlamaServer(engine, launch), logs) as process:
        yield await process.ready()


@asynccontextmanager
async def mesh(root: Path) -> AsyncIterator[tuple[list[NodeProcess], NodeProcess, NodeProcess]]:
    """Three nodes, the one that serves, and one that does not."""
    async with AsyncExitStack() as stack:
        nodes: list[NodeProcess] = []
        for number in range(NODES):
            join = ["--join", await nodes[0].invite()] if nodes else []
            running = node_process(root / f"node-{number}", f"bench-{number}", *join)
            nodes.append(await stack.enter_async_context(running))
        names = await _placed(nodes)
        owner = next(node for node in nodes if node.name in names)
        entry = next(node for node in nodes if node.name not in names)
        yield nodes, owner, entry


async def _placed(nodes: Sequence[NodeProcess]) -> set[str]:
    """The names of the nodes that serve, once all nodes say the same and some do not serve."""
    said: list[set[str]] = []
    with trio.move_on_after(PLACED_S):
        while True:
            said = [await _serving(node) for node in nodes]
            if said[0] and len(said[0]) < NODES and all(names == said[0] for names in said):
                return said[0]
            await trio.sleep(0.2)
    raise RuntimeError(f"the nodes do not agree on who serves: {said}")


async def _serving(node: NodeProcess) -> set[str]:
    listed = await get_json(node.api, "/v1/models")
    return {name for model in listed["data"] for name in model["p2pmesh"]["nodes"]}


async def compare(
    arms: Mapping[str, Place], owner: str, effort: Effort
) -> dict[int, dict[str, dict[str, float]]]:
    """Latencies and rates by number of connections and arm: medians of the rounds."""
    table: dict[int, dict[str, dict[str, float]]] = {}
    for place in arms.values():  # caches, pools and branch predictors are warm from here on
        await ask_many(place, tiny_question(), connections=8, requests=40)
    for connections in CONNECTIONS:
        samples: dict[str, list[Sample]] = {name: [] for name in arms}
        for _ in range(effort.rounds):
            for name, place in arms.items():
                sample = await ask_many(
                    place, tiny_question(), connections=connections, requests=effort.requests
                )
                if name != STRAIGHT and sample.served_by != {owner}:
                    raise RuntimeError(f"{name}: answered by {sample.served_by}, not by {owner}")
                samples[name].append(sample)
        table[connections] = {name: _row(found) for name, found in samples.items()}
    return table


def _row(samples: Sequence[Sample]) -> dict[str, float]:
    return {
        "p50_ms": median([sample.percentile_ms(50) for sample in samples]),
        "p99_ms": median([sample.percentile_ms(99) for sample in samples]),
        "requests_per_s": median([sample.requests_per_s for sample in samples]),
    }


async def compare_streams(
    arms: Mapping[str, Place], effort: Effort
) -> dict[int, dict[str, dict[str, float]]]:
    """Events per second and time to the first, by number of streams and arm."""
    table: dict[int, dict[str, dict[str, float]]] = {}
    for connections in CONNECTIONS[:2]:
        runs: dict[str, list[Streamed]] = {name: [] for name in arms}
        for _ in range(effort.rounds):
            for name, place in arms.items():
                question = long_question(effort.tokens)
                runs[name].append(await stream_many(place, question, connections=connections))
        table[connections] = {
            name: {
                "events_per_s": median([run.events / run.elapsed_s for run in found]),
                "first_ms": median([run.first_s * 1000 for run in found]),
            }
            for name, found in runs.items()
        }
    return table


async def first_tokens_s(root: Path, starts: int) -> list[float]:
    """From starting a lone node in an empty home to the first event of its first answer."""
    found = []
    for number in range(starts):
        began = time.perf_counter()
        async with node_process(root / f"start-{number}", "bench-start") as node:
            # The gateway holds the request until the model is ready.
            streamed = await stream_many(node.api, long_question(1), connections=1)
            found.append(time.perf_counter() - began - streamed.elapsed_s + streamed.first_s)
    return found


async def idle_percents(nodes: Sequence[NodeProcess], effort: Effort) -> list[float]:
    """How much of a core each node uses when nobody asks anything."""
    await trio.sleep(effort.settle_s)
    before = [cpu_s(node.pid) for node in nodes]
    began = time.perf_counter()
    await trio.sleep(effort.idle_s)
    elapsed_s = time.perf_counter() - began
    return [
        100 * (cpu_s(node.pid) - used_s) / elapsed_s
        for node, used_s in zip(nodes, before, strict=True)
    ]


async def run(effort: Effort) -> dict[str, Any]:
    """Measure everything; the report as JSON has it."""
    with tempfile.TemporaryDirectory(prefix="p2pmesh-bench-") as folder:
        root = Path(folder)
        starts_s = await first_tokens_s(root, effort.starts)
        async with mesh(root) as (nodes, owner, entry):
            command = engine_command(owner.pid)
            async with second_engine(command, root) as straight:
                arms = {STRAIGHT: straight, LOCAL: owner.api, HOP: entry.api}
                requests = await compare(arms, owner.name, effort)
                streams = await compare_streams(arms, effort)
            memory = [rss_mib(node.pid) for node in nodes]
            idle = await idle_percents(nodes, effort)
    single = {name: row["p50_ms"] for name, row in requests[1].items()}
    return {
        "requests": requests,
        "streams": streams,
        "added_local_ms": single[LOCAL] - single[STRAIGHT],
        "added_hop_ms": single[HOP] - single[STRAIGHT],
        "first_token_s": median(starts_s),
        "rss_mib": max(memory),
        "idle_percent": max(idle),
        "rounds": effort.rounds,
        "engine": command,
    }


def show(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [f"medians of {report['rounds']} rounds", ""]
    lines.append(
        f"{'connections':>11}  {'arm':<16}{'p50 ms':>9}{'p99 ms':>9}{'req/s':>9}{'p50':>8}"
    )
    for connections, rows in report["requests"].items():
        base = rows[STRAIGHT]["p50_ms"]
        for name, row in rows.items():
            figures = f"{row['p50_ms']:9.2f}{row['p99_ms']:9.2f}{row['requests_per_s']:9.0f}"
            lines.append(f"{connections:>11}  {name:<16}{figures}{row['p50_ms'] / base:7.2f}x")
    lines += ["", f"{'streams':>11}  {'arm':<16}{'events/s':>9}{'first ms':>9}"]
    for connections, rows in report["streams"].items():
        for name, row in rows.items():
            figures = f"{row['events_per_s']:9.0f}{row['first_ms']:9.1f}"
            lines.append(f"{connections:>11}  {name:<16}{figures}")
    lines.append("")
    for key, (words, limit) in TARGETS.items():
        verdict = "ok" if report[key] <= limit else "MISSED"
        lines.append(f"{words:<45}{report[key]:8.2f}  at most {limit:g}: {verdict}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quick", action="store_true", help="a few seconds: does it run at all?")
    options = parser.parse_args()
    warnings_only = structlog.make_filtering_bound_logger(logging.WARNING)
    structlog.configure(
        wrapper_class=warnings_only, logger_factory=structlog.PrintLoggerFactory(sys.stderr)
    )
    report = trio.run(run, QUICK if options.quick else FULL)
    print(json.dumps(report) if options.json else show(report))
    sys.stdout.flush()


if __name__ == "__main__":
    main()

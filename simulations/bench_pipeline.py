"""The cost of a pipeline's tunnel beside RPC alone: `python -m simulations.bench_pipeline`.

In one run, side by side: tokens per second of a pipeline of two and three stages, straight and
through the mesh; bytes over the tunnel for each token, with the output layer on the head and on the
last stage; bytes and seconds of a load, with the model's file on the head only and on all nodes;
processor time of the nodes for each token; seconds from the loss of a stage's engine to the next
answer; and what a delay in the tunnel adds to a token.

The mesh is real nodes as processes, with TLS over loopback. The straight pipeline has the command
line of the mesh's head. Bytes and delays are measured in a tunnel whose ends are in this process.
Arms take turns, each going first in every other round, and ratios are medians over the rounds. All
share this machine: the differences between arms are what counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import structlog
import trio

from p2pmesh.engine.argv import Launch
from p2pmesh.engine.find import Engine, find_engine
from p2pmesh.engine.rpc_builds import known_build
from p2pmesh.errors import MeshError
from p2pmesh.home import Home
from p2pmesh.models.cards import Card, card_of
from p2pmesh.models.store import read_header
from p2pmesh.node.engines import compute_threads
from p2pmesh.node.memory_speed import remember
from p2pmesh.placement.pipeline import MEMORY_MIB_PER_S
from p2pmesh.placement.shape import shape_of
from simulations.engines import launch_of
from simulations.load import CHAT, Connection, Place
from simulations.pipelines import Pipeline, Tunnel, even_layers, own_pipeline, straight_pipeline
from simulations.processes import NodeProcess, cpu_s, engine_command, node_process
from simulations.random_model import Sizes, write_model

STRAIGHT, MESH = "straight", "mesh"
COUNTS = (2, 3)
ANSWER_S = 90.0  # until a pipeline answers that is being made, or made anew
RETRY_S = 0.05
ONE_WAY_S = 0.005
CONTEXT = 2048
MEMORY = "2GiB"  # of each node, several times what a stage needs


class Goal(NamedTuple):
    """What a figure is called, and how small or large it is to be."""

    words: str
    least: float = float("-inf")
    most: float = float("inf")

    def verdict(self, figure: float) -> str:
        """Return the goal and whether the figure reaches it."""
        bound = f"at most {self.most:g}" if self.least < 0 else f"at least {self.least:g}"
        return f"{bound}: {'ok' if self.least <= figure <= self.most else 'MISSED'}"


# What the project promises of itself.
GOALS: Mapping[str, Goal] = {
    "token_ratio_2": Goal("tokens/s, mesh / straight, 2 stages", least=0.97),
    "token_ratio_3": Goal("tokens/s, mesh / straight, 3 stages", least=0.97),
    "prefill_ratio_2": Goal("prefill tokens/s, mesh / straight, 2 stages", least=0.97),
    "prefill_ratio_3": Goal("prefill tokens/s, mesh / straight, 3 stages", least=0.97),
    # Heads of eight messages, positions, and the mask of 256 tokens of context: 2.7 KB.
    "token_bytes_beyond": Goal("bytes per token beyond the planner's, 2 stages", most=4096),
    "load_sent_percent": Goal("sent at a load, file everywhere, % of the weights", most=1.0),
    "relay_cpu_ms": Goal("processor time of both nodes per token, ms", most=1.0),
    "recovery_extra_s": Goal("lost stage to next answer, beyond a load, s", most=2.0),
    "delay_error_2": Goal("5 ms delay, 2 stages: ms/token off the model's, %", most=15.0),
    "delay_error_3": Goal("5 ms delay, 3 stages: ms/token off the model's, %", most=15.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: Turns of all arms.
        tokens: Of each answer.
        prompt: Characters of the prompts whose prefill counts, one token each.
        cpu_tokens: Of the answer during which processor time is measured.
        idle_s: Of idling, whose processor time is subtracted.
        model: What to write.
    """

    rounds: int
    tokens: int
    prompt: int
    cpu_tokens: int
    idle_s: float
    model: Sizes


FULL = Effort(
    rounds=9,
    tokens=32,
    prompt=128,
    cpu_tokens=128,
    idle_s=5,
    model=Sizes(layers=8, width=1024, feed_forward=4096, vocabulary=4096),
)
QUICK = Effort(
    rounds=1,
    tokens=16,
    prompt=64,
    cpu_tokens=32,
    idle_s=0.5,
    model=Sizes(layers=4, width=256, feed_forward=1024, vocabulary=1024),
)


class Answer(NamedTuple):
    """What the head's engine said about one answer."""

    tokens: int
    tokens_per_s: float
    prefill_per_s: float


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements share."""

    root: Path
    engine: Engine
    model: Path
    card: Card
    effort: Effort

    @property
    def launch(self) -> Launch:
        """The head's own part of a pipeline in this process."""
        threads = compute_threads(psutil.cpu_count(logical=False))
        return Launch(model_paths=(self.model,), alias="head", context=CONTEXT, threads=threads)

    @asynccontextmanager
    async def own(self, count: int, name: str, tunnel: Tunnel) -> AsyncIterator[Pipeline]:
        """A pipeline of `count` stages with its tunnel in this process."""
        logs = self.root / name
        logs.mkdir()
        layers = even_layers(self.card.layers, count)
        async with own_pipeline(self.engine, self.launch, layers, logs, tunnel) as pipeline:
            yield pipeline


def question(tokens: int, prompt: int = 1) -> dict[str, Any]:
    """A request that is always answered with so many tokens, and whose prompt is computed anew."""
    return {
        "messages": [{"role": "user", "content": ("0123456789" * (prompt // 10 + 1))[:prompt]}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "cache_prompt": False,
    }


async def ask(place: Place, body: Mapping[str, Any], model: str = "") -> Answer:
    """Ask once.

    Raises:
        RuntimeError: The answer is not a 200.
    """
    connection = Connection(place)
    try:
        named = {**body, "model": model} if model else body
        _, answer, _ = await connection.exchange(place.request(CHAT, named))
    finally:
        await connection.aclose()
    timings = json.loads(answer)["timings"]
    return Answer(
        tokens=timings["predicted_n"],
        tokens_per_s=timings["predicted_per_second"],
        prefill_per_s=timings["prompt_per_second"],
    )


async def first_answer(place: Place, model: str) -> float:
    """Ask for one token until there is an answer; the time of `time.time` when it came.

    Raises:
        RuntimeError: There was none in time; with the last error.
    """
    failure: Exception | None = None
    with trio.move_on_after(ANSWER_S):
        while True:
            try:
                await ask(place, question(1), model)
            except (RuntimeError, trio.TooSlowError) as exc:  # the pipeline is being made
                failure = exc
                await trio.sleep(RETRY_S)
            else:
                return time.time()
    raise RuntimeError(f"no answer within {ANSWER_S:.0f} s") from failure


@asynccontextmanager
async def split_mesh(bench: Bench, count: int) -> AsyncIterator[list[NodeProcess]]:
    """Nodes that share the model, the first one the head and the only one with the file."""
    engine = ["--engine", bench.engine.command[0]]
    wish = ["--model", str(bench.model), "--split", str(count), "--slots", "1"]
    async with AsyncExitStack() as stack:
        nodes: list[NodeProcess] = []
        for number in range(count):
            options = ["--join", await nodes[0].invite()] if nodes else wish
            home = bench.root / f"mesh-{count}-{number}"
            home.mkdir()
            # Equal speeds and budgets: layers are shared alike, whatever else runs here meanwhile.
            remember(Home.at(home).memory_speed_file, MEMORY_MIB_PER_S)
            options = [*engine, "--memory", MEMORY, "--context", str(CONTEXT), *options]
            running = node_process(home, f"bench-{number}", *options)
            nodes.append(await stack.enter_async_context(running))
        yield nodes


def engine_process_of(node: NodeProcess, program: str) -> psutil.Process:
    """The engine of this name that a node runs.

    Raises:
        RuntimeError: It runs none.
    """
    for child in psutil.Process(node.pid).children(recursive=True):
        if Path(child.exe()).stem == program:
            return child
    raise RuntimeError(f"{node.name} runs no {program}")


async def compare(bench: Bench, count: int) -> dict[str, Any]:
    """Speeds of `count` stages, straight and through a mesh; with two, what else nodes tell."""
    effort, model = bench.effort, bench.model.stem
    async with split_mesh(bench, count) as nodes:
        head = nodes[0]
        ready = await first_answer(head.api, model)
        load_s = ready - engine_process_of(head, "llama-server").create_time()
        _, launch = launch_of(engine_command(head.pid))
        layers = [stage.layers for stage in launch.stages]
        logs = bench.root / f"straight-{count}"
        logs.mkdir()
        async with straight_pipeline(
            bench.engine, replace(launch, stages=()), layers, logs
        ) as straight:
            arms = {STRAIGHT: straight.place, MESH: head.api}
            speeds = await take_turns(arms, question(effort.tokens, effort.prompt), effort, model)
        found: dict[str, Any] = {
            "layers": [bench.card.layers - sum(layers), *layers],
            "threads": launch.threads,
            "load_s": load_s,
            **{name: _speeds(answers) for name, answers in speeds.items()},
        }
        found["added_ms"] = 1000 / found[MESH]["tokens_per_s"]
        found["added_ms"] -= 1000 / found[STRAIGHT]["tokens_per_s"]
        for key, field in (("token_ratio", 1), ("prefill_ratio", 2)):
            pairs = zip(speeds[MESH], speeds[STRAIGHT], strict=True)
            found[key] = statistics.median(mesh[field] / other[field] for mesh, other in pairs)
        if count == COUNTS[0]:
            found["relay_cpu_ms"] = await relay_cpu_ms(nodes, model, effort)
            found["recovery_s"] = await recovery_s(nodes, model)
    return found


def _speeds(answers: Sequence[Answer]) -> dict[str, float]:
    return {
        "tokens_per_s": statistics.median(answer.tokens_per_s for answer in answers),
        "prefill_per_s": statistics.median(answer.prefill_per_s for answer in answers),
    }


async def take_turns(
    arms: Mapping[str, Place], body: Mapping[str, Any], effort: Effort, model: str
) -> dict[str, list[Answer]]:
    """The answers of each arm, one for each round; the first one of each is not counted."""
    answers: dict[str, list[Answer]] = {name: [] for name in arms}
    for place in arms.values():
        await ask(place, body, model)
    for number in range(effort.rounds):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            answers[name].append(await ask(arms[name], body, model))
    return answers


async def relay_cpu_ms(nodes: Sequence[NodeProcess], model: str, effort: Effort) -> float:
    """Processor time of all nodes for a token, without what they take when idle."""

    def used_s() -> float:
        return sum(cpu_s(node.pid) for node in nodes)

    began_s, before_s = time.perf_counter(), used_s()
    await trio.sleep(effort.idle_s)
    idle = (used_s() - before_s) / (time.perf_counter() - began_s)
    began_s, before_s = time.perf_counter(), used_s()
    answer = await ask(nodes[0].api, question(effort.cpu_tokens), model)
    extra_s = used_s() - before_s - idle * (time.perf_counter() - began_s)
    return 1000 * max(extra_s, 0.0) / answer.tokens


async def recovery_s(nodes: Sequence[NodeProcess], model: str) -> float:
    """Seconds from the death of the first stage's engine to the next answer."""
    engine_process_of(nodes[1], "ggml-rpc-server").send_signal(signal.SIGKILL)
    began_s = time.time()
    return await first_answer(nodes[0].api, model) - began_s


async def loads(bench: Bench) -> dict[str, Any]:
    """Seconds and bytes of a load of two stages, with the file on the head only and on both."""
    found: dict[str, Any] = {}
    for name, own in (("head_only", ()), ("both", (bench.model,))):
        async with bench.own(2, f"load-{name}", Tunnel(own=own)) as pipeline:
            found[name] = {"load_s": pipeline.load_s, "bytes": pipeline.tunnel_bytes}
    stage = sum(bench.card.layer_bytes[-even_layers(bench.card.layers, 2)[0] :])
    return found | {"weight_bytes": stage}


async def token_bytes(bench: Bench) -> dict[str, float]:
    """Bytes over the tunnel for each token, with the output layer on the head and on the stage."""
    found: dict[str, float] = {}
    for name, on_head in (("output_on_head", True), ("output_on_stage", False)):
        tunnel = Tunnel(own=(bench.model,), output_on_head=on_head)
        async with bench.own(2, name, tunnel) as pipeline:
            seen = []
            for tokens in (4, 4 + bench.effort.tokens):
                before = pipeline.tunnel_bytes
                await ask(pipeline.place, question(tokens))
                seen.append(pipeline.tunnel_bytes - before)
        found[name] = (seen[1] - seen[0]) / bench.effort.tokens
    return found


async def delays(bench: Bench, count: int) -> dict[str, float]:
    """Milliseconds per token without and with a delay in the tunnel, and what the model says.

    The model is that of `placement.pipeline.token_us`: twice one way for each stage but the head.
    """
    near, far = Tunnel(own=(bench.model,)), Tunnel(own=(bench.model,), one_way_s=ONE_WAY_S)
    async with (
        bench.own(count, f"near-{count}", near) as plain,
        bench.own(count, f"far-{count}", far) as delayed,
    ):
        arms = {"plain": plain.place, "delayed": delayed.place}
        answers = await take_turns(arms, question(bench.effort.tokens), bench.effort, "")
    plain_ms, delayed_ms = (
        1000 / _speeds(answers[name])["tokens_per_s"] for name in ("plain", "delayed")
    )
    expected_ms = plain_ms + 1000 * 2 * ONE_WAY_S * (count - 1)
    return {
        "plain_ms": plain_ms,
        "delayed_ms": delayed_ms,
        "expected_ms": expected_ms,
        "error_percent": 100 * abs(delayed_ms / expected_ms - 1),
    }


async def run(engine: Engine, effort: Effort) -> dict[str, Any]:
    """Measure everything; the report as JSON has it."""
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="p2pmesh-bench-") as folder:
        root = Path(folder)
        model = root / "random.gguf"
        await trio.to_thread.run_sync(write_model, model, effort.model)
        card = card_of([read_header(model)])
        bench = Bench(root, engine, model, card, effort)
        speeds = {count: await compare(bench, count) for count in COUNTS}
        loaded = await loads(bench)
        sent = await token_bytes(bench)
        delayed = {count: await delays(bench, count) for count in COUNTS}
    hop_bytes = shape_of(card, context=CONTEXT).hop_bytes
    two = speeds[2]
    figures = {
        **{f"token_ratio_{count}": speeds[count]["token_ratio"] for count in COUNTS},
        **{f"prefill_ratio_{count}": speeds[count]["prefill_ratio"] for count in COUNTS},
        "token_bytes_beyond": sent["output_on_head"] - hop_bytes,
        "load_sent_percent": 100 * loaded["both"]["bytes"] / loaded["weight_bytes"],
        "relay_cpu_ms": two["relay_cpu_ms"],
        "recovery_extra_s": two["recovery_s"] - two["load_s"],
        **{f"delay_error_{count}": delayed[count]["error_percent"] for count in COUNTS},
    }
    return {
        "figures": figures,
        "speeds": speeds,
        "loads": loaded,
        "token_bytes": sent | {"planned": hop_bytes},
        "delays": delayed,
        "rounds": effort.rounds,
        "model_bytes": card.size_bytes,
        "took_s": time.perf_counter() - began_s,
    }


def show(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"model of {report['model_bytes'] / 1e6:.0f} MB, {report['took_s']:.0f} s in all",
        f"medians of {report['rounds']} rounds",
        "",
        f"{'stages':>6}  {'layers':<9}{'threads':>7}  {'arm':<9}{'tok/s':>8}{'prefill':>9}",
    ]
    for count, row in report["speeds"].items():
        layers = "+".join(map(str, row["layers"]))
        for name in (STRAIGHT, MESH):
            speeds = f"{row[name]['tokens_per_s']:8.2f}{row[name]['prefill_per_s']:9.1f}"
            lines.append(f"{count:>6}  {layers:<9}{row['threads']:>7}  {name:<9}{speeds}")
    lines.append("")
    for count, row in report["speeds"].items():
        ratio = GOALS[f"token_ratio_{count}"].least
        enough_ms = row["added_ms"] * ratio / (1 - ratio)
        lines.append(
            f"{count} stages: the mesh adds {row['added_ms']:.2f} ms per token; "
            f"{ratio:g} from {enough_ms:.0f} ms per token on"
        )
    sent, loaded, two = report["token_bytes"], report["loads"], report["speeds"][COUNTS[0]]
    lines += [
        "",
        f"bytes per token, output on the head: {sent['output_on_head']:,.0f}",
        f"bytes per token, output on the stage: {sent['output_on_stage']:,.0f}",
        f"bytes per token, by the planner: {sent['planned']:,}",
    ]
    lines += [
        f"load, file on {words}: {loaded[name]['load_s']:.2f} s, "
        f"{loaded[name]['bytes']:,} of {loaded['weight_bytes']:,} bytes"
        for name, words in (("head_only", "the head"), ("both", "both"))
    ]
    lines.append(
        f"nodes: load {two['load_s']:.2f} s; stage killed to next answer {two['recovery_s']:.2f} s"
    )
    lines += [
        f"{count} stages: {row['plain_ms']:.2f} ms/token, {row['delayed_ms']:.2f} with "
        f"{1000 * ONE_WAY_S:g} ms each way, {row['expected_ms']:.2f} by the model"
        for count, row in report["delays"].items()
    ]
    lines.append("")
    for key, goal in GOALS.items():
        figure = report["figures"][key]
        lines.append(f"{goal.words:<52}{figure:8.3f}  {goal.verdict(figure)}")
    return "\n".join(lines)


def rpc_engine(path: Path | None) -> Engine:
    """The engine that a node would use.

    Raises:
        MeshError: There is none, or it cannot be a part of a pipeline.
    """
    engine = find_engine(path, Home.at(None).engine, os.environ)
    known_build(engine.version, engine.rpc)
    return engine


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", type=Path, help="llama-server, or the folder that it is in")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quick", action="store_true", help="half a minute: does it run at all?")
    options = parser.parse_args()
    warnings_only = structlog.make_filtering_bound_logger(logging.WARNING)
    structlog.configure(
        wrapper_class=warnings_only, logger_factory=structlog.PrintLoggerFactory(sys.stderr)
    )
    try:
        engine = rpc_engine(options.engine)
    except MeshError as exc:
        parser.exit(1, f"{exc}\n")
    report = trio.run(partial(run, engine, QUICK if options.quick else FULL))
    print(json.dumps(report) if options.json else show(report))
    sys.stdout.flush()


if __name__ == "__main__":
    main()

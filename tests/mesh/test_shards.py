"""A model of experts that fits on no node and is served in shards, with real nodes and engines."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

from p2pmesh.home import Home
from p2pmesh.models import measured, rankings
from p2pmesh.models.cards import ModelDigest, need_bytes
from p2pmesh.models.importance import rank
from p2pmesh.models.parts import ShardKind, ShardQuality
from p2pmesh.models.shards import Places
from p2pmesh.models.slice import read_layout
from p2pmesh.models.store import Store
from p2pmesh.sharing import MILLION
from p2pmesh.state.registers import HeldModel
from tests.engine.samples import MODEL, native
from tests.mesh.hostile import gives, holds, lying
from tests.mesh.namespaces import Host, network
from tests.mesh.nodes import Node, cli, end, start, wait_until

NAME = MODEL.stem
LOADED_S = 30.0
HEEDED_S = 2.0  # a plan is made at once
CRITICAL = 8  # of 16
STORE = Store(Home.at(Path("/nowhere")), environ={})
FILE = STORE.open(MODEL)
NEED = need_bytes(FILE.card, context=FILE.card.context)


def room_for(experts: int) -> str:
    """The memory in which a shard of so many experts fits, and no larger one."""
    each = FILE.card.expert_bytes // FILE.card.experts
    return f"--memory={NEED - each * (FILE.card.experts - experts)}"


def know(folder: Path, divergence: int, critical: int = CRITICAL) -> None:
    """Let a node know how good shards of the model are, as the commands would find out."""
    layout = read_layout(FILE)
    rng = Random(7)
    scores = [[rng.random() for _ in range(layout.count)] for _ in layout.layers]
    digest = ModelDigest(STORE.digest(FILE))
    made = rank(digest, "counts-energy", layout.layers, {"x": scores}, [()] * len(layout.layers))
    folder = Home.at(folder).rankings
    name = rankings.save(folder, made).stem
    measured.add(folder, name, [Places(made, layout).quality(critical, divergence)])


@contextmanager
def mesh(
    folder: Path,
    *sizes: int,
    divergence: int = 50_000,
    options: tuple[str, ...] = (),
    everybody: tuple[str, ...] = (),
    is_grown: bool = False,
) -> Iterator[list[Node]]:
    """Nodes with room for shards of so many experts; the first knows how good they are.

    `options` are those of the first, which wants the model. With `is_grown` each node after the
    second joins when the others have their shards, and in the end all are ready.
    """
    with ExitStack() as stack:
        nodes: list[Node] = []
        for number, size in enumerate(sizes, 1):
            name = f"node-{number}"
            wants = ["--join", nodes[0].invite()] if nodes else ["--model", str(MODEL), *options]
            if not nodes:
                know(folder / name, divergence)
            node = start(folder / name, room_for(size), *everybody, *wants, name=name)
            stack.callback(end, node)
            nodes.append(node)
            if is_grown and number > 1:
                has_all = partial(has_shards, nodes[0], number)
                wait_until(has_all, f"{number} shards", within_s=LOADED_S)
        yield nodes


def model(node: Node) -> dict[str, Any]:
    [found] = [one for one in node.status()["models"] if one["id"] == NAME]
    return dict(found)


def ready_shards(node: Node) -> dict[str, int]:
    """How many experts of each layer each node holds that is ready."""
    found = model(node)["replicas"]
    return {one["name"]: one["experts"]["held"] for one in found if one["state"] == "ready"}


def has_shards(node: Node, count: int) -> bool:
    return len(ready_shards(node)) == count


def ask(
    node: Node, text: str = "Hello", *, tokens: int = 4, quality: str = "any"
) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": text}]
    said = {"model": NAME, "messages": messages, "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{node.api}/chat/completions",
        json.dumps(said).encode(),
        {"Content-Type": "application/json", "X-P2PMesh-Quality": quality},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(response.headers["x-p2pmesh-served-by"]), json.load(response)


def refused(node: Node, *, quality: str) -> str:
    """What a request is told that cannot be answered now."""
    with pytest.raises(urllib.error.HTTPError) as answer:
        ask(node, quality=quality)
    with answer.value as error:
        assert error.code == 503
        return str(error.read().decode())


def test_a_model_that_fits_nowhere_is_served_in_shards(tmp_path: Path) -> None:
    with mesh(tmp_path, 12, 12, 12, is_grown=True) as nodes:
        held = ready_shards(nodes[0])
        # Two nodes have 12 each; the third gets its share and moves nothing.
        assert held.pop("node-3") in (10, 11)
        assert held == {"node-1": 12, "node-2": 12}
        served = {ask(nodes[0], f"question {number}")[0] for number in range(20)}
        assert {one.partition("/")[0] for one in served} == {"node-1", "node-2", "node-3"}
        assert all("/shard-" in one for one in served)
        for node in nodes:
            assert ask(node, "question 1")[0] == ask(nodes[0], "question 1")[0]
        with urllib.request.urlopen(f"{nodes[0].api}/models") as response:
            [entry] = [one for one in json.load(response)["data"] if one["id"] == NAME]
        assert entry["p2pmesh"]["layout"] == "experts"
        assert entry["p2pmesh"]["shards"]["divergence"] == 0.05
        assert entry["p2pmesh"]["shards"]["experts"] == 16
        assert "full quality" in refused(nodes[0], quality="full")


@pytest.mark.full
def test_shards_that_are_not_good_enough_leave_it_to_a_pipeline(tmp_path: Path) -> None:
    options = (f"--engine={native()}",)
    with mesh(tmp_path, 12, 12, divergence=170_000, everybody=options) as nodes:
        wait_until(lambda: model(nodes[0])["state"] == "ready", "it answers", within_s=LOADED_S)
        assert "/stage-" in ask(nodes[1])[0]
        why = model(nodes[0])["reason"]
        assert "0.170 is their least measured divergence, more than the 0.100" in why


@pytest.mark.full
def test_without_a_pipeline_it_says_that_shards_are_not_good_enough(tmp_path: Path) -> None:
    with mesh(tmp_path, 12, 12, divergence=170_000) as nodes:

        def why() -> str:
            return str(model(nodes[0])["reason"])

        wait_until(lambda: "--moe-quality" in why(), "it says why", within_s=LOADED_S)
        assert "0.170 is their least measured divergence, more than the 0.100" in why()
        assert not ready_shards(nodes[0])


def both_know(nodes: list[Node], name: str = "liar") -> bool:
    return all(any(one["name"] == name for one in node.status()["nodes"]) for node in nodes)


async def test_what_a_single_member_says_of_shards_starts_none(tmp_path: Path) -> None:
    ranking = "ab" * 32
    lie = ShardQuality(ShardKind.EXPERTS, ranking, FILE.card.experts, CRITICAL, 0, MILLION)
    digest = ModelDigest(STORE.digest(FILE))
    claim = HeldModel(digest=digest, stem=FILE.stem, card=FILE.card, qualities=(lie,))
    with mesh(tmp_path, 12, 12, divergence=170_000) as nodes:
        async with lying(nodes[0], gives(2**20), holds(claim)):
            await trio.to_thread.run_sync(wait_until, partial(both_know, nodes), "it is heard")
            await trio.sleep(HEEDED_S)
            for node in nodes:
                assert model(node)["replicas"] == []
                assert "0.170 is their least measured divergence" in model(node)["reason"]


@pytest.mark.full
def test_an_owner_can_take_worse_shards(tmp_path: Path) -> None:
    options = ("--moe-quality", "kl=0.5")
    with mesh(tmp_path, 12, 12, divergence=170_000, options=options) as nodes:
        wait_until(lambda: len(ready_shards(nodes[0])) == 2, "two shards", within_s=LOADED_S)
        assert "/shard-" in ask(nodes[1])[0]


@pytest.mark.full
def test_what_commands_measure_makes_the_mesh_share_a_model_by_itself(tmp_path: Path) -> None:
    with mesh(tmp_path, 13, 13, divergence=900_000, options=("--moe-quality", "kl=0.5")) as nodes:
        wait_until(lambda: "--moe-quality" in model(nodes[0])["reason"], "it says why not")
        assert not ready_shards(nodes[0])
        home, engine = f"--home={tmp_path / 'node-1'}", f"--engine={native()}"
        for command in (("rank",), ("measure", "--kind=experts", "--moe-quality=kl=0.5")):
            done = cli("experts", *command, str(MODEL), home, engine)
            assert done.returncode == 0, done.stderr
        wait_until(lambda: len(ready_shards(nodes[1])) == 2, "two shards", within_s=LOADED_S)
        assert "measured divergence 0." in model(nodes[1])["reason"]
        assert "/shard-" in ask(nodes[1])[0]


@pytest.mark.full
def test_a_smaller_quantisation_answers_for_a_model_that_fits_nowhere(tmp_path: Path) -> None:
    small = tmp_path / "small.gguf"
    quantise = [
        str(native() / "llama-quantize"),
        "--allow-requantize",
        str(MODEL),
        str(small),
        "Q4_0",
    ]
    subprocess.run(quantise, check=True, capture_output=True, timeout=60)
    options = ("--model", str(small))
    with mesh(tmp_path, 12, 12, options=options) as nodes:
        wait_until(lambda: model(nodes[0])["state"] == "ready", "it answers", within_s=LOADED_S)
        served, answer = ask(nodes[1])
        assert served == "node-1/whole"
        assert answer["model"] == "small"
        assert "a smaller quantisation of the same model" in model(nodes[0])["reason"]
        assert "full quality" in refused(nodes[1], quality="full")


@pytest.mark.full
def test_nothing_but_gossip_goes_between_nodes_while_shards_write(tmp_path: Path) -> None:
    with network() as net, ExitStack() as stack:
        lan = net.lan()
        hosts = [net.host(lan, f"node-{number}") for number in (1, 2, 3)]
        nodes: list[Node] = []
        know(tmp_path / "0", 50_000)
        for number, host in enumerate(hosts):
            wants = [] if nodes else ["--model", str(MODEL)]
            nodes.append(host.start(tmp_path / f"{number}", room_for(12), *wants))
            stack.callback(end, nodes[-1])
        wait_until(lambda: len(ready_shards(nodes[0])) == 3, "three shards", within_s=LOADED_S)
        homes = list(zip(hosts, nodes, strict=True))
        own = [own_question(host, node) for host, node in homes]

        def bytes_within(seconds: float, *, tokens: int) -> int:
            before = sum(host.bytes_sent() for host in hosts)
            ends_at = time.monotonic() + seconds
            while time.monotonic() < ends_at:
                for (host, node), question in zip(homes, own, strict=True):
                    with host.inside():
                        if tokens:
                            ask(node, question, tokens=tokens)
                        else:
                            time.sleep(0.1)
            return sum(host.bytes_sent() for host in hosts) - before

        idle = bytes_within(5.0, tokens=0)
        busy = bytes_within(5.0, tokens=100)
        assert busy < 2 * idle + 20_000, "a token between nodes is 1 kB and more"


def own_question(host: Host, node: Node) -> str:
    """A conversation that stays on the shard of the node that is asked."""
    with host.inside():
        for number in range(100):
            text = f"question {number}"
            if ask(node, text, tokens=1)[0].startswith(f"{node.me['name']}/"):
                return text
    raise AssertionError("no conversation is its own")


@pytest.mark.full
def test_the_death_of_a_node_moves_its_conversations(tmp_path: Path) -> None:
    with mesh(tmp_path, 12, 12, 12, is_grown=True) as nodes:
        before = {f"question {n}": ask(nodes[0], f"question {n}")[0] for n in range(12)}
        nodes[2].process.send_signal(signal.SIGKILL)
        after = {text: ask(nodes[0], text)[0] for text in before}
        moved = {text for text in before if before[text] != after[text]}
        assert moved == {text for text, one in before.items() if one.startswith("node-3/")}

"""A model that two nodes share as a pipeline, with real nodes and the native engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest

from p2pmesh.engine.confined import machine_confinement
from p2pmesh.placement.distance import ONE_WAY_NS
from tests.engine.samples import MODEL, native
from tests.mesh.hostile import ANSWER, QUESTION
from tests.mesh.namespaces import network
from tests.mesh.nodes import Node, assert_sentence, cli, end, start, wait_until
from tests.models.builders import tiny_gguf

NAME = MODEL.stem
LOADED_S = 30.0
BACK_S = 40.0  # 10 s until a stopped engine is taken for lost, and one load
TIMEOUT_S = 60.0


def ask(node: Node, *, tokens: int = 16, name: str = NAME) -> dict[str, Any]:
    """The whole answer of a greedy request, with log probabilities."""
    said = {
        "model": name,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": tokens,
        "logprobs": True,
    }
    request = urllib.request.Request(
        f"{node.api}/chat/completions",
        json.dumps(said).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        answer: dict[str, Any] = json.load(response)
        answer["served_by"] = response.headers["x-p2pmesh-served-by"]
    return answer


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def logprobs(answer: dict[str, Any]) -> list[float]:
    return [one["logprob"] for one in answer["choices"][0]["logprobs"]["content"]]


@contextmanager
def split(folder: Path, count: int, *, spare: int = 0) -> Iterator[list[Node]]:
    """Nodes of which the first asks for a model that `count` of them share; ready to answer."""
    engine = f"--engine={native()}"
    with ExitStack() as stack:
        nodes: list[Node] = []
        for number in range(count + spare):
            options = ["--join", nodes[0].invite()] if nodes else ["--model", str(MODEL)]
            options += [] if nodes else ["--split", str(count)]
            name = f"node-{number + 1}"
            node = start(folder / name, engine, *options, name=name)
            stack.callback(end, node)
            nodes.append(node)
        wait_until(lambda: state(nodes[0]) == "ready", "the pipeline answers", within_s=LOADED_S)
        yield nodes


def model(node: Node, name: str = NAME) -> dict[str, Any]:
    [found] = [one for one in node.status()["models"] if one["id"] == name]
    return dict(found)


def failed(node: Node, name: str) -> set[str]:
    return {one["name"] for one in model(node, name)["replicas"] if one["state"] == "failed"}


def state(node: Node, name: str = NAME) -> str:
    return str(model(node, name)["state"])


def engine_of(nodes: list[Node], program: str) -> psutil.Process:
    engines = [one for node in nodes for one in node.engines()]
    [found] = [one for one in engines if Path(one.exe()).name == program]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one node says."""
    folder = tmp_path_factory.mktemp("alone")
    node = start(folder, f"--engine={native()}", "--model", str(MODEL), name="alone")
    try:
        return ask(node)
    finally:
        end(node)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.full)])
def test_a_pipeline_says_what_one_node_says(
    tmp_path: Path, alone: dict[str, Any], count: int
) -> None:
    with split(tmp_path, count) as nodes:
        for node in nodes:
            answer = ask(node)
            assert text(answer) == text(alone) == ANSWER
            assert logprobs(answer) == logprobs(alone)
            part = str(answer["served_by"]).partition("/")[2]
            assert part.startswith("stage-")
            assert part.endswith("-0")
        parts = {one["name"]: one["part"] for one in model(nodes[0])["replicas"]}
        assert sorted(part[-1] for part in parts.values()) == [str(n) for n in range(count)]


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.full)]
)
@pytest.mark.parametrize(
    "program", [pytest.param("ggml-rpc-server", marks=pytest.mark.full), "llama-server"]
)
def test_the_next_request_after_a_process_is_lost_is_answered(
    tmp_path: Path, program: str, how: signal.Signals
) -> None:
    with split(tmp_path, 2) as nodes:
        lost = engine_of(nodes, program)
        lost.send_signal(how)
        began = time.monotonic()
        answers: list[dict[str, Any]] = []
        while not answers:
            try:
                answers.append(ask(nodes[1]))
            except urllib.error.HTTPError as exc:
                exc.close()
                assert time.monotonic() - began < BACK_S
        assert text(answers[0]) == ANSWER
        wait_until(lambda: not lost.is_running() or lost.status() == "zombie", "it is gone")


def stream(node: Node, on_token: Callable[[int], None]) -> list[bytes]:
    """The lines of a long answer, up to its end by whatever means."""
    said: dict[str, object] = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}]}
    said |= {"stream": True, "max_tokens": 2000, "ignore_eos": True}
    request = urllib.request.Request(
        f"{node.api}/chat/completions",
        json.dumps(said).encode(),
        {"Content-Type": "application/json"},
    )
    lines: list[bytes] = []
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer, suppress(HTTPException):
        for line in answer:
            if line.strip():
                lines.append(line.strip())
                on_token(len(lines))
    return lines


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", ["stage", "head", "node of the stage", "node of the head"])
def test_a_loss_while_tokens_come_ends_the_answer_and_the_next_one_is_whole(
    tmp_path: Path, victim: str, how: signal.Signals
) -> None:
    with split(tmp_path, 2, spare=1) as nodes:
        names = {part[-1]: name for name, part in parts(nodes[0]).items()}
        roles = {role: next(n for n in nodes if n.name == names[role]) for role in names}
        [client] = [node for node in nodes if node.name not in names.values()]
        of = roles["0" if victim.endswith("head") else "1"]
        program = "llama-server" if victim.endswith("head") else "ggml-rpc-server"
        engine = engine_of([of], program)
        lost = psutil.Process(of.process.pid) if victim.startswith("node") else engine

        began = time.monotonic()
        lines = stream(client, lambda count: lost.send_signal(how) if count == 3 else None)
        assert time.monotonic() - began < TIMEOUT_S
        assert lines[-1] != b"data: [DONE]"

        answer: dict[str, Any] = {}
        while not answer:
            try:
                answer = ask(client)
            except urllib.error.HTTPError as exc:
                exc.close()
                assert time.monotonic() - began < BACK_S + TIMEOUT_S
        assert text(answer) == ANSWER
        if victim.startswith("node"):
            assert of.name not in parts(client)
            lost.send_signal(signal.SIGCONT)  # one that was killed has no use for it
        wait_until(lambda: not engine.is_running() or engine.status() == "zombie", "it is gone")


@pytest.mark.full
def test_a_node_that_is_lost_is_replaced_by_itself_when_it_comes_back(tmp_path: Path) -> None:
    with split(tmp_path, 2) as nodes:
        engines = nodes[1].engines()
        os.kill(nodes[1].process.pid, signal.SIGKILL)
        nodes[1].process.wait()
        wait_until(lambda: state(nodes[0]) != "ready", "the pipeline is broken", within_s=20)
        back = start(tmp_path / "node-2", f"--engine={native()}", name="node-2")
        try:
            wait_until(lambda: state(nodes[0]) == "ready", "it is back", within_s=BACK_S)
            assert text(ask(back)) == ANSWER
            assert not any(one.is_running() and one.status() != "zombie" for one in engines)
        finally:
            end(back)


def test_a_split_without_a_second_engine_names_the_command(tmp_path: Path) -> None:
    folder, options = tmp_path / "one", ["--model", str(MODEL), "--split", "2"]
    node = start(folder, f"--engine={native()}", *options, name="one")
    other = start(tmp_path / "two", "--join", node.invite(), name="two")  # the embedded engine
    try:
        wait_until(lambda: "engine install" in str(model(node)["reason"]), "the reason is said")
        assert "not split over 2 nodes" in str(model(node)["reason"])
    finally:
        end(other)
        end(node)


def test_a_split_that_is_no_number_of_nodes_is_refused(tmp_path: Path) -> None:
    done = cli("up", f"--home={tmp_path}", "--split=1")
    assert_sentence(done, 2, "--split", "from 2 to 8")


def test_a_model_that_fits_on_no_node_is_split_by_itself_and_whole_while_a_large_node_is_there(
    tmp_path: Path,
) -> None:
    engine, context = f"--engine={native()}", "--context=32768"
    options = ["--model", str(MODEL), context]
    with ExitStack() as stack:
        first = start(tmp_path / "one", engine, "--memory=190MiB", *options, name="one")
        stack.callback(end, first)
        assert "too few nodes are here" in str(model(first)["reason"])
        other = start(
            tmp_path / "two", engine, "--memory=190MiB", "--join", first.invite(), name="two"
        )
        stack.callback(end, other)
        wait_until(lambda: state(first) == "ready", "it is split", within_s=LOADED_S)
        assert "it fits on no node: split over 2 nodes" in str(model(other)["reason"])
        assert text(ask(other)) == ANSWER
        large = start(
            tmp_path / "large", engine, "--memory=2GiB", "--join", first.invite(), name="large"
        )
        try:
            wait_until(lambda: parts(first) == {"large": "whole"}, "it is whole", within_s=LOADED_S)
            assert text(ask(first)) == ANSWER
        finally:
            end(large)
        wait_until(lambda: set(parts(first)) == {"one", "two"}, "split anew", within_s=BACK_S)
        wait_until(lambda: state(first) == "ready", "it answers", within_s=LOADED_S)
        assert text(ask(other)) == ANSWER


@pytest.mark.full
def test_a_node_on_which_stages_fail_is_left_for_another(tmp_path: Path) -> None:
    broken = tmp_path / "engine"
    broken.mkdir()
    shutil.copy(native() / "llama-server", broken)
    (broken / "ggml-rpc-server").write_text(f"""#!/bin/sh
case "$*" in *--port*) exit 1;; esac
exec {native() / "ggml-rpc-server"} "$@"
""")
    (broken / "ggml-rpc-server").chmod(0o755)
    good = f"--engine={native()}"
    dense = tiny_gguf(tmp_path / "dense.gguf", layers=6, half=True)  # only the head has it
    with ExitStack() as stack:
        first = start(tmp_path / "one", good, f"--model={dense}", "--split=2", name="one")
        stack.callback(end, first)
        invitation = first.invite()
        for name, engine in (("broken", f"--engine={broken}"), ("sound", good)):
            other = start(tmp_path / name, engine, "--join", invitation, name=name)
            stack.callback(end, other)
            if name == "broken":
                wait_until(
                    lambda: failed(first, "dense") == {"broken"}, "it fails", within_s=LOADED_S
                )
        wait_until(
            lambda: state(first, "dense") == "ready", "the pipeline answers", within_s=LOADED_S
        )
        assert text(ask(first, name="dense"))
        assert {"one", "sound"} <= {one["name"] for one in model(first, "dense")["replicas"]}


@pytest.mark.full
def test_two_models_share_their_nodes_within_what_these_give(tmp_path: Path) -> None:
    dense = tiny_gguf(tmp_path / "dense.gguf", layers=6, half=True)
    options = f"--engine={native()}", "--memory=400MiB"
    wanted = "--model", str(MODEL), "--model", str(dense), "--split=2"
    with ExitStack() as stack:
        first = start(tmp_path / "one", *options, *wanted, "--context=4096", name="one")
        stack.callback(end, first)
        other = start(tmp_path / "two", *options, "--join", first.invite(), name="two")
        stack.callback(end, other)
        names = {NAME, "dense"}
        wait_until(
            lambda: {state(first, name) for name in names} == {"ready"}, "both", within_s=LOADED_S
        )
        assert text(ask(other)) == ANSWER
        assert text(ask(other, name="dense"))
        planned = json.loads(cli("plan", f"--home={tmp_path / 'one'}", "--json").stdout)
        for node in planned["nodes"]:
            assert {part["model"] for part in node["parts"]} == names
            assert node["used_bytes"] <= node["budget_bytes"] == 400 * 2**20


@pytest.mark.full
def test_nodes_across_a_vpn_know_how_far_they_are_from_each_other(tmp_path: Path) -> None:
    options = f"--engine={native()}", "--memory=190MiB", "--context=32768"
    with network() as net, ExitStack() as stack:
        home, barn = net.host(net.lan(), "home"), net.host(net.lan(), "barn")
        address, _ = net.tunnel(home, barn, delay_s=0.03)
        first = home.start(tmp_path / "home", *options, "--model", str(MODEL))
        stack.callback(end, first)
        made = cli(
            "invite",
            f"--home={tmp_path / 'home'}",
            "--address",
            address,
            "--json",
            inside=home.command,
        )
        other = barn.start(tmp_path / "barn", *options, "--join", json.loads(made.stdout)["token"])
        stack.callback(end, other)
        wait_until(lambda: state(first) == "ready", "it is split", within_s=LOADED_S)
        planned = json.loads(
            cli("plan", f"--home={tmp_path / 'home'}", "--json", inside=home.command).stdout
        )
        [row] = [one for one in planned["models"] if one["link_us"]]
        assert row["link_us"] >= 2 * ONE_WAY_NS[2] // 1000


def parts(node: Node) -> dict[str, str]:
    """The part of the model that each node runs."""
    return {one["name"]: one["part"] for one in model(node)["replicas"]}


@pytest.mark.full
@pytest.mark.skipif(
    not machine_confinement().is_full, reason=f"on this machine: {machine_confinement()}"
)
def test_a_head_without_the_right_has_its_stage_on_a_node_that_confines_it(tmp_path: Path) -> None:
    engine = f"--engine={native()}"
    file = tmp_path / "guests-own.gguf"
    file.write_bytes(MODEL.read_bytes() + bytes(32))  # the other node has no such file
    host = start(tmp_path / "host", engine, name="host")
    options = ["--join", host.invite(stage=False), "--model", str(file), "--split", "2"]
    guest = start(tmp_path / "guest", engine, *options, name="guest")

    def heads() -> list[str]:
        found = [one for one in host.status()["models"] if one["id"] == file.stem]
        return [
            str(replica["name"])
            for one in found
            if one["state"] == "ready"
            for replica in one["replicas"]
            if replica["part"].endswith("-0")
        ]

    try:
        [standing] = [one["stage"] for one in host.status()["nodes"] if one["name"] == "guest"]
        assert not standing
        wait_until(lambda: heads() == ["guest"], "the pipeline answers", within_s=LOADED_S)
        assert host.status()["node"]["engine"]["rpc_confinement"]["level"] == "full"
    finally:
        end(guest)
        end(host)

"""A running node against junk, floods, clients that misbehave, and the death of its parts."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from p2pmesh.gateway.connection_limit import GIVE_WAY_S
from p2pmesh.gateway.limits import BODIES_BYTES_MAX, BODY_BYTES_MAX
from tests.mesh.hostile import (
    ANSWER,
    HALF_TLS,
    JUNK,
    PORTS,
    Footprint,
    answers,
    ask,
    chat_request,
    connected,
    held,
    reset,
    throw,
)
from tests.mesh.nodes import (
    ANY_PORTS,
    Node,
    assert_gone,
    cli,
    end,
    environment,
    program,
    running,
    start,
    wait_until,
)

LONG = {"stream": True, "max_tokens": 20_000, "ignore_eos": True}
POOLED = 24  # connections to the engine and to the peer, kept for the next requests
GROWTH_BYTES_MAX = 64 * 2**20


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """An owner and a node that forwards; every attack leaves them in order."""
    with running(tmp_path_factory.mktemp("pair"), 2) as nodes:
        assert answers(*nodes)
        yield nodes


def _assert_given_back(nodes: list[Node], before: list[Footprint]) -> None:
    """Every connection and all memory of an attack goes back, but for a few pooled connections."""
    for node, was in zip(nodes, before, strict=True):
        limit = Footprint(
            descriptors=was.descriptors + POOLED,
            threads=was.threads,
            resident_bytes=was.resident_bytes + GROWTH_BYTES_MAX,
        )
        wait_until(partial(_holds_at_most, node, limit), f"{node.name} has {limit} at most")


def _holds_at_most(node: Node, limit: Footprint) -> bool:
    now = held(node)
    return now.descriptors <= limit.descriptors and now.resident_bytes <= limit.resident_bytes


# --- junk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", PORTS)
def test_junk_on_a_port_is_dropped_and_logged_and_the_node_answers_on(
    pair: list[Node], port: str
) -> None:
    log = Path(pair[0].me["home"]) / "logs" / "node.log"
    before, logged = [held(node) for node in pair], log.stat().st_size
    for name, junk in JUNK.items():
        throw(pair[0], port, junk)
        assert pair[0].process.poll() is None, name
        assert ask(pair[0]).text == ANSWER, name
    assert answers(*pair)
    with log.open("rb") as file:
        file.seek(logged)
        said = file.read()
    assert b"level=warning" in said or b"level=info" in said
    assert b"Traceback" not in said
    _assert_given_back(pair, before)


def test_connections_that_say_nothing_keep_nobody_out(pair: list[Node]) -> None:
    before = [held(node) for node in pair]
    with ExitStack() as stack:
        for port in PORTS:
            for number in range(60):
                one = stack.enter_context(connected(pair[1], port))
                one.sendall((HALF_TLS if port == "peer" else b"GET /v1/models HT")[: number % 17])
        assert answers(*pair)
    _assert_given_back(pair, before)


@pytest.mark.full
@pytest.mark.parametrize("port", PORTS)
def test_headers_that_trickle_in_are_cut_off(pair: list[Node], port: str) -> None:
    head = HALF_TLS if port == "peer" else b"GET /v1/models HTTP/1.1\r\nX: " + b"y" * 1000
    started = time.monotonic()
    with connected(pair[0], port) as one:
        one.settimeout(0.5)
        for byte in head:
            try:
                one.sendall(bytes([byte]))
                if not one.recv(65536):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("it was listened to until the end")
    assert time.monotonic() - started < 40
    assert answers(*pair)


# --- clients ----------------------------------------------------------------------------------


def test_a_hundred_clients_at_once_are_answered_and_leave_nothing(pair: list[Node]) -> None:
    before = [held(node) for node in pair]
    with ThreadPoolExecutor(100) as pool:
        replies = list(pool.map(lambda _: ask(pair[1]), range(100)))
    for reply in replies:
        if reply.status == 200:
            assert reply.text == ANSWER
        else:
            assert reply.status in (429, 503)
            assert int(reply.headers["retry-after"]) > 0
    assert sum(reply.status == 200 for reply in replies) >= 50
    assert answers(*pair)
    _assert_given_back(pair, before)


def test_clients_that_leave_in_the_middle_leave_nothing(pair: list[Node]) -> None:
    before = [held(node) for node in pair]
    for number in range(50):
        with connected(pair[1], "api") as one:
            one.sendall(chat_request("Tell me a story", **LONG))
            if number % 3:
                assert b"200 OK" in one.recv(65536)
            if number % 2:
                reset(one)
    assert answers(*pair)
    _assert_given_back(pair, before)


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(3, id="fewer than slots"),
        pytest.param(8, id="twice the slots", marks=pytest.mark.full),
    ],
)
def test_clients_that_read_nothing_keep_nobody_out(pair: list[Node], count: int) -> None:
    with ExitStack() as stack:
        for _ in range(count):
            one = stack.enter_context(connected(pair[1], "api", receive_bytes=4096))
            one.sendall(chat_request("Tell me a story", **LONG))
        time.sleep(0.5)
        texts = [ask(node, timeout_s=3 * GIVE_WAY_S).text for node in pair]
        assert texts == [ANSWER, ANSWER]


def test_unfinished_bodies_stop_no_chat_and_leave_no_memory(pair: list[Node]) -> None:
    before = held(pair[0])
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(BODIES_BYTES_MAX // BODY_BYTES_MAX + 1):
            one = stack.enter_context(connected(pair[0], "api"))
            with suppress(ConnectionError):  # those beyond the bound are refused
                one.sendall(head % BODY_BYTES_MAX + bytes(BODY_BYTES_MAX - 1))
        assert held(pair[0]).resident_bytes - before.resident_bytes > BODIES_BYTES_MAX // 2
        assert answers(*pair)
    _assert_given_back(pair[:1], [before])


# --- the death of parts -----------------------------------------------------------------------


def _engine(node: Node) -> psutil.Process:
    """The engine's own process: the one that nobody below it started."""
    return next(one for one in node.engines() if not one.children())


def _state(node: Node) -> str:
    return str(node.status()["models"][0]["state"])


@pytest.mark.parametrize("victim", ["engine", pytest.param("launcher", marks=pytest.mark.full)])
def test_a_killed_engine_is_replaced_and_the_next_request_answered(
    tmp_path: Path, victim: str
) -> None:
    with running(tmp_path, 1) as [node]:
        engine = _engine(node)
        launcher = engine.parent()
        assert launcher is not None
        (engine if victim == "engine" else launcher).kill()
        assert ask(node).text == ANSWER
        assert_gone([engine, launcher])
        assert _engine(node).pid != engine.pid
        assert _state(node) == "ready"


@pytest.mark.full
def test_a_frozen_engine_is_replaced_and_the_waiting_request_answered(tmp_path: Path) -> None:
    with running(tmp_path, 1) as [node]:
        engine = _engine(node)
        engine.suspend()
        assert ask(node, timeout_s=90).text == ANSWER
        assert_gone([engine])


@pytest.mark.full
def test_a_killed_node_takes_its_engine_along_and_rejoins_without_being_told(
    tmp_path: Path,
) -> None:
    with running(tmp_path, 2) as nodes:
        engines = nodes[0].engines()
        assert engines
        nodes[0].process.kill()
        assert_gone(engines, within_s=1.0)
        nodes[0].process.wait()
        assert nodes[0].run_file().exists()
        done = cli("status", "--home", nodes[0].me["home"])
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "p2pmesh: No node is running here: p2pmesh up\n"
        # Its memory of the others has to be its own: node-2 has another port now.
        end(nodes[1])
        nodes[1] = start(tmp_path / "node-2", f"--peer={nodes[1].me['peer']}", name="node-2")
        again = start(tmp_path / "node-1", name="node-1")
        try:
            assert again.line["mesh"] == nodes[1].line["mesh"]
            wait_until(lambda: len(again.status()["nodes"]) == 2, "the mesh is whole again")
            assert answers(again, nodes[1])
        finally:
            end(again)


# --- stopping ---------------------------------------------------------------------------------


def test_one_interrupt_stops_in_order(tmp_path: Path) -> None:
    with running(tmp_path, 1) as [node]:
        engines = node.engines()
        node.process.send_signal(signal.SIGINT)
        assert node.process.wait(10) == 0
        assert_gone(engines)
        assert not node.run_file().exists()
        assert "Traceback" not in node.said()


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with running(tmp_path, 1) as [node], connected(node, "api") as one:
        one.sendall(chat_request("Tell me a story", **LONG))
        assert b"200 OK" in one.recv(65536)
        engines = node.engines()
        node.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Stopping" in node.said(), "the first is heeded")
        assert node.process.poll() is None
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(1) == 128 + signal.SIGTERM
        assert_gone(engines, within_s=1.0)
        assert not node.run_file().exists()


# --- joining ----------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.full
def test_a_node_waits_a_little_for_the_one_it_is_to_join(tmp_path: Path) -> None:
    peer = f"--peer=127.0.0.1:{_free_port()}"
    first = start(tmp_path / "late", peer, name="late")
    token = first.invite()
    end(first)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(start, tmp_path / "early", f"--join={token}", name="early")
        time.sleep(3.0)
        assert not joining.done()
        late = start(tmp_path / "late", peer, name="late")
        try:
            early = joining.result(timeout=20)
            try:
                assert early.line["mesh"] == late.line["mesh"]
                wait_until(lambda: len(late.status()["nodes"]) == 2, "both are in one mesh")
                assert answers(early, late)
            finally:
                end(early)
        finally:
            end(late)


@pytest.mark.full
@pytest.mark.parametrize("through", ["the original", "a third node"])
def test_of_two_nodes_with_one_key_one_gives_way(tmp_path: Path, through: str) -> None:
    with running(tmp_path, 2) as nodes:
        end(nodes[1])
        shutil.copytree(tmp_path / "node-2", tmp_path / "copy")
        nodes[1] = start(tmp_path / "node-2", name="node-2")
        assert nodes[1].line["mesh"] == nodes[0].line["mesh"]
        other = nodes[1] if through == "the original" else nodes[0]
        copy = subprocess.Popen(
            [
                *program(), "up", "--json", *ANY_PORTS, f"--home={tmp_path / 'copy'}",
                "--name=copy", f"--join={other.me['peer']}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )  # fmt: skip
        try:
            twins = [nodes[1].process, copy]
            wait_until(lambda: any(one.poll() is not None for one in twins), "one gives way")
            loser = next(one for one in twins if one.poll() is not None)
            assert loser.wait() == 1
            words = copy.communicate()[1].decode() if loser is copy else nodes[1].said()
            assert words.splitlines()[-1].endswith("give each its own --home instead of a copy")
            survivor = copy if loser is nodes[1].process else nodes[1].process
            time.sleep(1.0)
            assert survivor.poll() is None
            wait_until(lambda: answers(nodes[0]), "the mesh has one of them")
        finally:
            if copy.poll() is None:
                copy.terminate()
                copy.communicate(timeout=20)

"""A member that means ill: junk and forged records on a gossip link, as fast as it can."""

from __future__ import annotations

import json
import secrets
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest
import structlog
import trio
import trio.lowlevel

from p2pmesh.identity.keys import MeshId, SigningKey
from p2pmesh.state.registers import Caps
from p2pmesh.transport.banlist import TROUBLE_BURST
from p2pmesh.transport.base import Channel, link_errors
from p2pmesh.transport.channel import WebSocketChannel
from p2pmesh.transport.tls import UNAUTHENTICATED_MAX
from p2pmesh.wire.messages import MESSAGE_BYTES_MAX, Push, encode_message
from p2pmesh.wire.registers import CAPS
from tests.mesh.hostile import (
    ANSWER,
    HALF_TLS,
    Attacker,
    answers,
    ask,
    connected,
    signed,
    throw,
)
from tests.mesh.nodes import Node, end, running, start

FORGED_PER_S = 10_000
FLOOD_S = 10.0
CPU_SHARE_MAX = 0.10  # of a core, above what the node takes in peace
SHORT_S = 1.0
JOIN_S_MAX = 10.0  # with the start of a process and of its engine on a busy machine

log = structlog.get_logger(__name__)


def forged(mesh: MeshId | None, count: int) -> list[bytes]:
    """Records in good form, each of another owner, none of whom signed them."""
    made: list[bytes] = []
    for number in range(count):
        body = Caps(budget_bytes=number, engine="embedded", rpc="").to_wire()
        raw = bytearray(signed(SigningKey(secrets.token_bytes(32)), mesh, CAPS, body))
        raw[number % 64] ^= 1
        made.append(bytes(raw))
    return made


def cpu_s(node: Node) -> float:
    """Processor time of the node itself, without its engines."""
    times = psutil.Process(node.process.pid).cpu_times()
    return float(times.user + times.system)


def said_events(node: Node) -> str:
    return (Path(node.me["home"]) / "logs" / "node.log").read_text("utf-8")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    with running(tmp_path_factory.mktemp("pair"), 2) as nodes:
        assert answers(*nodes)
        yield nodes


JUNK = {
    "noise": secrets.token_bytes(30_000),
    "nothing": b"",
    "nested without end": b"\x91" * 400_000,
    "a map without a kind": b"\x80",
    "numbers for bytes": b"\x82\xa1t\xa5facts\xa1r\x93\x01\x02\x03",
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
async def test_junk_on_a_gossip_link_ends_that_link_and_the_mesh_goes_on(
    pair: list[Node], junk: bytes
) -> None:
    attacker = await Attacker.on(pair[0])

    async def send_junk(channel: Channel) -> None:
        while True:
            await channel.send(junk)

    await attacker.run(send_junk, SHORT_S)
    assert attacker.refused >= 1
    log_text = said_events(pair[0])
    assert "peer_cut_off" in log_text
    assert "Traceback" not in log_text
    assert await trio.to_thread.run_sync(others_live, pair)


def others_live(pair: list[Node]) -> bool:
    """Both see each other, whatever the attacker, whom the mesh knows as well, looks like."""
    names = {"node-1", "node-2"}
    return all(
        {one["name"]: one["state"] for one in node.status()["nodes"] if one["name"] in names}
        == dict.fromkeys(names, "live")
        for node in pair
    )


@pytest.mark.full
@pytest.mark.parametrize("per_message", [1, 100])
@pytest.mark.parametrize("new_each_time", [False, True], ids=["one key", "ever new keys"])
async def test_a_flood_of_forged_records_costs_its_neighbour_little(
    pair: list[Node], per_message: int, *, new_each_time: bool
) -> None:
    attacker = await Attacker.on(pair[0])
    attacker.new_each_time = new_each_time
    records = forged(attacker.me.mesh, 1000)
    batches = [
        encode_message(Push(records=tuple(records[n : n + per_message])))
        for n in range(0, len(records), per_message)
    ]
    sent = 0

    async def flood(channel: Channel) -> None:
        nonlocal sent
        started, here = trio.current_time(), 0
        while True:
            await channel.send(batches[here % len(batches)])
            here, sent = here + 1, sent + per_message
            await trio.sleep_until(started + here * per_message / FORGED_PER_S)

    before = cpu_s(pair[0])
    await trio.sleep(FLOOD_S)
    idle_s = cpu_s(pair[0]) - before
    responses: list[float] = []
    before = cpu_s(pair[0])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attacker.run, flood, FLOOD_S)
        await trio.sleep(FLOOD_S / 2)
        responses.append(await trio.to_thread.run_sync(time_models, pair[0]))
    share = (cpu_s(pair[0]) - before - idle_s) / FLOOD_S
    log.info(
        "flood_measured",
        cpu_share=round(share, 3),
        idle_share=round(idle_s / FLOOD_S, 3),
        links=attacker.links,
        refused=attacker.refused,
        sent=sent,
        response_s=responses,
    )
    assert share < CPU_SHARE_MAX
    assert attacker.refused >= 1
    assert max(responses) < 1
    assert await trio.to_thread.run_sync(others_live, pair)
    assert [ask(node).text for node in pair] == [ANSWER] * 2


async def peer_port_is_open_to(newcomer: Path, node: Node) -> None:
    """Another node can join at once, and is answered through it."""
    started = time.monotonic()
    joins = partial(start, newcomer, "--join", node.invite(), name="newcomer")
    joined = await trio.to_thread.run_sync(joins)
    try:
        assert time.monotonic() - started < JOIN_S_MAX
        assert (await trio.to_thread.run_sync(ask, joined)).text == ANSWER
    finally:
        await trio.to_thread.run_sync(end, joined)


async def test_silent_connections_lock_nobody_out(pair: list[Node], tmp_path: Path) -> None:
    with ExitStack() as stack:
        for _ in range(2 * UNAUTHENTICATED_MAX):
            stack.enter_context(connected(pair[0], "peer"))
        await peer_port_is_open_to(tmp_path / "newcomer", pair[0])


@pytest.mark.parametrize(
    "junk",
    [
        pytest.param(b"\x00" * 50, id="no TLS"),
        pytest.param(HALF_TLS + bytes(600), id="half TLS", marks=pytest.mark.full),  # 70 s
    ],
)
async def test_junk_from_the_address_of_a_member_does_not_lock_it_out(
    pair: list[Node], tmp_path: Path, junk: bytes
) -> None:
    before = said_events(pair[0]).count("connection_dropped")
    began_at = time.monotonic()
    for _ in range(2 * TROUBLE_BURST):
        await trio.to_thread.run_sync(throw, pair[0], "peer", junk)
    assert await trio.to_thread.run_sync(others_live, pair)
    logged = said_events(pair[0]).count("connection_dropped") - before
    assert logged <= time.monotonic() - began_at + 1
    await peer_port_is_open_to(tmp_path / "newcomer", pair[0])


# The longest message, in pieces of TLS that hold one byte each.
ONE_BY_ONE = b"\x82\xff" + MESSAGE_BYTES_MAX.to_bytes(8) + bytes(4 + MESSAGE_BYTES_MAX)
FRAMES = {
    "pings": (b"\x89\x80" + bytes(4)) * 5000,
    "pongs": (b"\x8a\x80" + bytes(4)) * 5000,
    "long pings": (b"\x89\xfd" + bytes(4 + 125)) * 500,
    "empty pieces": b"\x02\x80" + bytes(4) + (b"\x00\x80" + bytes(4)) * 5000,
    "a byte at a time": ONE_BY_ONE,
}


@pytest.mark.full
@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
async def test_a_flood_below_the_messages_costs_its_neighbour_little(
    pair: list[Node], frames: bytes
) -> None:
    attacker = await Attacker.on(pair[0])

    async def flood(channel: Channel) -> None:
        assert isinstance(channel, WebSocketChannel)
        step = 1 if frames is ONE_BY_ONE else len(frames)
        with link_errors("the node hung up"):
            while True:
                for begin in range(0, len(frames), step):
                    await channel._stream.send_all(frames[begin : begin + step])

    before = cpu_s(pair[0])
    await attacker.run(flood, FLOOD_S)
    share = (cpu_s(pair[0]) - before) / FLOOD_S
    log.info("flood_measured", cpu_share=round(share, 3), links=attacker.links)
    assert share < CPU_SHARE_MAX
    assert await trio.to_thread.run_sync(others_live, pair)
    assert [ask(node).text for node in pair] == [ANSWER] * 2


def time_models(node: Node) -> float:
    """How long the node takes to say what it serves, in seconds."""
    started = time.monotonic()
    with urllib.request.urlopen(f"{node.api}/models", timeout=10) as reply:
        assert json.load(reply)["data"]
    return time.monotonic() - started

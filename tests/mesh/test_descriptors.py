"""A node with few descriptors, and many connections that want them all."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from p2pmesh.config import parse_address
from p2pmesh.errors import MeshError
from p2pmesh.identity.hello import HTTP
from p2pmesh.identity.keys import NodeId, parse_id
from p2pmesh.node.descriptors import raise_limit
from p2pmesh.node.presence import LOOK_INTERVAL_S
from p2pmesh.transport.tls import TlsTransport
from tests.mesh.hostile import ANSWER, ask, connected, held, identity_in
from tests.mesh.nodes import Node, end, start

WATCHED_S = 2 * LOOK_INTERVAL_S + 1  # two measurements, and the engine's health often

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")


def assert_stays_well(node: Node, limit: int) -> None:
    """It measures, answers, and has descriptors left."""
    until = time.monotonic() + WATCHED_S
    while time.monotonic() < until:
        assert node.process.poll() is None, node.said()
        assert ask(node).text == ANSWER
        assert held(node).descriptors < limit - 16
        time.sleep(0.5)
    log = (Path(node.me["home"]) / "logs" / "node.log").read_text("utf-8")
    assert "Too many open files" not in log + node.said()
    assert "machine_not_measured" not in log


@pytest.mark.full
def test_idle_connections_do_not_take_the_descriptors_of_a_node_with_few(tmp_path: Path) -> None:
    node = start(tmp_path / "home", descriptors=256)
    try:
        with ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(connected(node, "api"))
            assert_stays_well(node, 256)
    finally:
        end(node)


@pytest.mark.full
async def test_streams_of_a_member_and_idle_connections_together_leave_a_reserve(
    tmp_path: Path,
) -> None:
    assert raise_limit() > 1200, "this process opens more than it lets the node have"
    node = await trio.to_thread.run_sync(lambda: start(tmp_path / "home", descriptors=1024))
    try:
        me = await identity_in(node)
        transport = TlsTransport(lambda: me, [])
        streams: list[trio.abc.Stream] = []
        with ExitStack() as stack:
            for _ in range(300):
                try:
                    streams.append(
                        await transport.open_stream(
                            parse_address(node.me["peer"]),
                            HTTP,
                            expected=NodeId(parse_id(node.me["id"])),
                        )
                    )
                except MeshError:
                    break  # the node need not take them all
            for _ in range(760):
                stack.enter_context(connected(node, "api"))
            await trio.to_thread.run_sync(assert_stays_well, node, 1024)
        for stream in streams:
            await trio.aclose_forcefully(stream)
    finally:
        await trio.to_thread.run_sync(end, node)

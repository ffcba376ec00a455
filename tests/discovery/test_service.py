from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_interface

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from p2pmesh.discovery import service
from p2pmesh.discovery.beacon import DISCOVERY_PORT
from p2pmesh.discovery.heard import QUERY_INTERVAL_S
from p2pmesh.discovery.onlink import Interface
from p2pmesh.discovery.service import ADMITTED_MAX, Discovery
from tests.discovery.networks import LOOPBACK, announcement, free_port, node_id, query

HOME = announcement("kitchen")
PRIVATE = announcement("kitchen", is_open=False)


def discovery(
    me: str,
    port: int,
    *,
    usable: Callable[[], Sequence[Interface]] = lambda: [LOOPBACK],
) -> Discovery:
    return Discovery(node_id(me), me, 9338, interfaces=usable, discovery_port=port, with_mdns=False)


@asynccontextmanager
async def running(*all_of_them: Discovery) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for one in all_of_them:
            await nursery.start(one.run)
        yield
        nursery.cancel_scope.cancel()


async def until(one: Discovery, is_so: Callable[[], object]) -> None:
    with trio.fail_after(5):
        seen = -1
        while not is_so():
            seen = await one.changes.wait(seen)


def meshes(one: Discovery) -> list[str]:
    return [mesh.name for mesh in one.heard.meshes(trio.current_time())]


def waiting(one: Discovery) -> list[str]:
    return [node.name for node in one.heard.waiting(trio.current_time())]


async def test_a_newcomer_hears_an_open_mesh_and_is_seen_to_wait() -> None:
    port = free_port()
    kitchen, desk = discovery("kitchen", port), discovery("desk", port)
    kitchen.announce(HOME)
    async with running(kitchen, desk):
        started = trio.current_time()
        await until(desk, lambda: meshes(desk) == ["home"])
        assert trio.current_time() - started < 1
        assert desk.heard.addresses(HOME.mesh, trio.current_time())[0].host == "127.0.0.1"
        await until(kitchen, lambda: waiting(kitchen) == ["desk"])
        assert kitchen.heard.newcomers(trio.current_time()) == [node_id("desk")]
        assert meshes(kitchen) == []


async def test_what_is_announced_later_is_said_at_once() -> None:
    port = free_port()
    kitchen, desk = discovery("kitchen", port), discovery("desk", port)
    async with running(kitchen, desk):
        kitchen.announce(HOME)
        started = trio.current_time()
        await until(desk, lambda: meshes(desk) == ["home"])
        assert trio.current_time() - started < 1


async def test_a_private_mesh_is_heard_by_those_only_whom_somebody_let_in() -> None:
    port = free_port()
    kitchen, desk, lamp = (discovery(name, port) for name in ("kitchen", "desk", "lamp"))
    kitchen.announce(PRIVATE)
    kitchen.admit(node_id("desk"))
    async with running(kitchen, lamp, desk):
        await until(desk, lambda: meshes(desk) == ["home"])
        assert [mesh.open for mesh in desk.heard.meshes(trio.current_time())] == [False]
        await until(kitchen, lambda: set(waiting(kitchen)) == {"desk", "lamp"})
        assert meshes(lamp) == []


def test_who_is_answered() -> None:
    one = discovery("kitchen", 1)
    assert one._answer(query("desk")) is None, "it has no mesh"
    one.announce(HOME)
    assert one._answer(query("desk")) == HOME
    assert one._answer(query("desk", announcement("x", mesh="other").mesh)) is None
    assert one._answer(query("desk", HOME.mesh)) is None
    one.announce(PRIVATE)
    assert one._answer(query("desk")) is None
    one.admit(node_id("desk"))
    assert one._answer(query("desk")) == PRIVATE
    assert one._answer(query("desk", announcement("x", mesh="other").mesh)) == PRIVATE
    assert one._answer(query("desk", HOME.mesh)) is None, "it is in"
    assert one._answer(query("lamp")) is None


def test_those_let_in_are_bounded() -> None:
    one = discovery("kitchen", 1)
    one.announce(PRIVATE)
    for n in range(ADMITTED_MAX + 1):
        one.admit(node_id(f"n{n}"))
    assert one._answer(query("n0")) is None
    assert one._answer(query("n1")) == PRIVATE
    assert one._answer(query(f"n{ADMITTED_MAX}")) == PRIVATE


async def test_a_node_asks_while_it_seeks(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    desk, sent = discovery("desk", free_port()), list[object]()
    monkeypatch.setattr(desk._beacon, "send", sent.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk._repeat_query)
        await trio.sleep(1)
        assert sent == [query("desk")] * 3, "the first ones come fast"
        desk.announce(announcement("desk", mesh="other"))
        await trio.sleep(QUERY_INTERVAL_S)
        assert sent[3:] == [query("desk", announcement("desk", mesh="other").mesh)]
        desk.seek(on=False)
        await trio.sleep(10 * QUERY_INTERVAL_S)
        assert len(sent) == 4
        desk.seek(on=True)
        await trio.sleep(1)
        assert len(sent) == 7
        desk.start_anew()
        await trio.sleep(1)
        assert len(sent) == 10
        nursery.cancel_scope.cancel()


async def test_on_another_network_nothing_of_the_last_one_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "INTERFACES_EVERY_S", 0.02)
    port, found = free_port(), [LOOPBACK]
    kitchen, desk = discovery("kitchen", port), discovery("desk", port, usable=lambda: list(found))
    kitchen.announce(HOME)
    async with running(kitchen, desk):
        await until(desk, lambda: meshes(desk) == ["home"])
        found[0] = Interface("eth9", 9, addresses=(ip_interface("192.0.2.5/24"),))
        await until(desk, lambda: meshes(desk) == [])
        found[0] = LOOPBACK
        await until(desk, lambda: meshes(desk) == ["home"])
        kitchen.announce(None)
        desk.start_anew()
        assert meshes(desk) == []


async def test_interfaces_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "INTERFACES_EVERY_S", 0.02)
    port = free_port()
    found: list[Interface] = []
    reads = 0

    def usable() -> list[Interface]:
        nonlocal reads
        reads += 1
        if reads == 2:
            raise OSError("the system does not say")
        return list(found)

    kitchen, desk = discovery("kitchen", port, usable=usable), discovery("desk", port)
    with capture_logs() as logged:
        async with running(kitchen, desk):
            kitchen.announce(HOME)
            found.append(LOOPBACK)
            await until(desk, lambda: meshes(desk) == ["home"])
            assert reads > 2
    assert "interfaces_unreadable" in [entry["event"] for entry in logged]


async def test_before_it_runs_nothing_is_opened() -> None:
    """So `--no-discovery` is to run nothing."""
    port = free_port()
    one = discovery("kitchen", port)
    one.announce(HOME)
    one.admit(node_id("desk"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as foreign:
        foreign.bind(("", port))
        assert foreign.getsockname()[1] == port
    assert DISCOVERY_PORT == 9338

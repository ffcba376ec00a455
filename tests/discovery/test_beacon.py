from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_interface

import pytest
import trio
import trio.lowlevel
from structlog.testing import capture_logs

from p2pmesh.discovery.announcement import (
    DATAGRAM_BYTES_MAX,
    MAGIC,
    Announcement,
    Query,
    read_datagram,
)
from p2pmesh.discovery.beacon import ANSWERS_BURST, GROUP, SOURCE_BURST, Beacon
from p2pmesh.discovery.onlink import Interface
from tests.discovery.networks import (
    LOOPBACK,
    TO_ALL,
    announcement,
    free_port,
    node_id,
    query,
    talker,
)

HOME = announcement("kitchen")


class Ear:
    """What a beacon heard, to be waited for."""

    def __init__(self) -> None:
        self.heard: list[tuple[Announcement | Query, str]] = []
        self._more = trio.Event()

    def __call__(self, said: Announcement | Query, host: str) -> None:
        self.heard.append((said, host))
        self._more.set()

    async def until(self, is_enough: Callable[[], bool]) -> None:
        with trio.fail_after(5):
            while not is_enough():
                await self._more.wait()
                self._more = trio.Event()

    async def first(self) -> tuple[Announcement | Query, str]:
        await self.until(lambda: bool(self.heard))
        return self.heard[0]


def received(opened: socket.socket) -> list[bytes]:
    """All that has arrived at a socket."""
    opened.setblocking(False)
    found = []
    with suppress(BlockingIOError):
        while True:
            found.append(opened.recvfrom(2048)[0])
    return found


@asynccontextmanager
async def beacon(
    me: str,
    port: int,
    ear: Ear,
    *,
    answer: Callable[[Query], Announcement | None] = lambda _: None,
    interfaces: Sequence[Interface] = (LOOPBACK,),
) -> AsyncIterator[Beacon]:
    one = Beacon(node_id(me), heard=ear, is_known=lambda _: False, answer=answer, port=port)
    one.use(interfaces)
    async with trio.open_nursery() as nursery:
        await nursery.start(one.run)
        yield one
        nursery.cancel_scope.cancel()


async def test_nodes_on_one_machine_share_the_port_and_hear_each_other() -> None:
    port, kitchen, desk = free_port(), Ear(), Ear()
    async with beacon("kitchen", port, kitchen) as one, beacon("desk", port, desk) as two:
        one.send(HOME)
        assert await desk.first() == (HOME, "127.0.0.1")
        two.send(query("desk"))
        assert await kitchen.first() == (query("desk"), "127.0.0.1")
    assert len(kitchen.heard) == 1, "a node does not hear itself"


async def test_a_query_is_answered_at_once_and_to_the_one_who_asks() -> None:
    port, kitchen, desk, lamp = free_port(), Ear(), Ear(), Ear()
    async with (
        beacon("kitchen", port, kitchen, answer=lambda _: HOME),
        beacon("desk", port, desk) as asking,
        beacon("lamp", port, lamp),
    ):
        asking.send(query("desk"))
        assert await desk.first() == (HOME, "127.0.0.1")
        assert await lamp.first() == (query("desk"), "127.0.0.1")
    assert len(lamp.heard) == 1


async def test_answers_are_few_and_small_however_often_one_asks() -> None:
    port, kitchen = free_port(), Ear()
    answered = []

    def answer(asked: Query) -> Announcement:
        answered.append(asked)
        return HOME

    async with beacon("kitchen", port, kitchen, answer=answer):
        with talker() as stranger:
            for n in range(100):
                stranger.sendto(query(f"n{n}").to_datagram(), (TO_ALL, port))
            await kitchen.until(lambda: len(kitchen.heard) >= SOURCE_BURST)
            await trio.testing.wait_all_tasks_blocked(0.05)
            answers = received(stranger)
    assert 0 < len(answers) <= ANSWERS_BURST + 1
    assert all(read_datagram(data) == HOME for data in answers)
    assert len(answers[0]) < 2 * len(query("n0").to_datagram())
    assert len(answered) <= SOURCE_BURST + 1


async def test_ten_thousand_junk_datagrams_cost_almost_nothing() -> None:
    port, ear = free_port(), Ear()
    async with beacon("desk", port, ear):
        with talker() as stranger:
            stranger.setblocking(False)
            cpu_s = 0.0
            for n in range(100):
                junk = (os.urandom(100), MAGIC + os.urandom(100), b"x" * 1400)[n % 3]
                for _ in range(100):
                    stranger.sendto(junk, (TO_ALL, port))
                started = time.thread_time()
                await trio.testing.wait_all_tasks_blocked()
                cpu_s += time.thread_time() - started
            assert cpu_s < 0.5
        # The flood's address is out of words for a moment; then it is heard again.
        with trio.fail_after(10), talker() as friend:
            while not ear.heard:
                friend.sendto(HOME.to_datagram(), (TO_ALL, port))
                await trio.sleep(0.05)
    assert ear.heard[0] == (HOME, "127.0.0.1")


@pytest.mark.parametrize(
    "junk",
    [b"", MAGIC, MAGIC * 40, b"x" * 1000, MAGIC + b"x" * DATAGRAM_BYTES_MAX, MAGIC + b"\x81\xa1"],
)
async def test_junk_is_not_heard(junk: bytes) -> None:
    port, ear = free_port(), Ear()
    async with beacon("kitchen", port, ear):
        with talker() as stranger:
            stranger.sendto(junk, (TO_ALL, port))
            stranger.sendto(HOME.to_datagram()[:-1], (TO_ALL, port))
            stranger.sendto(announcement("other").to_datagram(), (TO_ALL, port))
            assert await ear.first() == (announcement("other"), "127.0.0.1")


async def test_what_does_not_come_from_the_link_is_not_heard() -> None:
    port, ear, there = free_port(), Ear(), Ear()
    elsewhere = Interface("eth9", 9, addresses=(ip_interface("192.0.2.5/24"),))
    async with (
        beacon("kitchen", port, ear, answer=lambda _: HOME, interfaces=[elsewhere]),
        beacon("desk", port, there),
    ):
        with talker() as stranger:
            stranger.sendto(query("x").to_datagram(), (TO_ALL, port))
            await there.first()
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert received(stranger) == []
    assert ear.heard == []


async def test_an_interface_that_fails_stops_no_other() -> None:
    """Also one that is new: it was not there when the beacon began."""
    gone = Interface("gone0", 4242, addresses=tuple(map(ip_interface, ["fe80::1/64"])))
    port, desk = free_port(), Ear()
    with capture_logs() as logged:
        async with (
            beacon("kitchen", port, Ear(), interfaces=[]) as one,
            beacon("desk", port, desk),
        ):
            one.send(HOME)
            one.use([gone, LOOPBACK])
            for _ in range(20):
                one.send(HOME)
            assert await desk.first() == (HOME, "127.0.0.1")
            one.use([])
    about = [entry for entry in logged if entry.get("interface") == "gone0"]
    assert len(about) <= 1


async def test_a_port_that_a_foreign_program_holds_leaves_the_rest() -> None:
    """Without the port no announcements are heard, but queries are answered."""
    port, desk = free_port(), Ear()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as foreign:
        foreign.settimeout(5)
        foreign.bind(("", port))
        with capture_logs() as logged:
            async with beacon("desk", port, desk) as asking:
                asking.send(query("desk"))
                data, source = foreign.recvfrom(2048)
                assert read_datagram(data) == query("desk")
                foreign.sendto(HOME.to_datagram(), source)
                assert await desk.first() == (HOME, "127.0.0.1")
    warnings = [entry for entry in logged if entry["event"] == "beacon_not_opened"]
    assert {(entry["ip"], entry["port"]) for entry in warnings} >= {("IPv4", port)}


async def test_without_ipv6_discovery_goes_on_with_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def without_ipv6(family: int, kind: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return real(family, kind)

    port, desk = free_port(), Ear()
    monkeypatch.setattr("p2pmesh.discovery.beacon.socket.socket", without_ipv6)
    with capture_logs() as logged:
        async with beacon("kitchen", port, Ear()) as one, beacon("desk", port, desk):
            one.send(HOME)
            assert await desk.first() == (HOME, "127.0.0.1")
    assert {entry.get("ip") for entry in logged} == {"IPv6"}


async def test_nothing_is_open_before_and_after() -> None:
    port = free_port()
    one = Beacon(
        node_id("a"), heard=Ear(), is_known=lambda _: True, answer=lambda _: None, port=port
    )
    one.use([LOOPBACK])
    one.send(HOME)
    with trio.move_on_after(0):
        await one.run()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as foreign:
        foreign.bind(("", port))
        assert foreign.getsockname()[1] == port


def test_the_group_stays_on_the_link() -> None:
    """A transient, link-local multicast group, with an id for groups that nobody assigned."""
    packed = socket.inet_pton(socket.AF_INET6, GROUP)
    assert packed[:2] == b"\xff\x12"
    assert packed[12] & 0x80

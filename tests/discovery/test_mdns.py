from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from ipaddress import ip_interface
from typing import Any, cast

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs
from zeroconf import IPVersion, ServiceInfo, Zeroconf

from p2pmesh.discovery import mdns
from p2pmesh.discovery.announcement import Announcement
from p2pmesh.discovery.mdns import INBOX_MAX, KNOWN_MAX, SERVICE_TYPE, Inbox, Mdns
from p2pmesh.discovery.onlink import Interface
from p2pmesh.identity.keys import show_id
from tests.discovery.networks import LOOPBACK, announcement, node_id

PATIENCE_S = 10


class Ear:
    """What mDNS heard, to be waited for."""

    def __init__(self) -> None:
        self.heard: list[tuple[Announcement, str]] = []
        self._more = trio.Event()

    def __call__(self, said: Announcement, host: str) -> None:
        self.heard.append((said, host))
        self._more.set()

    async def until(self, said: Announcement, host: str = "127.0.0.1") -> None:
        with trio.fail_after(PATIENCE_S):
            while (said, host) not in self.heard:
                await self._more.wait()
                self._more = trio.Event()


class Known(dict[str, tuple[Announcement, list[str]]]):
    """The services that are held, with a way to wait until one is gone."""

    def __init__(self) -> None:
        super().__init__()
        self._popped = trio.Event()

    def pop(self, *args: Any) -> Any:
        self._popped.set()
        return super().pop(*args)

    async def until_gone(self, name: str) -> None:
        with trio.fail_after(PATIENCE_S):
            while name in self:
                self._popped = trio.Event()
                await self._popped.wait()


@asynccontextmanager
async def running(one: Mdns, *interfaces: Interface) -> AsyncIterator[Mdns]:
    one.use(interfaces or (LOOPBACK,))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        yield one
        nursery.cancel_scope.cancel()


def instance(node: str) -> str:
    return f"{show_id(node_id(node))}.{SERVICE_TYPE}"


def service(said: Announcement, address: str, **changes: object) -> ServiceInfo:
    name = f"{show_id(said.node)}.{SERVICE_TYPE}"
    fields = {
        "port": said.port,
        "properties": said.to_properties(),
        "server": f"{show_id(said.node)}.local.",
        "parsed_addresses": [address],
    }
    return ServiceInfo(SERVICE_TYPE, name, **{**fields, **changes})  # type: ignore[arg-type]


async def register(opened: Zeroconf, info: ServiceInfo) -> None:
    call = partial(opened.register_service, info, cooperating_responders=True)
    await trio.to_thread.run_sync(call)


async def test_nodes_hear_each_other_and_what_changes() -> None:
    ear, echo = Ear(), Ear()
    kitchen, desk = Mdns(node_id("kitchen"), heard=echo), Mdns(node_id("desk"), heard=ear)
    desk._known = desk_knows = Known()
    first = announcement("kitchen")
    kitchen.say(first)
    async with running(kitchen), running(desk):
        await ear.until(first)
        changed = replace(first, mesh_name="casa", port=9400)
        kitchen.say(changed)
        await ear.until(changed)
        desk.say(announcement("desk"))
        await echo.until(announcement("desk"))
        kitchen.say(None)
        await desk_knows.until_gone(instance("kitchen"))
        kitchen.say(first)
        await ear.until(first)
    assert {said.node for said, _ in echo.heard} == {node_id("desk")}


async def test_an_end_takes_a_moment_only_and_says_good_bye() -> None:
    ear = Ear()
    kitchen, desk = Mdns(node_id("kitchen2"), heard=Ear()), Mdns(node_id("desk2"), heard=ear)
    desk._known = desk_knows = Known()
    said = announcement("kitchen2")
    kitchen.say(said)
    async with running(desk):
        async with running(kitchen):
            await ear.until(said)
            started = time.monotonic()
        assert time.monotonic() - started < mdns.CLOSE_S
        await desk_knows.until_gone(instance("kitchen2"))
    assert not any(thread.name.startswith("zeroconf-Serv") for thread in threading.enumerate())


async def test_mdns_pauses_while_it_costs_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, pauses = list[Zeroconf](), trio.Event()
    token, really = trio.lowlevel.current_trio_token(), mdns._open

    def open_(interfaces: Sequence[Interface]) -> Zeroconf:
        opened.append(really(interfaces))
        if len(opened) == 2:
            token.run_sync_soon(pauses.set)
        return opened[-1]

    monkeypatch.setattr(mdns, "_open", open_)
    monkeypatch.setattr(mdns, "BUSY_MAX", -1.0)
    monkeypatch.setattr(mdns, "BUSY_CHECK_S", 0.01)
    monkeypatch.setattr(mdns, "BUSY_PAUSE_S", 0.01)
    with capture_logs() as logged, trio.fail_after(PATIENCE_S):
        async with running(Mdns(node_id("desk7"), heard=Ear())):
            await pauses.wait()
    assert "mdns_paused" in [entry["event"] for entry in logged]
    assert all(each.done for each in opened)


async def test_an_idle_mdns_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns, "BUSY_CHECK_S", 0.1)
    ear = Ear()
    kitchen, desk = Mdns(node_id("kitchen8"), heard=Ear()), Mdns(node_id("desk8"), heard=ear)
    with capture_logs() as logged:
        async with running(desk), running(kitchen):
            await trio.sleep(0.3)  # three checks
            kitchen.say(announcement("kitchen8"))
            await ear.until(announcement("kitchen8"))
    assert logged == []


async def test_an_end_while_it_opens_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opening, may_open, closed = trio.Event(), threading.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    class Slow:
        def close(self) -> None:
            closed.set()

    def open_slowly(interfaces: object) -> Slow:
        token.run_sync_soon(opening.set)
        assert may_open.wait(PATIENCE_S)
        return Slow()

    monkeypatch.setattr(mdns, "_open", open_slowly)
    async with running(Mdns(node_id("desk6"), heard=Ear())):
        await opening.wait()
        may_open.set()
    assert closed.is_set()


async def test_forged_services_are_not_heard_and_harm_nothing() -> None:
    ear = Ear()
    true = announcement("true")
    forged = [
        service(announcement("far"), "192.0.2.9"),
        service(announcement("v6"), "2001:db8::9"),
        service(announcement("port"), "127.0.0.1", port=0),
        service(announcement("txt"), "127.0.0.1", properties={b"node": b"\xff"}),
        service(announcement("none"), "127.0.0.1", properties={}),
        service(announcement("other"), "127.0.0.1", properties=true.to_properties()),
    ]
    async with running(Mdns(node_id("desk3"), heard=ear)):
        liar = await trio.to_thread.run_sync(
            lambda: Zeroconf(["127.0.0.1"], ip_version=IPVersion.V4Only)
        )
        try:
            async with trio.open_nursery() as nursery:
                for info in forged:
                    nursery.start_soon(register, liar, info)
            await register(liar, service(true, "127.0.0.1"))
            await ear.until(true)
        finally:
            await trio.to_thread.run_sync(liar.close)
    assert {(said.node, host) for said, host in ear.heard} == {(true.node, "127.0.0.1")}


async def test_names_that_are_no_id_are_not_even_looked_up() -> None:
    inbox = Inbox()
    for junk in ("\x1b[2J", "a" * 25, "a" * 27, "A" * 26, "1" * 26, "a" * 26 + "\n", ""):
        inbox.put(f"{junk}.{SERVICE_TYPE}", is_there=True)
    inbox.put(f"{'a' * 26}._http._tcp.local.", is_there=True)
    inbox.put(instance("true"), is_there=True)
    assert await inbox.take() == (instance("true"), True)
    assert inbox._changes == {}


async def test_the_inbox_is_bounded_and_wakes_trio_once_for_many() -> None:
    inbox, woken = Inbox(), []
    inbox._filled.notify = lambda: woken.append(1)  # type: ignore[method-assign]

    def flood() -> None:
        for n in range(10_000):
            inbox.put(instance(f"n{n}"), is_there=True)
        inbox.put(instance("n9999"), is_there=False)
        inbox.put(instance("true"), is_there=True)

    await trio.to_thread.run_sync(flood)
    await trio.testing.wait_all_tasks_blocked()
    assert woken == [1]
    taken = [await inbox.take() for _ in range(INBOX_MAX)]
    assert taken[0] == (instance("true"), True), "what came after a flood does not wait for it"
    assert taken[1] == (instance("n9999"), False), "the last state counts"
    assert inbox._changes == {}


async def test_after_trios_end_a_late_word_of_zeroconf_is_lost_quietly() -> None:
    made: list[Inbox] = []

    async def end_at_once() -> None:
        made.append(Inbox())

    await trio.to_thread.run_sync(trio.run, end_at_once)
    made[0].put(instance("late"), is_there=True)
    assert made[0]._changes == {instance("late"): True}


async def test_services_held_are_bounded_and_the_known_stay() -> None:
    ear = Ear()
    one = Mdns(node_id("desk4"), heard=ear)
    one._interfaces = (LOOPBACK,)
    one._known = {instance(f"n{n}"): (announcement(f"n{n}"), []) for n in range(KNOWN_MAX)}
    inbox = Inbox()
    inbox.put(instance("one more"), is_there=True)
    inbox.put(instance("n1"), is_there=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one._look_up, cast("Zeroconf", None), inbox)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert instance("one more") not in one._known
    assert len(one._known) == KNOWN_MAX - 1


@pytest.mark.parametrize("failure", [OSError("no multicast"), AssertionError(), ValueError("x")])
async def test_what_zeroconf_raises_is_logged_and_tried_again(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[object] = []
    token, enough = trio.lowlevel.current_trio_token(), trio.Event()

    def fail(interfaces: object) -> None:
        tries.append(interfaces)
        if len(tries) == 3:
            token.run_sync_soon(enough.set)
        raise failure

    monkeypatch.setattr(mdns, "_open", fail)
    monkeypatch.setattr(mdns, "RETRY_S", 0.01)
    with capture_logs() as logged, trio.fail_after(PATIENCE_S):
        async with running(Mdns(node_id("desk5"), heard=Ear())):
            await enough.wait()
    assert {entry["event"] for entry in logged} == {"mdns_failed"}
    assert len(logged) >= 2


def failing_zeroconf(refused: Callable[[IPVersion], bool]) -> Callable[..., object]:
    def open_(*, interfaces: list[object], ip_version: IPVersion, use_asyncio: bool) -> object:
        assert interfaces
        assert not use_asyncio
        if refused(ip_version):
            raise OSError(97, "Address family not supported by protocol")
        return ip_version

    return open_


@pytest.mark.parametrize(
    ("addresses", "without", "opened"),
    [
        (["10.0.0.5/24", "fe80::5/64"], [], IPVersion.All),
        (["10.0.0.5/24", "fe80::5/64"], [IPVersion.All], IPVersion.V4Only),
        (["10.0.0.5/24", "fe80::5/64"], [IPVersion.All, IPVersion.V4Only], IPVersion.V6Only),
        (["10.0.0.5/24"], [], IPVersion.V4Only),
        (["fe80::5/64"], [], IPVersion.V6Only),
    ],
)
def test_the_addresses_there_are_decide_what_is_opened(
    addresses: list[str],
    without: list[IPVersion],
    opened: IPVersion,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zeroconf.Zeroconf", failing_zeroconf(lambda asked: asked in without))
    one = Interface("eth0", 3, addresses=tuple(map(ip_interface, addresses)))
    got: object = mdns._open([one])
    assert got is opened


def test_where_nothing_can_be_opened_the_systems_reason_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zeroconf.Zeroconf", failing_zeroconf(lambda _: True))
    with pytest.raises(OSError, match="Address family"):
        mdns._open([LOOPBACK])


def test_zeroconf_is_imported_when_discovery_begins_and_not_before() -> None:
    code = (
        "import sys, p2pmesh.cli, p2pmesh.commands.up, p2pmesh.discovery.service\n"
        "assert 'zeroconf' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()

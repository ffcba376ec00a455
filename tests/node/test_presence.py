from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.config import Address
from p2pmesh.node import presence
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.presence import LOOK_INTERVAL_S, Own, Presence
from p2pmesh.wire.registers import CAPS, MEMBER
from tests.node.isolated_node import ENGINE, GIB, ME, Hearsay

HOME, CAFE = Address("192.168.1.20", 9338), Address("10.0.0.7", 9338)


class Laptop:
    """A machine that moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: tuple[Address, ...] = (HOME,)
        self.broken = False
        monkeypatch.setattr(presence, "advertised", self._advertised)

    def _advertised(self, _: Address) -> tuple[Address, ...]:
        if self.broken:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self.addresses


def present(hearsay: Hearsay, logs: Path, speed: Callable[[], int] = lambda: 0) -> Presence:
    own = Own(
        name="laptop",
        listening=Address("0.0.0.0", 9338),
        memory_bytes=GIB,
        engine=ENGINE,
        engines=EngineManager(ENGINE, logs=logs),
        memory_mib_per_s=speed,
    )
    return Presence(hearsay.mesh, own)


async def test_a_laptop_that_moves_tells_its_new_addresses(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    laptop, hearsay = Laptop(monkeypatch), Hearsay()
    async with trio.open_nursery() as nursery:
        await nursery.start(present(hearsay, tmp_path).run)
        me = hearsay.mesh.view.nodes[ME]
        assert (me.member.name, me.member.addresses) == ("laptop", (HOME,))
        assert me.caps is not None
        assert me.caps.budget_bytes == GIB
        laptop.addresses = (CAFE, HOME)
        assert hearsay.mesh.view.nodes[ME].member.addresses == (HOME,)
        await trio.sleep(LOOK_INTERVAL_S + 0.1)
        assert hearsay.mesh.view.nodes[ME].member.addresses == (CAFE, HOME)
        nursery.cancel_scope.cancel()


async def test_addresses_that_stay_are_told_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Laptop(monkeypatch)
    hearsay = Hearsay()
    async with trio.open_nursery() as nursery:
        await nursery.start(present(hearsay, tmp_path).run)
        told: list[str] = []
        monkeypatch.setattr(hearsay.mesh, "publish", lambda register, _: told.append(register))
        await trio.sleep(10 * LOOK_INTERVAL_S + 0.1)
        assert MEMBER not in told
        assert told == 10 * [CAPS]
        nursery.cancel_scope.cancel()


async def test_the_speed_of_the_memory_is_told_once_it_is_known(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Laptop(monkeypatch)
    hearsay, known = Hearsay(), [0]
    async with trio.open_nursery() as nursery:
        await nursery.start(present(hearsay, tmp_path, lambda: known[0]).run)
        known[0] = 24_576
        await trio.sleep(LOOK_INTERVAL_S + 0.1)
        caps = hearsay.mesh.view.nodes[ME].caps
        assert caps is not None
        assert caps.memory_mib_per_s == 24_576
        nursery.cancel_scope.cancel()


async def test_a_look_that_fails_leaves_what_was_said_last(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    laptop, hearsay = Laptop(monkeypatch), Hearsay()
    async with trio.open_nursery() as nursery:
        await nursery.start(present(hearsay, tmp_path).run)
        laptop.broken, laptop.addresses = True, (CAFE,)
        with structlog.testing.capture_logs() as logs:
            await trio.sleep(LOOK_INTERVAL_S + 0.1)
        assert [log["event"] for log in logs] == ["machine_not_measured"]
        assert hearsay.mesh.view.nodes[ME].member.addresses == (HOME,)
        laptop.broken = False
        await trio.sleep(LOOK_INTERVAL_S)
        assert hearsay.mesh.view.nodes[ME].member.addresses == (CAFE,)
        nursery.cancel_scope.cancel()


async def test_a_goodbye_is_said_once_and_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Laptop(monkeypatch)
    hearsay = Hearsay()
    presence = present(hearsay, tmp_path)
    assert not hearsay.mesh.view.nodes[ME].member.left
    presence.say_goodbye()
    await wait_all_tasks_blocked()
    assert hearsay.mesh.view.nodes[ME].member.left
    assert hearsay.mesh.view.nodes[ME].member.addresses == (HOME,)

"""The real shell in numbers: twenty nodes on one network in memory, on the tests' own clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.gossip.events import Health
from p2pmesh.gossip.overlay import Overlay
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.registers import Caps
from p2pmesh.transport.base import SEND_TIMEOUT_S
from p2pmesh.wire.registers import CAPS, MEMBER
from tests.node.meshes import Meshes, Started, meshes
from tests.state.builders import NOW, member

COUNT = 20
JOIN_S = 15.0
REMOVAL_S = 6.0
STEP_S = 0.1
TIMERS_MAX = 8  # a node's timers that run at the same time


@asynccontextmanager
async def twenty() -> AsyncIterator[tuple[Meshes, list[Started]]]:
    """All join by way of the first, at the same moment."""
    async with meshes() as world:
        everybody = [await world.start(number) for number in range(1, COUNT + 1)]
        await within(JOIN_S, lambda: alike(everybody))
        await within(
            JOIN_S, lambda: all(neighbours(one, everybody) <= one.mesh.linked for one in everybody)
        )
        yield world, everybody


async def within(seconds: float, true: Callable[[], bool]) -> float:
    """Wait until it is so; returns how long it took."""
    started = trio.current_time()
    while not true():
        assert trio.current_time() - started < seconds
        await trio.sleep(STEP_S)
    return trio.current_time() - started


def fingerprints(everybody: Iterable[Started]) -> set[bytes]:
    return {one.mesh._core.document.fingerprint for one in everybody}


def alike(everybody: list[Started]) -> bool:
    """All know all of them, and the same of each."""
    ids = {one.mesh.me for one in everybody}
    known = all(one.mesh.view.nodes.keys() >= ids for one in everybody)
    return known and len(fingerprints(everybody)) == 1


def neighbours(one: Started, everybody: Iterable[Started]) -> frozenset[NodeId]:
    """Whom it should be linked with for good."""
    population = frozenset((other.mesh.me, True) for other in everybody)
    return Overlay(population).neighbours(one.mesh.me)


def names(one: Started) -> set[str]:
    return {view.member.name for view in one.mesh.view.nodes.values()}


def removed(everybody: Iterable[Started]) -> set[frozenset[NodeId]]:
    return {one.mesh.dead for one in everybody}


@pytest.mark.full
async def test_twenty_that_know_one_of_them_become_one_mesh(autojump_clock: MockClock) -> None:
    async with twenty() as (_, everybody):
        await trio.sleep(40)  # links that were needed for joining only are given up
        assert alike(everybody)
        for one in everybody:
            assert names(one) == {f"node-{number}" for number in range(1, COUNT + 1)}
            assert one.mesh.dead == frozenset()
            assert {one.mesh.health(other.mesh.me) for other in everybody} == {Health.LIVE}
            assert not one.mesh.catching_up
            assert one.mesh.linked == neighbours(one, everybody)
            assert len(one.mesh.linked) <= 10
            assert one.mesh._nursery is not None
            assert len(one.mesh._nursery.child_tasks) <= TIMERS_MAX


async def test_an_update_reaches_all_at_once(autojump_clock: MockClock) -> None:
    async with twenty() as (_, everybody):
        speaker = everybody[7]
        caps = Caps(budget_bytes=4 << 30, engine="embedded", rpc="")
        seen = {one.mesh.me: one.mesh.changes.count for one in everybody}
        speaker.mesh.publish(CAPS, caps.to_wire())
        await wait_all_tasks_blocked()
        for one in everybody:
            assert one.mesh.view.nodes[speaker.mesh.me].caps == caps
            assert one.mesh.changes.count > seen[one.mesh.me]
        assert alike(everybody)


async def test_one_that_crashes_is_removed_by_all_with_the_same_evidence(
    autojump_clock: MockClock,
) -> None:
    async with twenty() as (world, everybody):
        victim, *others = everybody
        await world.crash(victim)
        await within(REMOVAL_S, lambda: removed(others) == {frozenset({victim.mesh.me})})
        for one in others:
            certificate = one.mesh._core.document.certificate(victim.mesh.me)
            assert certificate is not None
            assert len(certificate.accusers) >= 4
            assert victim.mesh.me in one.mesh.view.nodes, "its record lives as long as its lease"
            assert one.mesh.health(victim.mesh.me) is Health.DEAD
        again = await world.start(1, instance=50, epoch=NOW + 100, seeds=(others[0].address,))
        await within(REMOVAL_S, lambda: removed([*others, again]) == {frozenset()})
        await within(REMOVAL_S, lambda: alike([*others, again]))


async def test_one_that_says_goodbye_is_gone_at_once_and_accused_by_nobody(
    autojump_clock: MockClock,
) -> None:
    async with twenty() as (_, everybody):
        *others, leaver = everybody
        leaver.mesh.publish(MEMBER, member("node-20", addresses=(), left=True).to_wire())
        await leaver.mesh.finish(deadline_s=1)
        leaver.scope.cancel()
        await wait_all_tasks_blocked()
        assert not any(leaver.mesh.me in one.mesh.view.nodes for one in others)
        await trio.sleep(REMOVAL_S)
        assert removed(others) == {frozenset()}
        assert len(fingerprints(others)) == 1


async def test_a_link_that_takes_nothing_is_given_up_and_nobody_is_removed_for_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(data: bytes) -> None:
        await trio.sleep_forever()

    async with twenty() as (_, everybody):
        one = everybody[3]
        links = one.mesh._links._links
        node = min(neighbours(one, everybody))
        stuck = links[node]
        channel = stuck._channel
        websocket = channel._websocket  # type: ignore[attr-defined]
        monkeypatch.setattr(websocket._stream, "send_all", hang)
        took_s = await within(SEND_TIMEOUT_S + 5, lambda: links.get(node) not in (None, stuck))
        assert took_s > 1
        await trio.sleep(REMOVAL_S)
        assert one.mesh.health(node) is Health.LIVE
        assert removed(everybody) == {frozenset()}
        assert alike(everybody)

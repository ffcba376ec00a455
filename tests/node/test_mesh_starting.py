"""How a node comes to a mesh: when it is settled, whose clock is wrong, which life of it counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.config import Address
from p2pmesh.errors import LocalError
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.node.mesh import CLOCKS_WAIT_S, JUST_STARTED_S, SETTLE_MAX_S
from p2pmesh.wire.registers import CAPS
from tests.node.meshes import CAPS_BODY, SPREAD_S, budget, clock, meshes, peer_of
from tests.state.builders import NOW

# Settling


async def test_who_is_alone_is_settled_at_once(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first = await world.start(1)
        await wait_all_tasks_blocked()
        assert first.mesh.settled.is_set()
        assert first.mesh.me in first.mesh.view.nodes
        assert trio.current_time() < 0.001


async def test_who_joins_is_settled_once_it_knows_what_the_others_know(
    autojump_clock: MockClock,
) -> None:
    async with meshes() as world:
        first = await world.start(1)
        first.mesh.publish(CAPS, CAPS_BODY)
        second = await world.start(2)
        await second.mesh.settled.wait()
        assert trio.current_time() < SETTLE_MAX_S
        assert budget(second.mesh, first.mesh.me) == 4 << 30
        assert second.mesh.me in second.mesh.view.nodes
        assert not second.mesh.catching_up


async def test_who_is_answered_by_nobody_settles_in_the_end(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        second = await world.start(2)
        await second.mesh.settled.wait()
        assert trio.current_time() == pytest.approx(SETTLE_MAX_S, abs=0.01)
        assert second.mesh.linked == frozenset()
        assert second.mesh.catching_up, "the others may only be slow"


# Whose clock is wrong


def fast_by(seconds: float) -> Callable[[], float]:
    return lambda: clock() + seconds


async def test_a_newcomer_with_a_wrong_clock_gives_way(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first = await world.start(1)
        await world.start(2)
        await trio.sleep(JUST_STARTED_S)
        late = world.make(3, now=fast_by(-3 * 3600 - 150), epoch=NOW)
        with pytest.raises(LocalError) as caught:
            await late.mesh.run({})
        assert str(caught.value) == (
            "This clock is 3 h 02 min behind the mesh; set it and start again"
        )
        await trio.sleep(SPREAD_S)
        assert late.mesh.me not in first.mesh.linked
        assert set(first.epochs) == set(), "nobody else was troubled by it"


async def test_one_that_is_here_for_long_does_not_give_way_to_newcomers(
    autojump_clock: MockClock,
) -> None:
    async with meshes() as world:
        first = await world.start(1, book={NodeId(b"n" * 16): (Address("memory", 99),)})
        await trio.sleep(JUST_STARTED_S + CLOCKS_WAIT_S)
        for number in (2, 3):
            late = world.make(number, now=fast_by(7200), epoch=NOW)
            with pytest.raises(LocalError, match="This clock is 2 h 00 min ahead of the mesh"):
                await late.mesh.run({})
        await trio.sleep(JUST_STARTED_S)
        assert not first.mesh._failed.is_set()


async def test_a_founder_does_not_give_way_to_the_first_that_joins(
    autojump_clock: MockClock,
) -> None:
    async with meshes() as world:
        first = await world.start(1)
        late = world.make(2, now=fast_by(7200), epoch=NOW)
        with pytest.raises(LocalError):
            await late.mesh.run({})
        await trio.sleep(JUST_STARTED_S)
        assert not first.mesh._failed.is_set()


async def test_a_newcomer_among_clocks_that_all_differ_stays(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        newcomer = world.make(1, book={NodeId(b"n" * 16): (Address("memory", 99),)})
        async with trio.open_nursery() as nursery:
            await nursery.start(newcomer.run)
            for number, ahead_s in ((2, 7200), (3, 0), (4, -7200)):
                other = SigningKey(bytes([number]) * 32)
                newcomer.mesh.link_up(peer_of(other, clock_ahead_s=ahead_s))
            await trio.sleep(JUST_STARTED_S)
            assert not newcomer.mesh._failed.is_set()
            nursery.cancel_scope.cancel()


# Epochs and twins


async def test_an_older_life_of_ones_own_is_outranked(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first = await world.start(1)
        before = await world.start(2, epoch=NOW + 100)
        await trio.sleep(SPREAD_S)
        await world.crash(before)
        # Its disk lost the epoch, and its clock was set back.
        after = await world.start(2, epoch=NOW, instance=77)
        after.mesh.publish(CAPS, CAPS_BODY)
        await trio.sleep(SPREAD_S)
        assert after.epochs == [NOW + 101]
        assert budget(first.mesh, after.mesh.me) == 4 << 30


async def test_an_epoch_that_cannot_be_written_ends_the_mesh(autojump_clock: MockClock) -> None:
    def full(epoch: int) -> None:
        raise LocalError(f"Cannot write epoch {epoch} (No space left on device)")

    async with meshes() as world:
        first = await world.start(1)
        before = await world.start(2, epoch=NOW + 100)
        await trio.sleep(SPREAD_S)
        await world.crash(before)
        after = world.make(2, epoch=NOW, instance=77, save_epoch=full)
        after.mesh.publish(CAPS, CAPS_BODY)
        with pytest.raises(LocalError, match=f"Cannot write epoch {NOW + 101}"):
            await after.mesh.run({})
        await wait_all_tasks_blocked()
        assert budget(first.mesh, after.mesh.me) is None, "nothing goes out under it"


async def test_of_two_with_one_key_the_larger_instance_gives_way(
    autojump_clock: MockClock,
) -> None:
    readings = 0

    def busy_clock() -> float:
        # The two replace each other's links without a pause, in which no time would pass.
        nonlocal readings
        readings += 1
        return clock() + readings / 100

    async with meshes() as world:
        key = SigningKey(bytes([2]) * 32)
        first = await world.start(1, now=busy_clock)
        original = await world.start(2, key=key, instance=20, now=busy_clock)
        await trio.sleep(SPREAD_S)
        copy = world.make(3, key=key, instance=30, now=busy_clock)
        with pytest.raises(LocalError, match="give each its own --home"):
            await copy.mesh.run({})
        await trio.sleep(SPREAD_S)
        assert first.mesh.linked == {original.mesh.me}
        assert first.mesh.view.name_of(original.mesh.me) == "node-2"

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.watchable import Watchable


async def test_who_looked_before_a_change_does_not_wait(autojump_clock: MockClock) -> None:
    changes = Watchable()
    seen = changes.count
    changes.notify()
    assert await changes.wait(seen) == changes.count != seen


async def test_several_changes_are_seen_as_one(autojump_clock: MockClock) -> None:
    changes = Watchable()
    seen = changes.count
    for _ in range(3):
        changes.notify()
    latest = await changes.wait(seen)
    assert latest == seen + 3
    with trio.move_on_after(60) as scope:
        await changes.wait(latest)
    assert scope.cancelled_caught


async def test_every_waiter_wakes_and_none_misses_a_change(autojump_clock: MockClock) -> None:
    changes = Watchable()
    told: dict[str, list[int]] = {"quick": [], "slow": []}

    async def watch(name: str, pause_s: float) -> None:
        seen = changes.count
        while seen < 10:
            seen = await changes.wait(seen)
            told[name].append(seen)
            await trio.sleep(pause_s)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, "quick", 0)
        nursery.start_soon(watch, "slow", 3.3)
        await wait_all_tasks_blocked()
        for _ in range(10):
            changes.notify()
            await trio.sleep(1)
    assert told == {"quick": list(range(1, 11)), "slow": [1, 4, 7, 10]}


async def test_a_waiter_that_is_cancelled_leaves_the_others(autojump_clock: MockClock) -> None:
    changes = Watchable()
    woken: list[int] = []

    async def wait() -> None:
        woken.append(await changes.wait(0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        with trio.move_on_after(1):
            await changes.wait(0)
        changes.notify()
    assert woken == [1]

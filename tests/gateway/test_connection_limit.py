from __future__ import annotations

from functools import partial

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.gateway.connection_limit import GIVE_WAY_S, ConnectionLimit

PATIENCE_S = 100.0


class Requests:
    """Requests of one replica, and when each of them ended."""

    def __init__(self, nursery: trio.Nursery, slots: int, places: int) -> None:
        self._nursery = nursery
        self.limit = ConnectionLimit(slots, places)
        self.ended: dict[str, float] = {}

    async def start(self, name: str, *, stuck: bool = False) -> None:
        """Begin one that is stuck with its answer, or that computes for ever."""
        self._nursery.start_soon(partial(self._run, name, stuck=stuck))
        await wait_all_tasks_blocked()

    async def _run(self, name: str, *, stuck: bool) -> None:
        await self.limit.acquire()
        try:
            if not stuck:
                await trio.sleep_forever()
            with trio.move_on_after(PATIENCE_S) as scope:
                self.limit.began_sending(scope)
                try:
                    await trio.sleep_forever()
                finally:
                    self.limit.ended_sending(scope)
        finally:
            self.limit.release()
            self.ended[name] = trio.current_time()


async def test_a_stuck_answer_may_take_its_time_while_nobody_waits(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    requests, began = Requests(nursery, 2, 3), trio.current_time()
    await requests.start("one", stuck=True)
    await requests.start("two")
    await trio.sleep(PATIENCE_S + 1)
    assert requests.ended == {"one": began + PATIENCE_S}


async def test_the_one_stuck_longest_gives_way_to_one_that_waits(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    requests, began = Requests(nursery, 2, 2), trio.current_time()
    await requests.start("first", stuck=True)
    await trio.sleep(1)
    await requests.start("second", stuck=True)
    await trio.sleep(GIVE_WAY_S * 2)
    assert requests.ended == {}
    await requests.start("waiting")
    assert requests.ended == {"first": began + 1 + GIVE_WAY_S * 2}
    await trio.sleep(GIVE_WAY_S * 2)
    assert set(requests.ended) == {"first"}, "nobody waits any more"


async def test_what_gets_stuck_while_others_wait_has_a_moment(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    requests, began = Requests(nursery, 1, 2), trio.current_time()
    await requests.start("waiting in the engine")
    await requests.start("stuck", stuck=True)
    await trio.sleep(GIVE_WAY_S / 2)
    assert requests.ended == {}
    await trio.sleep(GIVE_WAY_S)
    assert requests.ended == {"stuck": began + GIVE_WAY_S}


async def test_a_place_is_had_in_turn_and_given_back(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    requests = Requests(nursery, 1, 1)
    await requests.start("first", stuck=True)
    began = trio.current_time()
    with trio.move_on_after(1) as scope:
        await requests.limit.acquire()
    assert scope.cancelled_caught
    with trio.fail_after(PATIENCE_S):
        await requests.limit.acquire()
    assert trio.current_time() - began == GIVE_WAY_S, "who left meanwhile counts no more"
    requests.limit.release()
    requests.limit.resize(2, 2)
    for name in ("second", "third"):
        await requests.start(name)
    with trio.move_on_after(1) as scope:
        await requests.limit.acquire()
    assert scope.cancelled_caught


async def test_a_free_place_is_taken_without_waiting_and_never_before_those_who_wait(
    nursery: trio.Nursery,
) -> None:
    limit = ConnectionLimit(slots=1, places=1)
    done = [trio.Event(), trio.Event()]

    async def hold(until: trio.Event) -> None:
        if not limit.acquire_nowait():
            await limit.acquire()
        await until.wait()
        limit.release()

    for event in done:
        nursery.start_soon(hold, event)
        await wait_all_tasks_blocked()
    assert not limit.acquire_nowait()
    done[0].set()
    await wait_all_tasks_blocked()
    assert not limit.acquire_nowait(), "the place is that of the one who waited"
    done[1].set()
    await wait_all_tasks_blocked()
    assert limit.acquire_nowait()
    limit.release()


async def test_who_is_cancelled_before_it_asks_takes_no_place() -> None:
    limit = ConnectionLimit(slots=1, places=1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await limit.acquire()
    assert scope.cancelled_caught
    assert limit.acquire_nowait()

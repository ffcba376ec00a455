from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from p2pmesh.errors import LinkError
from p2pmesh.gateway.suspicion import SUSPECT_SILENCE_S, Deadline, SuspicionWatch
from tests.gateway.fake import THERE, FakeBackends, target


async def test_a_wait_has_its_own_limit(autojump_clock: MockClock) -> None:
    with pytest.raises(LinkError, match="no answer in time"), Deadline().wait(3):
        await trio.sleep(4)
    with Deadline().wait(3):
        await trio.sleep(2)


async def test_suspicion_ends_a_wait_for_an_answer_at_once(autojump_clock: MockClock) -> None:
    deadline = Deadline()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def later() -> None:
            await trio.sleep(1)
            deadline.suspect()

        nursery.start_soon(later)
        with pytest.raises(LinkError, match="does not respond"), deadline.wait(100):
            await trio.sleep_forever()
    assert trio.current_time() - began == pytest.approx(1)
    with pytest.raises(LinkError, match="does not respond"), deadline.wait(100):
        await trio.sleep_forever()


async def test_during_an_answer_it_ends_silence(autojump_clock: MockClock) -> None:
    deadline = Deadline()
    deadline.answering = True
    deadline.suspect()
    for _ in range(3):
        with deadline.wait(100):
            await trio.sleep(SUSPECT_SILENCE_S * 0.9)
    with pytest.raises(LinkError), deadline.wait(100):
        await trio.sleep(SUSPECT_SILENCE_S * 1.1)


async def test_all_deadlines_of_a_node_hear_and_the_next_ones_start_anew(
    autojump_clock: MockClock,
) -> None:
    backends = FakeBackends()
    watch = SuspicionWatch(backends.lost)
    ended: list[int] = []

    async def waiter(number: int) -> None:
        with (
            watch.deadline(target(THERE)) as deadline,
            pytest.raises(LinkError),
            deadline.wait(100),
        ):
            await trio.sleep_forever()
        ended.append(number)

    async with trio.open_nursery() as nursery:
        await nursery.start(watch.run)
        async with trio.open_nursery() as waiters:
            waiters.start_soon(waiter, 1)
            waiters.start_soon(waiter, 2)
            await trio.testing.wait_all_tasks_blocked()
            backends.suspect(THERE)
        assert sorted(ended) == [1, 2]
        backends.trust(THERE)
        with watch.deadline(target(THERE)) as deadline, deadline.wait(5):
            await trio.sleep(4)
        nursery.cancel_scope.cancel()

from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2pmesh.gateway.limits import Admission, Limits
from p2pmesh.gateway.openai import ApiError


async def test_places_are_handed_on_in_order(autojump_clock: MockClock) -> None:
    admission = Admission(Limits(in_flight=1, queue=5))
    order: list[int] = []

    async def one(number: int) -> None:
        async with admission.place():
            order.append(number)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(one, number)
            await trio.testing.wait_all_tasks_blocked()
        assert admission.queued == 3
    assert order == [0, 1, 2, 3]
    assert admission.queued == 0


async def test_a_full_queue_and_a_long_wait_are_429(autojump_clock: MockClock) -> None:
    admission = Admission(Limits(in_flight=1, queue=1, queue_wait_s=5))
    statuses: list[int] = []

    async def refused() -> None:
        with pytest.raises(ApiError) as caught:
            async with admission.place():
                raise AssertionError("there is no place")
        statuses.append(caught.value.status)

    async with admission.place(), trio.open_nursery() as nursery:
        nursery.start_soon(refused)
        await trio.testing.wait_all_tasks_blocked()
        await refused()
        assert statuses == [429]
    assert statuses == [429, 429]
    async with admission.place():
        assert admission.queued == 0

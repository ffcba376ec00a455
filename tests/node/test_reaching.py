from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2pmesh.config import Address
from p2pmesh.errors import LinkError, PeerError
from p2pmesh.node.reaching import STAGGER_S, open_first

WAYS = tuple(Address(f"10.0.0.{number}", 9338) for number in range(5))
SILENT_S = 3.0


class Machine:
    """Each of its addresses answers after some time, or fails then."""

    def __init__(self, *answers: tuple[float, Exception | None]) -> None:
        self.answers = answers
        self.tried: list[tuple[int, float]] = []
        self.open: dict[int, trio.abc.Stream] = {}
        self.given_up = 0
        self._began = trio.current_time()

    async def open_at(self, address: Address) -> trio.abc.Stream:
        number = WAYS.index(address)
        self.tried.append((number, trio.current_time() - self._began))
        after_s, failure = self.answers[number]
        try:
            await trio.sleep(after_s)
        except trio.Cancelled:
            self.given_up += 1
            raise
        if failure is not None:
            raise failure
        ours, self.open[number] = trio.testing.memory_stream_pair()
        return ours

    async def reached(self) -> int:
        """The number of the address that a stream leads to; the only one that stays open."""
        stream = await open_first(WAYS[: len(self.answers)], self.open_at)
        await stream.send_all(b"hello")
        got = {number: await far.receive_some() for number, far in self.open.items()}
        (number,) = [number for number, data in got.items() if data == b"hello"]
        return number


def silent() -> tuple[float, Exception]:
    return SILENT_S, LinkError("no answer in time")


def refusing(reason: str = "nothing listens there") -> tuple[float, Exception]:
    return 0.01, LinkError(reason)


async def test_the_first_that_answers_is_alone(autojump_clock: MockClock) -> None:
    machine = Machine((0.1, None), (0.1, None))
    assert await machine.reached() == 0
    assert machine.tried == [(0, 0)]


async def test_addresses_that_swallow_everything_cost_a_moment_each(
    autojump_clock: MockClock,
) -> None:
    machine = Machine(silent(), silent(), silent(), (0.1, None))
    assert await machine.reached() == 3
    assert [when for _, when in machine.tried] == pytest.approx([n * STAGGER_S for n in range(4)])
    assert machine.given_up == 3


async def test_one_that_fails_makes_way_at_once(autojump_clock: MockClock) -> None:
    machine = Machine(refusing(), refusing(), (0.1, None))
    assert await machine.reached() == 2
    assert machine.tried[-1][1] == pytest.approx(0.02)


async def test_a_slow_one_may_still_be_first(autojump_clock: MockClock) -> None:
    machine = Machine((STAGGER_S + 0.1, None), silent())
    assert await machine.reached() == 0
    assert machine.given_up == 1


async def test_of_two_that_answer_in_the_same_moment_one_is_closed(
    autojump_clock: MockClock,
) -> None:
    machine = Machine((2 * STAGGER_S, None), (STAGGER_S, None))
    await machine.reached()
    assert len(machine.open) + machine.given_up == 2


async def test_when_none_leads_there_the_last_reason_is_told(autojump_clock: MockClock) -> None:
    machine = Machine(refusing(), (0.01, PeerError("somebody else answers there")))
    with pytest.raises(PeerError, match="somebody else answers there"):
        await machine.reached()
    assert len(machine.tried) == 2


async def test_who_gives_up_leaves_no_stream_open(autojump_clock: MockClock) -> None:
    machine = Machine((0.1, None))
    with trio.CancelScope() as scope:

        async def open_at(address: Address) -> trio.abc.Stream:
            stream = await machine.open_at(address)
            scope.cancel()
            return stream

        await open_first(WAYS[:1], open_at)
    assert scope.cancelled_caught
    assert await machine.open[0].receive_some() == b""

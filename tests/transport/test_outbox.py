from __future__ import annotations

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.transport.outbox import BYTES_MAX, MESSAGES_MAX, Outbox
from p2pmesh.wire.messages import MESSAGE_BYTES_MAX, RECORDS_BYTES_MAX


async def drain(outbox: Outbox) -> list[bytes]:
    outbox.close()
    taken = []
    while (message := await outbox.take()) is not None:
        taken.append(message)
    return taken


async def test_small_messages_go_before_bulk_and_each_kind_in_order() -> None:
    outbox = Outbox()
    for text in ("bulk-1", "small-1", "bulk-2", "small-2", "small-3"):
        assert outbox.put(text.encode(), bulk=text.startswith("bulk"))
    assert await drain(outbox) == [b"small-1", b"small-2", b"small-3", b"bulk-1", b"bulk-2"]


async def test_a_probe_waits_for_one_bulk_message_at_most() -> None:
    outbox = Outbox()
    for number in range(10):
        outbox.put(b"bulk-%d" % number, bulk=True)
    assert await outbox.take() == b"bulk-0"  # it is on its way
    outbox.put(b"probe", bulk=False)
    assert await outbox.take() == b"probe"


async def test_too_many_messages_find_no_room() -> None:
    outbox = Outbox()
    assert all(outbox.put(b"x", bulk=bool(n % 2)) for n in range(MESSAGES_MAX))
    assert not outbox.put(b"x", bulk=False)
    assert not outbox.put(b"x", bulk=True)
    await outbox.take()
    assert outbox.put(b"x", bulk=True)


async def test_too_many_bytes_find_no_room() -> None:
    outbox = Outbox()
    message = bytes(RECORDS_BYTES_MAX)
    room = BYTES_MAX // len(message)
    assert all(outbox.put(message, bulk=False) for _ in range(room))
    assert not outbox.put(b"x", bulk=True)
    await outbox.take()
    assert outbox.put(message, bulk=True)
    assert not outbox.put(b"x", bulk=False)


def test_the_longest_message_fits_beside_others() -> None:
    assert MESSAGE_BYTES_MAX * 4 <= BYTES_MAX


async def test_the_writer_is_woken(autojump_clock: MockClock) -> None:
    outbox, taken = Outbox(), []

    async def write() -> None:
        while (message := await outbox.take()) is not None:
            taken.append(message)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        for number in range(3):
            await wait_all_tasks_blocked()
            outbox.put(b"%d" % number, bulk=number == 1)
        await wait_all_tasks_blocked()
        assert taken == [b"0", b"1", b"2"]
        outbox.close()


async def test_after_the_end_what_comes_is_dropped() -> None:
    outbox = Outbox()
    outbox.put(b"goodbye", bulk=False)
    outbox.close()
    for _ in range(MESSAGES_MAX + 1):
        assert outbox.put(b"too late", bulk=False), "that is no overflow"
    assert await drain(outbox) == [b"goodbye"]
    assert await outbox.take() is None


@given(st.lists(st.one_of(st.none(), st.tuples(st.integers(1, BYTES_MAX), st.booleans()))))
async def test_what_is_held_is_what_was_put_less_what_was_taken(
    steps: list[tuple[int, bool] | None],
) -> None:
    outbox = Outbox()
    small: list[int] = []
    bulk: list[int] = []
    for step in steps:
        if step is not None:
            size, is_bulk = step
            fits = sum(small) + sum(bulk) + size <= BYTES_MAX
            assert outbox.put(bytes(size), bulk=is_bulk) == fits
            if fits:
                (bulk if is_bulk else small).append(size)
        elif small or bulk:
            message = await outbox.take()
            assert message is not None
            assert len(message) == (small or bulk).pop(0)
    assert [len(message) for message in await drain(outbox)] == small + bulk

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing

from p2pmesh.console import feed as feed_module
from p2pmesh.console.feed import COALESCE_S, KEEP_ALIVE, KEEP_ALIVE_S, Feed, FeedFull
from tests.console.fake import FakeNode

Clock = trio.testing.MockClock


def data_of(frame: bytes) -> dict[str, Any]:
    lines = dict(line.split(": ", 1) for line in frame.decode().splitlines() if line)
    assert lines["event"] == "snapshot"
    value: dict[str, Any] = json.loads(lines["data"])
    return value


async def settle(seconds: float = 2 * COALESCE_S) -> None:
    await trio.sleep(seconds)


async def test_the_first_event_is_the_whole_snapshot_at_once(autojump_clock: Clock) -> None:
    node = FakeNode({"n": 1})
    stream = Feed(node).subscribe()
    before = trio.current_time()
    assert data_of(await stream.__anext__()) == {"n": 1}
    assert trio.current_time() == before


async def test_a_change_reaches_every_subscriber_encoded_once(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    node = FakeNode({"n": 1})
    feed = Feed(node)
    nursery.start_soon(feed.run)
    streams = [feed.subscribe() for _ in range(5)]
    for stream in streams:
        await stream.__anext__()
    node.snapshots = 0
    node.set_status({"n": 2})
    assert [data_of(await stream.__anext__()) for stream in streams] == [{"n": 2}] * 5
    assert node.snapshots == 1


async def test_a_storm_of_changes_is_at_most_four_events_a_second(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    node = FakeNode({"n": 0})
    feed = Feed(node)
    nursery.start_soon(feed.run)
    stream = feed.subscribe()
    await stream.__anext__()
    seen: list[int] = []

    async def read() -> None:
        async for frame in stream:
            number = data_of(frame)["n"]
            seen.append(number)

    nursery.start_soon(read)
    for number in range(1, 201):
        node.set_status({"n": number})
        await trio.sleep(0.01)
    await settle()
    assert seen[-1] == 200
    assert len(seen) <= 2 / COALESCE_S + 2


async def test_a_slow_reader_gets_the_latest_and_never_a_backlog(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    node = FakeNode({"n": 0})
    feed = Feed(node)
    nursery.start_soon(feed.run)
    slow = feed.subscribe()
    await slow.__anext__()
    for number in range(1, 20):
        node.set_status({"n": number})
        await settle()
    assert data_of(await slow.__anext__()) == {"n": 19}
    with trio.move_on_after(KEEP_ALIVE_S / 2) as waiting:
        await slow.__anext__()
    assert waiting.cancelled_caught


async def test_a_quiet_mesh_sends_keep_alives(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    node = FakeNode()
    feed = Feed(node)
    nursery.start_soon(feed.run)
    stream = feed.subscribe()
    await stream.__anext__()
    before = trio.current_time()
    assert await stream.__anext__() == KEEP_ALIVE
    assert await stream.__anext__() == KEEP_ALIVE
    assert trio.current_time() - before == pytest.approx(2 * KEEP_ALIVE_S)
    node.set_status({"n": 7})
    assert data_of(await stream.__anext__()) == {"n": 7}


async def test_ids_grow_with_the_node_s_version(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    node = FakeNode({})
    feed = Feed(node)
    nursery.start_soon(feed.run)
    stream = feed.subscribe()
    assert (await stream.__anext__()).startswith(b"id: 0\n")
    node.touch()
    assert (await stream.__anext__()).startswith(b"id: 1\n")


async def test_closing_ends_waiting_and_new_streams(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    feed = Feed(FakeNode())
    stream = feed.subscribe()
    await stream.__anext__()

    async def close_soon() -> None:
        await trio.sleep(1)
        feed.close()

    nursery.start_soon(close_soon)
    with pytest.raises(StopAsyncIteration):
        await stream.__anext__()
    assert trio.current_time() < KEEP_ALIVE_S
    with pytest.raises(StopAsyncIteration):
        await feed.subscribe().__anext__()


async def test_subscribers_are_bounded_and_leave(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "SUBSCRIBERS_MAX", 2)
    feed = Feed(FakeNode())
    first, second = feed.subscribe(), feed.subscribe()
    await first.__anext__()
    await second.__anext__()
    with pytest.raises(FeedFull):
        feed.subscribe()
    await first.aclose()
    await first.aclose()
    assert feed.subscribers == 1
    await feed.subscribe().__anext__()


async def test_line_breaks_in_names_cannot_forge_events(autojump_clock: Clock) -> None:
    forged = {"name": "a\n\nevent: snapshot\ndata: {}\r\n\x85\u2028"}
    frame = await Feed(FakeNode(forged)).subscribe().__anext__()
    assert frame.count(b"\n") == 4
    assert b"\r" not in frame
    assert data_of(frame.replace(b"\xc2\x85", b"").replace(b"\xe2\x80\xa8", b""))

from __future__ import annotations

import h11
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2pmesh.errors import EngineError, LinkError
from p2pmesh.gateway import pool as pool_module
from p2pmesh.gateway.headers import Header
from p2pmesh.gateway.pool import (
    CONNECT_DEADLINE_S,
    ENGINE_IDLE_TIMEOUT_S,
    PEER_IDLE_TIMEOUT_S,
    PRUNE_INTERVAL_S,
    Pool,
    Upstream,
)
from p2pmesh.gateway.route import Target
from tests.gateway.fake import THERE, FakeEngine, target

HEADERS: list[Header] = [(b"host", b"x"), (b"content-length", b"0")]


async def exchange(upstream: Upstream) -> None:
    await upstream.send("GET", "/", HEADERS, b"")
    while not isinstance(event := upstream.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            await upstream.receive()


def pool_of(engine: FakeEngine, idle_max: int = 128) -> Pool:
    async def connect(_: Target) -> trio.abc.Stream:
        return await engine.dial()

    return Pool(connect, idle_max)


async def test_the_last_used_connection_is_taken_first(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        pool = pool_of(FakeEngine(nursery))
        assert pool.take(target().key) is None
        first, second = await pool.open(target()), await pool.open(target())
        for upstream in (first, second):
            await exchange(upstream)
            await pool.release(upstream)
        assert pool.take(target(THERE).key) is None
        assert pool.take(target().key) is second
        assert pool.take(target().key) is first
        assert len(pool) == 0
        nursery.cancel_scope.cancel()


async def test_an_idle_connection_times_out_and_is_closed(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        engine = FakeEngine(nursery)
        pool = pool_of(engine)
        nursery.start_soon(pool.run)
        upstreams = [await pool.open(target()), await pool.open(target(THERE))]
        for upstream in upstreams:
            await exchange(upstream)
            await pool.release(upstream)
        assert len(pool) == 2
        await trio.sleep(ENGINE_IDLE_TIMEOUT_S + PRUNE_INTERVAL_S + 0.1)
        assert len(pool) == 1
        await trio.sleep(PEER_IDLE_TIMEOUT_S)
        assert len(pool) == 0
        for upstream in upstreams:
            with pytest.raises(LinkError):
                await exchange(upstream)
        nursery.cancel_scope.cancel()


async def test_one_whose_answer_was_not_read_is_closed() -> None:
    async with trio.open_nursery() as nursery:
        pool = pool_of(FakeEngine(nursery))
        upstream = await pool.open(target())
        await upstream.send("GET", "/", HEADERS, b"")
        await pool.release(upstream)
        assert len(pool) == 0
        nursery.cancel_scope.cancel()


async def test_idle_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "IDLE_PER_REPLICA_MAX", 2)
    async with trio.open_nursery() as nursery:
        pool = pool_of(FakeEngine(nursery), idle_max=3)
        here = [await pool.open(target()) for _ in range(4)]
        there = [await pool.open(target(THERE)) for _ in range(2)]
        for upstream in here:
            await exchange(upstream)
            await pool.release(upstream)
        assert len(pool) == 2
        for upstream in there:
            await exchange(upstream)
            await pool.release(upstream)
        assert len(pool) == 3
        assert pool.take(target().key) is here[1]  # the oldest of all was closed
        assert pool.take(target().key) is None
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "exc", [ConnectionRefusedError("no"), EngineError("gone"), LinkError("no")]
)
async def test_a_failed_connection_is_a_link_error(exc: Exception) -> None:
    async def connect(_: Target) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        raise exc

    with pytest.raises(LinkError, match=r"no|gone"):
        await Pool(connect).open(target())


async def test_connecting_has_a_deadline(autojump_clock: MockClock) -> None:
    async def connect(_: Target) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError("it sleeps for ever")

    began = trio.current_time()
    with pytest.raises(LinkError, match="there cannot be reached"):
        await Pool(connect).open(target(THERE))
    assert trio.current_time() - began == pytest.approx(CONNECT_DEADLINE_S)


async def test_what_is_not_http_is_a_link_error() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    upstream = Upstream(target(), ours)
    await upstream.send("GET", "/", HEADERS, b"")
    await theirs.send_all(b"SSH-2.0-OpenSSH\r\n\r\n")
    await upstream.receive()
    with pytest.raises(LinkError, match="the answer is broken"):
        upstream.next_event()

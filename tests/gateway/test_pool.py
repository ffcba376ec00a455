from __future__ import annotations

import ssl

import h11
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2pmesh.errors import EngineError, LinkError, PeerError
from p2pmesh.gateway import pool as pool_module
from p2pmesh.gateway.headers import Header
from p2pmesh.gateway.pool import (
    CONNECT_DEADLINE_S,
    ENGINE_IDLE_TIMEOUT_S,
    OPENING_PER_PEER_MAX,
    PEER_IDLE_TIMEOUT_S,
    PRUNE_INTERVAL_S,
    Pool,
    Upstream,
)
from p2pmesh.gateway.route import Target
from tests.gateway.fake import BETA, THERE, YONDER, FakeEngine, eventually, target

HEADERS: list[Header] = [(b"host", b"x"), (b"content-length", b"0")]


async def ask(upstream: Upstream) -> None:
    for piece in upstream.request("GET", "/", HEADERS, b""):
        await upstream.send(piece)


async def exchange(upstream: Upstream) -> None:
    await ask(upstream)
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
        assert await pool.take(target()) is None
        first, second = await pool.open(target()), await pool.open(target())
        for upstream in (first, second):
            await exchange(upstream)
            await pool.release(upstream)
        assert await pool.take(target(THERE)) is None
        assert await pool.take(target()) is second
        assert await pool.take(target()) is first
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


async def test_idle_streams_to_peers_are_closed_when_their_mesh_is_left() -> None:
    async with trio.open_nursery() as nursery:
        pool = pool_of(FakeEngine(nursery))
        here, idle = await pool.open(target()), await pool.open(target(THERE))
        busy = await pool.open(target(THERE))
        for upstream in (here, idle):
            await exchange(upstream)
            await pool.release(upstream)
        await pool.close_peers()
        assert await pool.take(target(THERE)) is None
        with pytest.raises(LinkError):
            await exchange(idle)
        assert await pool.take(target()) is here
        await exchange(busy)
        nursery.cancel_scope.cancel()


async def test_one_whose_answer_was_not_read_is_closed() -> None:
    async with trio.open_nursery() as nursery:
        pool = pool_of(FakeEngine(nursery))
        upstream = await pool.open(target())
        await ask(upstream)
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
        assert await pool.take(target()) is here[1]  # the oldest of all was closed
        assert await pool.take(target()) is None
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "exc",
    [
        ConnectionRefusedError("no"),
        EngineError("gone"),
        LinkError("no"),
        PeerError("no"),
        ssl.SSLEOFError("gone"),
        trio.BrokenResourceError("no"),
    ],
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
    await ask(upstream)
    await theirs.send_all(b"SSH-2.0-OpenSSH\r\n\r\n")
    await upstream.receive()
    with pytest.raises(LinkError, match="the answer is broken"):
        upstream.next_event()


class Doorkeeper:
    """A peer that listens to only so many strangers at once, as the transport does."""

    def __init__(self, nursery: trio.Nursery, strangers_max: int) -> None:
        self.engine = FakeEngine(nursery)
        self._max = strangers_max
        self.strangers = self.most = self.dials = 0

    async def connect(self, _: Target) -> trio.abc.Stream:
        self.dials += 1
        if self.strangers >= self._max:
            raise PeerError("too many connections that have not said who they are")
        self.strangers += 1
        self.most = max(self.most, self.strangers)
        await trio.sleep(0.02)  # two handshakes
        self.strangers -= 1
        return await self.engine.dial()


@pytest.mark.parametrize("burst", [12, 30])
async def test_a_cold_burst_reaches_a_peer_that_lets_in_four_at_once(
    autojump_clock: MockClock, burst: int
) -> None:
    async with trio.open_nursery() as nursery:
        peer = Doorkeeper(nursery, 4)
        pool = Pool(peer.connect)
        answered = 0

        async def ask() -> None:
            nonlocal answered
            upstream = await pool.open(target(THERE))
            await exchange(upstream)
            await trio.sleep(0.005)
            await pool.release(upstream)
            answered += 1

        async with trio.open_nursery() as askers:
            for _ in range(burst):
                askers.start_soon(ask)
        assert answered == burst
        assert peer.most == OPENING_PER_PEER_MAX
        assert peer.dials < burst, "some took a stream that came back"
        nursery.cancel_scope.cancel()


async def test_who_waits_for_a_peer_that_cannot_be_reached_hears_it_at_once(
    autojump_clock: MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        peer = Doorkeeper(nursery, 0)
        slow = Doorkeeper(nursery, 4)

        async def connect(one: Target) -> trio.abc.Stream:
            await trio.sleep(3)
            return await (peer if one.node == THERE else slow).connect(one)

        pool = Pool(connect)
        failed: list[float] = []

        async def ask() -> None:
            with pytest.raises(LinkError, match="there cannot be reached: too many connections"):
                await pool.open(target(THERE))
            failed.append(trio.current_time())

        began = trio.current_time()
        async with trio.open_nursery() as askers:
            for _ in range(30):
                askers.start_soon(ask)
            await pool.open(target(YONDER))  # another peer is not concerned
        assert [round(at - began, 3) for at in failed] == [3] * 30
        nursery.cancel_scope.cancel()


async def test_streams_to_a_peer_are_bounded_and_serve_all_its_models(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "PEER_STREAMS_MAX", 2)
    async with trio.open_nursery() as nursery:
        pool = pool_of(FakeEngine(nursery))
        first, second = [await pool.open(target(THERE)) for _ in range(2)]
        with trio.move_on_after(1) as waiting:
            await pool.open(target(THERE))
        assert waiting.cancelled_caught
        got: list[Upstream] = []

        async def ask() -> None:
            got.append(await pool.open(target(THERE, BETA)))

        async with trio.open_nursery() as askers:
            askers.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            await exchange(first)
            await pool.release(first)
        assert got == [first]
        async with trio.open_nursery() as askers:
            askers.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            await second.aclose()
            await second.aclose()  # counted once
        assert got[1] not in (first, second)
        with trio.move_on_after(1) as waiting:
            await pool.open(target(THERE))
        assert waiting.cancelled_caught
        nursery.cancel_scope.cancel()


async def test_an_engine_that_closed_an_idle_connection_is_seen_before_it_is_used() -> None:
    async with trio.open_nursery() as nursery:
        engine = FakeEngine(nursery)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = listeners[0].socket.getsockname()
        nursery.start_soon(trio.serve_listeners, engine.serve, listeners)

        async def connect(_: Target) -> trio.abc.Stream:
            return await trio.open_tcp_stream(*address)

        pool = Pool(connect)
        upstream = await pool.open(target())
        await exchange(upstream)
        await pool.release(upstream)
        assert not upstream.is_stale
        await engine.servers[0].aclose()
        await eventually(lambda: upstream.is_stale)
        assert await pool.take(target()) is None
        assert len(pool) == 0
        nursery.cancel_scope.cancel()

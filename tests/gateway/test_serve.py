from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2pmesh.gateway.limits import Limits
from p2pmesh.gateway.serve import Gateway
from p2pmesh.identity.keys import NodeId
from tests.gateway.fake import (
    CHAT,
    FAR,
    HERE,
    THERE,
    YONDER,
    Asked,
    FakeBackends,
    FakeEngine,
    HttpCaller,
    Reply,
    echo,
    error_of,
    eventually,
    field_of,
    hello,
    open_world,
    silent,
    target,
)

BODY = b'{"model": "alpha"}'
ASK = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 18\r\n\r\n" + BODY

_ODD_PIECES = [
    b"\x00", b"\xff\xfe", b"\r\n", b"\r\n\r\n", b"GET ", b"/ ", b"HTTP/1.1", b"Host: a", b"\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"Content-Length: -1\r\n",
    b"Content-Length: 99999999999999999999999\r\n", b"Transfer-Encoding: chunked\r\n", b"zz\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\n", b"Host: localhost\r\n", b"Upgrade: websocket\r\n",
    b"Connection: \xe4\r\n", b"X" * 70_000, b"Host: \r\nHost: \r\n", b"0\r\n", b"{", ASK,
    b"GET /v1/models/%ff%00 HTTP/1.1\r\n", b"GET \xff HTTP/1.1\r\n", b"GET http://[ HTTP/1.1\r\n",
]  # fmt: skip


class Port:
    """A gateway on a real port with one echoing engine behind it."""

    def __init__(
        self, gateway: Gateway, backends: FakeBackends, engine: FakeEngine, number: int
    ) -> None:
        self.gateway = gateway
        self.backends = backends
        self.engine = engine
        self.number = number
        self._dialled: list[HttpCaller] = []

    async def dial(self) -> HttpCaller:
        caller = HttpCaller(await trio.open_tcp_stream("127.0.0.1", self.number))
        self._dialled.append(caller)
        return caller

    async def answers(self) -> bool:
        head, body = await (await self.dial()).ask("POST", CHAT, BODY)
        return (head.status_code, body) == (200, BODY)

    async def hang_up(self) -> None:
        for caller in self._dialled:
            await caller.stream.aclose()


@asynccontextmanager
async def open_port(
    backends: FakeBackends | None = None, limits: Limits | None = None
) -> AsyncIterator[Port]:
    backends = backends or FakeBackends()
    gateway = Gateway(backends, limits=limits)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            engine = FakeEngine(nursery, echo)
            backends.put(target(), engine.dial)
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = Port(gateway, backends, engine, listeners[0].socket.getsockname()[1])
            await nursery.start(gateway.serve, listeners)
            yield port
            await port.hang_up()
            nursery.cancel_scope.cancel()


async def test_junk_is_answered_400_or_dropped_and_the_gateway_lives() -> None:
    rng = random.Random(2)
    async with open_port() as port:
        for number in range(150):
            pieces = rng.choices(_ODD_PIECES, k=rng.randint(1, 6))
            if number % 3 == 0:
                pieces.append(rng.randbytes(rng.randint(1, 500)))
            caller = await port.dial()
            try:
                await caller.stream.send_all(b"".join(pieces))
                await caller.stream.send_eof()
            except trio.BrokenResourceError:
                continue
            got = await caller.rest()
            assert got == b"" or got.startswith(b"HTTP/1.1 "), pieces
        assert await port.answers()
        assert port.gateway.statistics().junk > 20
        await port.hang_up()
        await eventually(lambda: port.gateway.statistics().connections == 0)


async def test_each_kind_of_junk_alone() -> None:
    async with open_world() as world:
        for piece in _ODD_PIECES:
            caller = world.caller()
            await caller.stream.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
            await caller.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert world.gateway.statistics().connections == 0
        assert (await world.caller().ask("GET", "/health"))[0].status_code == 200


async def test_plain_junk_gets_400_with_a_reason() -> None:
    async with open_port() as port:
        got = await (await port.dial()).raw(b"\x16\x03\x01 hello\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 400 ")
        assert b"not an HTTP request" in got


async def test_a_head_that_is_too_large_is_431() -> None:
    async with open_port() as port:
        ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 200_000 + b"\r\n\r\n"
        assert (await (await port.dial()).raw(ask)).startswith(b"HTTP/1.1 431 ")
        assert await port.answers()


async def test_a_refused_upload_still_reads_its_answer() -> None:
    async with open_port(limits=Limits(body_bytes=1000)) as port:
        caller = await port.dial()
        await caller.stream.send_all(ASK.replace(b": 18", b": 3000000")[: -len(BODY)])
        async with trio.open_nursery() as nursery:

            async def upload() -> None:
                for _ in range(40):  # more than the system buffers: it has to be read and dropped
                    await caller.stream.send_all(b"x" * 75_000)

            nursery.start_soon(upload)
            got = await caller.rest()
        assert got.startswith(b"HTTP/1.1 413 ")


async def test_a_client_that_stops_reading_is_dropped() -> None:
    async def endless(asked: Asked, reply: Reply) -> None:
        await reply.head(200, ("Content-Type", "text/event-stream"))
        while True:
            await reply.data(b"data: x\n\n" * 5000)
            await trio.sleep(0.001)

    async with open_port(limits=Limits(send_stall_s=0.3)) as port:
        port.engine.script = endless
        caller = await port.dial()
        await caller.stream.send_all(ASK)
        await eventually(lambda: port.gateway.statistics().clients_gone == 1)
        await eventually(lambda: port.engine.closed == 1)
        assert port.gateway.statistics().in_flight == {}
        port.engine.script = echo
        assert await port.answers()


async def test_a_slow_reader_slows_the_engine_down() -> None:
    sent = 0

    async def endless(asked: Asked, reply: Reply) -> None:
        nonlocal sent
        await reply.head(200, ("Content-Type", "text/event-stream"))
        while True:
            await reply.data(b"x" * 60_000)
            sent += 60_000

    async with open_port() as port:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = listeners[0].socket.getsockname()
        port.engine.script = endless
        port.engine.nursery.start_soon(trio.serve_listeners, port.engine.serve, listeners)

        async def over_tcp() -> trio.abc.Stream:
            return await trio.open_tcp_stream(*address)

        port.backends.put(target(), over_tcp)
        caller = await port.dial()
        await caller.stream.send_all(ASK)
        before = -1
        while sent > before:
            before = sent
            await trio.sleep(0.3)
        assert 0 < sent < 64 << 20  # what the systems' buffers hold, not more
        await caller.stream.aclose()
        await eventually(lambda: port.engine.closed == 1)


async def test_connections_are_bounded() -> None:
    async with open_world(limits=Limits(connections=2)) as world:
        world.engine(silent)
        held = [world.caller() for _ in range(2)]
        for caller in held:
            await caller.send("POST", CHAT, BODY)
        await trio.testing.wait_all_tasks_blocked()
        head, _ = await world.caller().answer()
        assert head.status_code == 503
        assert field_of(head, "retry-after") == "5"
        head, _ = await world.caller(peer=True).ask("GET", "/health")
        assert head.status_code == 403, "peers have places of their own, and other answers"
        await held[0].stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert (await world.caller().ask("GET", "/health"))[0].status_code == 200


async def test_the_connection_that_was_idle_longest_gives_way_to_a_new_one(
    autojump_clock: MockClock,
) -> None:
    async with open_world(limits=Limits(connections=3)) as world:
        world.engine(silent)
        mute, working, kept = (world.caller() for _ in range(3))
        await working.send("POST", CHAT, BODY)
        await trio.sleep(1)
        assert (await kept.ask("GET", "/health"))[0].status_code == 200
        await trio.sleep(1)
        newest = world.caller()
        assert (await newest.ask("GET", "/health"))[0].status_code == 200
        assert await mute.rest() == b""
        await trio.sleep(1)
        assert (await kept.ask("GET", "/health"))[0].status_code == 200
        await trio.sleep(1)
        assert (await world.caller().ask("GET", "/health"))[0].status_code == 200
        assert await newest.rest() == b"", "it was idle since before the other one asked again"
        assert (await kept.ask("GET", "/health"))[0].status_code == 200


async def test_an_idle_or_slow_connection_is_closed(autojump_clock: MockClock) -> None:
    limits = Limits(keep_alive_idle_s=75, head_deadline_s=15, body_stall_s=30)
    async with open_world(limits=limits) as world:
        began = trio.current_time()
        idle = world.caller()
        assert await idle.rest() == b""
        assert trio.current_time() - began == pytest.approx(75)

        slow = world.caller()
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    for byte in ASK:
                        await slow.stream.send_all(bytes([byte]))
                        await trio.sleep(1)

            began = trio.current_time()
            nursery.start_soon(drip)
            assert await slow.rest() == b""
            assert trio.current_time() - began == pytest.approx(15)

        began = trio.current_time()
        assert await world.caller().raw(ASK[:-3]) == b""
        assert trio.current_time() - began == pytest.approx(30)


async def test_one_peer_cannot_take_the_places_of_the_others(autojump_clock: MockClock) -> None:
    limits = Limits(connections=40)
    async with open_world(limits=limits) as world:
        world.engine(echo)
        greedy = [world.caller(peer=True, node=FAR) for _ in range(limits.peer_streams)]
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        refused = world.caller(peer=True, node=FAR)
        head, _ = await refused.ask("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
        assert head.status_code == 503
        assert trio.current_time() == began, "told at once"
        other = world.caller(peer=True, node=THERE)
        head, body = await other.ask("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
        assert (head.status_code, body) == (200, BODY)
        head, _ = await greedy[0].ask("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
        assert head.status_code == 200


async def test_when_all_places_are_taken_the_peer_with_most_streams_gives_one_up(
    autojump_clock: MockClock,
) -> None:
    async with open_world(limits=Limits(connections=8, peer_first_head_s=60)) as world:
        world.engine(echo)
        most = []
        for _ in range(2):
            most.append(world.caller(peer=True, node=FAR))
            await trio.sleep(1)
        few = [world.caller(peer=True, node=node) for node in (THERE, YONDER, HERE)]
        # As many again by peers that have one each, all of them idle for longer than the others.
        lone = [world.caller(peer=True, node=NodeId(bytes([n]) * 16)) for n in range(3)]
        await trio.sleep(1)
        newest = world.caller(peer=True, node=NodeId(b"n" * 16))
        head, _ = await newest.ask("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
        assert head.status_code == 200
        assert await most[0].rest() == b""
        for caller in [most[1], *few, *lone]:
            head, _ = await caller.ask("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
            assert head.status_code == 200


async def test_a_peer_has_to_ask_at_once_and_may_come_again_later(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.engine(echo)
        began = trio.current_time()
        assert await world.caller(peer=True).rest() == b""
        assert trio.current_time() - began == pytest.approx(2)
        caller = world.caller(peer=True)
        for pause_s in (1, 70, 0):
            await trio.sleep(pause_s)
            head, _ = await caller.ask("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
            assert head.status_code == 200


async def test_draining_lets_requests_end_and_takes_no_more(autojump_clock: MockClock) -> None:
    async def slow(asked: Asked, reply: Reply) -> None:
        await trio.sleep(5)
        await hello(asked, reply)

    async with open_world() as world:
        world.engine(slow)
        idle, busy = world.caller(), world.caller()
        assert (await idle.ask("GET", "/health"))[0].status_code == 200
        await busy.send("POST", CHAT, BODY)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.gateway.drain, 30)
            assert await idle.rest() == b""
            head, body = await busy.answer()
            assert (head.status_code, body) == (200, b'{"hello": 1}')
            assert field_of(head, "connection") == "close"
            new = world.caller(peer=True)
            head, _ = await new.ask("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
            assert head.status_code == 503
            assert field_of(head, "connection") == "close"
            await new.stream.aclose()
        assert trio.current_time() - began == pytest.approx(5)
        assert world.gateway.statistics().connections == 0


async def test_draining_cuts_what_does_not_end(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        engine = world.engine(silent)
        caller = world.caller()
        await caller.send("POST", CHAT, BODY)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await world.gateway.drain(10)
        assert trio.current_time() - began == pytest.approx(10)
        assert await caller.rest() == b""
        await trio.testing.wait_all_tasks_blocked()
        assert engine.closed == 1
        assert world.gateway.statistics().connections == 0


async def test_streams_of_peers_end_alone_and_later_ones_are_served(
    autojump_clock: MockClock,
) -> None:
    async def slow(asked: Asked, reply: Reply) -> None:
        await trio.sleep(5)
        await hello(asked, reply)

    part = str(target().part)
    async with open_world() as world:
        world.engine(slow)
        client, client_too = world.caller(), world.caller()
        idle, busy = world.caller(peer=True), world.caller(peer=True)
        assert (await client.ask("GET", "/health"))[0].status_code == 200
        assert (await idle.ask("GET", "/health"))[0].status_code == 403
        await busy.send("POST", CHAT, BODY, x_p2pmesh_part=part)
        await client_too.send("POST", CHAT, BODY)
        await trio.sleep(3)
        stuck = world.caller(peer=True)
        await stuck.send("POST", CHAT, BODY, x_p2pmesh_part=part)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.gateway.drain_peers, 3)
            assert await idle.rest() == b""
            later = world.caller(peer=True)
            head, _ = await later.ask("POST", CHAT, BODY, x_p2pmesh_part=part)
            assert head.status_code == 200
            assert field_of(head, "connection") is None
            assert (await busy.answer())[0].status_code == 200
            assert await busy.rest() == b""
            assert b"HTTP/1.1 200" not in await stuck.rest(), "it takes longer than it is let"
        assert (await client_too.answer())[0].status_code == 200
        assert (await client.ask("GET", "/health"))[0].status_code == 200


async def test_draining_closes_the_port() -> None:
    async with open_port() as port:
        assert await port.answers()
        await port.gateway.drain(1)
        with pytest.raises(OSError, match="all attempts to connect"):
            await port.dial()


async def test_a_bug_is_answered_500_and_ends_only_that_connection() -> None:
    class Broken(FakeBackends):
        broken = True

        def targets(self, digest: object) -> list[object]:  # type: ignore[override]
            if self.broken:
                raise RuntimeError("a bug")
            return list(super().targets(target().digest))

    backends = Broken()
    async with open_port(backends) as port:
        got = await (await port.dial()).raw(ASK)
        assert got.startswith(b"HTTP/1.1 500 ")
        assert b"connection: close" in got.lower()
        assert error_of(got.partition(b"\r\n\r\n")[2])["code"] == "internal_error"
        backends.broken = False
        assert await port.answers()
        assert port.gateway.statistics().requests == 2


async def test_statistics_count_and_do_not_change() -> None:
    async with open_port() as port:
        before = port.gateway.statistics()
        assert await port.answers()
        await (await port.dial()).ask("GET", "/nothing")
        after = port.gateway.statistics()
        assert before.requests == 0
        assert after.requests == 2
        assert after.responses == {200: 1, 404: 1}
        assert after.in_flight == {}


async def test_small_answers_are_not_held_back_by_nagle() -> None:
    async with open_port() as port:
        caller = await port.dial()
        assert isinstance(caller.stream, trio.SocketStream)
        assert caller.stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        began = trio.current_time()
        for _ in range(20):
            await caller.ask("POST", CHAT, BODY)
        assert trio.current_time() - began < 0.7  # delayed acknowledgements cost 40 ms each

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h11
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2pmesh.gateway.bodies import BodyBudget
from p2pmesh.gateway.client import INBOX_BYTES_MAX, ClientConnection, ClientGoneError
from p2pmesh.gateway.limits import Limits
from tests.gateway.fake import HttpCaller

LIMITS = Limits(send_stall_s=3, linger_s=2, body_stall_s=4)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Narrow(trio.abc.Stream):
    """The other end sends one request and takes what is sent when the test lets it."""

    def __init__(self, request: bytes = GET) -> None:
        self.stuck = Stuck(request)
        self.gate = trio.Event()
        self.got = b""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self.stuck.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.got.endswith(b"..."), "two tasks send at once"
        self.got += b"..."
        await self.gate.wait()
        self.got = self.got[:-3] + data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def connected(
    stream: trio.abc.Stream | None = None,
) -> AsyncIterator[tuple[ClientConnection, HttpCaller]]:
    ours, theirs = trio.testing.memory_stream_pair()
    client = ClientConnection(stream or theirs, LIMITS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run_reader)
        yield client, HttpCaller(ours)
        nursery.cancel_scope.cancel()


class Stuck(trio.abc.Stream):
    """The other end is there, sends one request, and reads nothing."""

    def __init__(self, request: bytes = GET) -> None:
        self._request = request
        self._said = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._said:
            self._said = True
            await trio.lowlevel.checkpoint()
            return self._request
        await trio.sleep_forever()
        raise AssertionError("it sleeps for ever")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep_forever()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.sleep_forever()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_requests_and_answers_in_turn() -> None:
    async with connected() as (client, caller):
        got = b""
        for number in range(3):
            await caller.stream.send_all(GET)
            head = await client.next_request()
            assert head is not None
            assert head.target == b"/"
            client.start(200, [(b"content-length", b"1")])
            client.write(b"%d" % number)
            client.finish()
            await client.flush()
            assert client.can_go_on
            got = bytes(await caller.stream.receive_some())
            assert got == b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n%d" % number
        assert client.bytes_in == 3 * len(GET)
        assert client.bytes_out == 3 * len(got)
        await caller.stream.aclose()
        assert await client.next_request() is None


async def test_an_unknown_status_has_a_reason_all_the_same() -> None:
    async with connected() as (client, caller):
        await caller.stream.send_all(GET)
        await client.next_request()
        client.start(299, [(b"content-length", b"0")])
        client.finish()
        await client.flush()
        assert bytes(await caller.stream.receive_some()).startswith(b"HTTP/1.1 299 Status\r\n")


async def test_the_last_answer_says_so() -> None:
    async with connected() as (client, caller):
        await caller.stream.send_all(GET)
        await client.next_request()
        client.last = True
        client.start(200, [(b"content-length", b"0")])
        client.finish()
        await client.flush()
        assert b"connection: close" in bytes(await caller.stream.receive_some()).lower()
        assert not client.can_go_on


async def test_leaving_cancels_the_work() -> None:
    async with connected() as (client, caller), trio.open_nursery() as nursery:
        await caller.stream.send_all(GET)
        await client.next_request()
        nursery.start_soon(caller.stream.aclose)
        with pytest.raises(ClientGoneError), client.work():
            await trio.sleep_forever()
        with pytest.raises(ClientGoneError), client.work():
            await trio.sleep_forever()


async def test_pipelined_requests_do_not_look_like_leaving() -> None:
    async with connected() as (client, caller):
        await caller.stream.send_all(GET)
        await client.next_request()
        await caller.stream.send_all(GET * 2)
        with client.work():
            await trio.testing.wait_all_tasks_blocked()
        client.start(200, [(b"content-length", b"0")])
        client.finish()
        assert await client.next_request() is not None


async def test_reading_ahead_is_bounded() -> None:
    async with connected() as (client, caller):
        await caller.stream.send_all(GET)
        await client.next_request()
        for _ in range(100):
            await caller.stream.send_all(b"x" * 65536)
        await trio.testing.wait_all_tasks_blocked()
        assert client.bytes_in <= INBOX_BYTES_MAX + 65536 + len(GET)


async def test_a_body_that_stops_coming_ends_the_connection(autojump_clock: MockClock) -> None:
    budget = BodyBudget(LIMITS)
    async with connected() as (client, caller):
        await caller.stream.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        await client.next_request()
        began = trio.current_time()
        with pytest.raises(ClientGoneError, match="did not send the whole body"):
            await client.read_body(budget, 9)
        assert trio.current_time() - began == pytest.approx(4)
        budget.take(LIMITS.bodies_bytes)  # everything was given back


async def test_a_client_that_does_not_read_is_given_up(autojump_clock: MockClock) -> None:
    async with connected(Stuck()) as (client, _):
        await client.next_request()
        client.start(200, [(b"content-length", b"0")])
        client.finish()
        began = trio.current_time()
        with pytest.raises(ClientGoneError, match="stopped reading"):
            await client.flush()
        assert trio.current_time() - began == pytest.approx(3)


async def test_lingering_drops_what_still_comes_and_ends(autojump_clock: MockClock) -> None:
    async with connected() as (client, caller):
        await caller.stream.send_all(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
        )
        await client.next_request()
        client.start(413, [(b"content-length", b"0")])
        client.finish()
        await client.flush()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.linger)
            assert b" 413 " in await caller.rest()
            for _ in range(50):
                await caller.stream.send_all(b"x" * 65536)
            await trio.testing.wait_all_tasks_blocked()
            assert client.bytes_in > 50 * 65536
        assert trio.current_time() - began == pytest.approx(2)


async def test_junk_raises_and_can_still_be_answered() -> None:
    async with connected() as (client, caller):
        await caller.stream.send_all(b"junk\r\n\r\n")
        with pytest.raises(h11.RemoteProtocolError):
            await client.next_request()
        assert client.can_answer


async def test_a_word_that_it_is_worked_on_comes_before_the_answer_and_never_after() -> None:
    async with connected() as (client, caller):
        await client.say_processing()  # nothing was asked yet
        await caller.send("GET", "/")
        await client.next_request()
        await client.say_processing()
        await client.say_processing()
        client.start(200, [(b"content-length", b"2")])
        await client.say_processing()
        client.write(b"hi")
        client.finish()
        await client.flush()
        await client.say_processing()
        assert (await caller.answer())[1] == b"hi"
        assert caller.informed == 2


async def test_the_answer_waits_for_a_word_that_is_being_sent() -> None:
    stream = Narrow()
    async with connected(stream) as (client, _):
        await client.next_request()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.say_processing)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(client.say_processing)  # one at a time
            client.start(204, [])
            client.finish()
            nursery.start_soon(client.flush)
            await trio.testing.wait_all_tasks_blocked()
            stream.gate.set()
        assert stream.got.startswith(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 204 ")


async def test_no_word_is_sent_while_the_body_is_asked_for() -> None:
    stream = Narrow(
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    )
    async with connected(stream) as (client, _):
        await client.next_request()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.read_body, BodyBudget(LIMITS), 2)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(client.say_processing)
            await trio.testing.wait_all_tasks_blocked()
            stream.gate.set()
            await trio.testing.wait_all_tasks_blocked()
            assert stream.got.startswith(b"HTTP/1.1 100 ")
            assert stream.got.count(b"HTTP/1.1 ") == 1
            await client.say_processing()
            assert stream.got.endswith(b"HTTP/1.1 102 Processing\r\n\r\n")
            nursery.cancel_scope.cancel()


async def test_who_does_not_even_take_such_a_word_is_gone(autojump_clock: MockClock) -> None:
    async with connected(Stuck()) as (client, _):
        await client.next_request()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.say_processing)
            with pytest.raises(ClientGoneError), client.work():
                await trio.sleep_forever()
        assert trio.current_time() - began == pytest.approx(LIMITS.send_stall_s)

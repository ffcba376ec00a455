from __future__ import annotations

import h11
import pytest
import trio
from trio.testing import MockClock

from p2pmesh.gateway.limits import ENGINE_SPARE
from p2pmesh.gateway.suspicion import SUSPECT_SILENCE_S
from tests.gateway.fake import (
    ALPHA,
    BODY,
    CHAT,
    HERE,
    THERE,
    YONDER,
    Asked,
    HttpCaller,
    Reply,
    Script,
    echo,
    error_of,
    field_of,
    hang_up,
    hello,
    open_world,
    refuse,
    silent,
    status_script,
    target,
    work,
)

SSE = ("Content-Type", "text/event-stream")


async def junk(asked: Asked, reply: Reply) -> None:
    await reply.stream.send_all(b"\x16\x03\x01 this is not HTTP\r\n\r\n")


async def head_only_then_close(asked: Asked, reply: Reply) -> None:
    await reply.head(200, SSE)
    await reply.stream.aclose()


async def test_a_local_answer_passes_untouched(autojump_clock: MockClock) -> None:
    odd = b'{"b": 1.50,"a":"\\u00e9",  "model":"alpha"}'
    async with open_world() as world:
        engine = world.engine(echo)
        head, body = await world.caller().ask("POST", CHAT, odd)
        assert (head.status_code, body) == (200, odd)
        assert engine.asked[0].body == odd
        assert engine.asked[0].head.target == CHAT.encode()
        assert field_of(head, "x-p2pmesh-served-by") == "here/whole"


def raw_script(answer: bytes) -> Script:
    """An engine that answers in bytes of its own making, then hangs up."""

    async def script(asked: Asked, reply: Reply) -> None:
        await reply.stream.send_all(answer)
        await reply.stream.aclose()

    return script


async def test_an_answer_with_two_lengths_passes_in_chunks(autojump_clock: MockClock) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer += b"20\r\n" + b"y" * 32 + b"\r\n0\r\n\r\n"
    async with open_world() as world:
        world.engine(raw_script(answer))
        head, body = await world.caller().ask("POST", CHAT, BODY)
        assert (head.status_code, body) == (200, b"y" * 32)
        assert field_of(head, "transfer-encoding") == "chunked"


async def test_who_served_is_not_the_peers_to_say(autojump_clock: MockClock) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-P2PMesh-Served-By: here/whole\r\n\r\n{}"
    async with open_world() as world:
        world.engine(raw_script(answer), target(THERE))
        head, _ = await world.caller().ask("POST", CHAT, BODY)
        assert field_of(head, "x-p2pmesh-served-by") == "there/whole"


async def test_the_engine_gets_its_own_key_and_not_the_clients(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        engine = world.engine()
        world.backends.keys[target().part] = "engine-key"
        await world.caller().ask("POST", CHAT, BODY, authorization="Bearer mine")
        assert engine.asked[0].header(b"authorization") == b"Bearer engine-key"


async def test_connections_are_used_again_and_a_stale_one_costs_no_replica(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        engine = world.engine()
        caller = world.caller()
        for _ in range(3):
            await caller.ask("POST", CHAT, BODY)
        assert engine.connections == 1
        await engine.servers[0].aclose()
        head, _ = await caller.ask("POST", CHAT, BODY)
        assert head.status_code == 200
        assert engine.connections == 2
        assert world.gateway.statistics().retries == 0


@pytest.mark.parametrize(
    "broken",
    [hang_up, junk, head_only_then_close, *map(status_script, (502, 503, 504))],
    ids=["hangs up", "junk", "head only", "502", "503", "504"],
)
async def test_before_the_first_byte_another_replica_answers(
    autojump_clock: MockClock, broken: Script
) -> None:
    async with open_world() as world:
        bad = world.engine(broken, target(HERE))
        good = world.engine(hello, target(THERE))
        head, body = await world.caller().ask("POST", CHAT, BODY)
        assert (head.status_code, body) == (200, b'{"hello": 1}')
        assert (len(bad.asked), len(good.asked)) == (1, 1)
        assert world.gateway.statistics().retries == 1


async def test_a_refused_connection_means_the_next_replica(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.backends.put(target(HERE), refuse)
        world.backends.put(target(THERE), refuse)
        world.engine(hello, target(YONDER))
        head, _ = await world.caller().ask("POST", CHAT, BODY)
        assert head.status_code == 200
        assert world.backends.dialled[-1] == "yonder"
        assert world.gateway.statistics().retries <= 2


async def test_an_error_of_the_engine_is_the_answer(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.engine(status_script(500), target(HERE))
        other = world.engine(hello, target(THERE))
        head, _ = await world.caller().ask("POST", CHAT, BODY)
        assert head.status_code == 500
        assert not other.asked


async def test_a_peer_learns_the_digest_and_its_answer_keeps_its_name(
    autojump_clock: MockClock,
) -> None:
    async def named(asked: Asked, reply: Reply) -> None:
        await reply.whole(b"{}", 200, ("X-P2PMesh-Served-By", "there/whole"))

    async with open_world() as world:
        world.backends.keys[target().part] = "local-only"
        peer = world.engine(named, target(THERE))
        head, _ = await world.caller().ask("POST", CHAT, b"{}")
        assert peer.asked[0].header(b"x-p2pmesh-part") == str(target().part).encode()
        assert peer.asked[0].header(b"authorization") is None
        assert field_of(head, "x-p2pmesh-served-by") == "there/whole"


async def test_a_suspicion_while_waiting_means_the_next_replica_at_once(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        stopped = world.engine(work, target(THERE))
        caller = world.caller()
        await caller.send("POST", CHAT, BODY)
        await trio.sleep(30)
        assert len(stopped.asked) == 1
        world.engine(hello, target(YONDER))
        began = trio.current_time()
        world.backends.suspect(THERE)
        head, _ = await caller.answer()
        assert head.status_code == 200
        assert trio.current_time() - began < 0.1
        assert stopped.closed == 1


async def test_a_suspicion_during_an_answer_ends_only_silence(autojump_clock: MockClock) -> None:
    async def slow(asked: Asked, reply: Reply) -> None:
        await reply.head(200, SSE)
        for _ in range(10):
            await reply.data(b"data: x\n\n")
            await trio.sleep(SUSPECT_SILENCE_S / 2)
        await trio.sleep_forever()

    async with open_world() as world:
        world.engine(slow, target(THERE))
        caller = world.caller()
        await caller.send("POST", CHAT, BODY)
        assert isinstance(await caller.event(), h11.Response)
        began = trio.current_time()
        world.backends.suspect(THERE)
        text = b""
        with pytest.raises(h11.RemoteProtocolError):
            while isinstance(event := await caller.event(), h11.Data):
                text += event.data
        assert text.count(b"data: x\n\n") == 10
        assert b"answer_interrupted" in text
        assert trio.current_time() - began == pytest.approx(5.5 * SUSPECT_SILENCE_S, abs=0.1)


@pytest.mark.parametrize("streamed", [True, False])
async def test_after_the_first_byte_nothing_is_tried_again(
    autojump_clock: MockClock, *, streamed: bool
) -> None:
    async def half(asked: Asked, reply: Reply) -> None:
        if streamed:
            await reply.head(200, SSE)
            await reply.data(b"data: one\n\nda")
        else:
            await reply.head(200, ("Content-Length", "100"))
            await reply.data(b"half")
        await trio.sleep(1)
        await reply.stream.aclose()

    async with open_world() as world:
        world.engine(half, target(HERE))
        other = world.engine(hello, target(THERE))
        caller = world.caller()
        await caller.send("POST", CHAT, BODY)
        text = (await caller.rest()).partition(b"\r\n\r\n")[2]
        if streamed:
            assert b"data: one\n\nda" in text
            last = [line for line in text.split(b"\n") if line.startswith(b"data: {")][-1]
            assert error_of(last[6:])["code"] == "answer_interrupted"
            assert b"\r\n0\r\n" not in text
        else:
            assert text == b"half"
        assert not other.asked
        assert world.gateway.statistics().failures == 1


async def test_events_pass_one_by_one(autojump_clock: MockClock) -> None:
    go_on = [trio.Event() for _ in range(3)]

    async def stepwise(asked: Asked, reply: Reply) -> None:
        await reply.head(200, SSE)
        for number, event in enumerate(go_on):
            await reply.data(b"data: %d\n\n" % number)
            await event.wait()
        await reply.end()

    async with open_world() as world:
        world.engine(stepwise)
        caller = world.caller()
        await caller.send("POST", CHAT, BODY)
        head = await caller.event()
        assert isinstance(head, h11.Response)
        assert field_of(head, "transfer-encoding") == "chunked"
        for number, event in enumerate(go_on):
            data = await caller.event()
            assert isinstance(data, h11.Data)
            assert data.data == b"data: %d\n\n" % number
            event.set()
        assert isinstance(await caller.event(), h11.EndOfMessage)


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_client_that_leaves_frees_the_engine_at_once(
    autojump_clock: MockClock, *, streaming: bool
) -> None:
    async def endless(asked: Asked, reply: Reply) -> None:
        if streaming:
            await reply.head(200, SSE)
            await reply.data(b"data: x\n\n")
        await trio.sleep_forever()

    async with open_world() as world:
        engine = world.engine(endless)
        caller = world.caller()
        await caller.send("POST", CHAT, BODY)
        if streaming:
            await caller.event()
        await trio.sleep(1)
        assert world.gateway.statistics().in_flight == {ALPHA: 1}
        await caller.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert engine.closed == 1
        statistics = world.gateway.statistics()
        assert statistics.in_flight == {}
        assert statistics.clients_gone == 1
        assert statistics.connections == 0


async def test_where_local_never_leaves_this_machine(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        other = world.engine(hello, target(THERE))
        caller = world.caller()
        head, _ = await caller.ask("POST", CHAT, BODY, x_p2pmesh_where="local")
        assert head.status_code == 503
        head, _ = await caller.ask("POST", CHAT, BODY, x_p2pmesh_where="moon")
        assert head.status_code == 400
        assert not other.asked
        head, _ = await caller.ask("POST", CHAT, BODY, x_p2pmesh_where="mesh")
        assert head.status_code == 200


async def test_a_hop_between_two_gateways(autojump_clock: MockClock) -> None:
    async with open_world() as owner, open_world() as entry:
        engine = owner.engine(echo)

        async def dial() -> trio.abc.Stream:
            return owner.peer_stream(HERE)

        entry.backends.put(target(THERE), dial)
        caller = entry.caller()
        for _ in range(3):
            head, body = await caller.ask("POST", CHAT, BODY)
            assert (head.status_code, body) == (200, BODY)
            assert field_of(head, "x-p2pmesh-served-by") == "there/whole"
        assert entry.backends.dialled == ["there"]
        engine.script = silent
        await caller.send("POST", CHAT, BODY)
        await trio.sleep(1)
        await caller.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert engine.closed == 1
        assert owner.gateway.statistics().in_flight == {}


async def test_an_engine_gets_only_as_many_connections_as_it_has_threads_for(
    autojump_clock: MockClock,
) -> None:
    gate = trio.Event()
    at_once = 0

    async def gated(asked: Asked, reply: Reply) -> None:
        nonlocal at_once
        at_once += 1
        await gate.wait()
        await hello(asked, reply)

    async with open_world() as world:
        local = world.engine(gated, target(HERE, slots=3))
        callers = [world.caller() for _ in range(9)]
        for caller in callers:
            await caller.send("POST", CHAT, BODY)
        await trio.testing.wait_all_tasks_blocked()
        assert at_once == 3 + ENGINE_SPARE
        assert world.gateway.statistics().in_flight == {ALPHA: 9}
        await callers[8].stream.aclose()  # the last one in the queue costs the engine nothing
        gate.set()
        for caller in callers[:8]:
            assert (await caller.answer())[0].status_code == 200
        assert local.connections == 3 + ENGINE_SPARE
        assert len(local.asked) == 8


async def test_a_large_body_goes_out_whole() -> None:
    # On the real clock: a jumping one does not wait for the thread that scans long bodies.
    large = b'{"model": "alpha", "x": "%s"}' % (b"y" * 3_000_000)
    async with open_world() as world:
        world.engine(echo)
        head, body = await world.caller().ask("POST", CHAT, large)
        assert head.status_code == 200
        assert body == large


async def test_callers_are_independent(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.engine(echo)

        async def one(number: int) -> None:
            body = b'{"model": "alpha", "n": %d}' % number
            assert (await world.caller().ask("POST", CHAT, body))[1] == body
            done.append(number)

        done: list[int] = []
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one, number)
        assert len(done) == 50
        assert isinstance(world.caller(), HttpCaller)

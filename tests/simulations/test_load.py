from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.lowlevel

from p2pmesh.gateway.serve import Gateway
from simulations.load import Place, Sample, ask_many, get_json, stream_many
from tests.gateway.fake import Asked, FakeBackends, FakeEngine, Reply, Script, hello, target

BODY = {"model": "alpha"}


@asynccontextmanager
async def answering(script: Script) -> AsyncIterator[tuple[Place, FakeEngine]]:
    """A gateway on a real port before an engine with a script."""
    backends = FakeBackends()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            engine = FakeEngine(nursery, script)
            backends.put(target(), engine.dial)
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            await nursery.start(Gateway(backends).serve, listeners)
            yield Place(host="127.0.0.1", port=listeners[0].socket.getsockname()[1]), engine
            nursery.cancel_scope.cancel()


async def test_every_request_is_answered_timed_and_attributed() -> None:
    async with answering(hello) as (place, engine):
        sample = await ask_many(place, BODY, connections=4, requests=40)
        assert len(engine.asked) == len(sample.latencies_s) == 40
        assert sample.served_by == {"here"}
        assert 0 < sample.percentile_ms(50) <= sample.percentile_ms(99) < 60_000
        assert sample.requests_per_s > 0
        assert engine.connections <= 4


async def test_a_delay_shows_in_the_latencies() -> None:
    async def slow(asked: Asked, reply: Reply) -> None:
        await trio.sleep(0.05)
        await hello(asked, reply)

    async with answering(slow) as (place, _):
        sample = await ask_many(place, BODY, connections=2, requests=4)
        assert sample.latencies_s[0] >= 0.05
        assert sample.elapsed_s >= 0.1


async def test_the_events_of_all_streams_are_counted() -> None:
    text = b"".join(b"data: %d\n\n" % number for number in range(50)) + b"data: [DONE]\n\n"

    async def whole(asked: Asked, reply: Reply) -> None:
        await reply.head(200, ("Content-Type", "text/event-stream"))
        await reply.data(text)
        await reply.end()

    async with answering(whole) as (place, _):
        streamed = await stream_many(place, BODY, connections=3)
        assert streamed.events == 3 * 51
        assert 0 < streamed.first_s <= streamed.elapsed_s


async def test_an_error_stops_the_measurement() -> None:
    async with answering(hello) as (place, _):
        with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="not the answer hoped for")):
            await ask_many(place, {"model": "nobody"}, connections=1, requests=1)
        assert (await get_json(place, "/v1/models"))["data"][0]["id"] == "alpha"


def test_percentiles_are_of_the_sorted_latencies() -> None:
    latencies_s = tuple(number / 1000 for number in range(101))
    sample = Sample(latencies_s=latencies_s, elapsed_s=2, served_by=frozenset())
    assert (sample.percentile_ms(50), sample.percentile_ms(99)) == (50, 99)
    assert sample.requests_per_s == 50.5

"""Where a request goes when replicas fail, stall, or say that they work on it."""

from __future__ import annotations

import h11
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2pmesh.errors import PeerError
from p2pmesh.gateway import proxy as proxy_module
from p2pmesh.gateway.limits import ENGINE_SPARE, STALL_S
from tests.gateway.fake import (
    BODY,
    CHAT,
    FAR,
    HERE,
    THERE,
    YONDER,
    Asked,
    FakeEngine,
    Reply,
    Script,
    World,
    echo,
    error_of,
    hang_up,
    hello,
    open_world,
    refuse,
    silent,
    status_script,
    target,
    work,
)


async def head_then_nothing(asked: Asked, reply: Reply) -> None:
    await reply.head(200, ("Content-Length", "5"))
    await trio.sleep_forever()


async def drip(asked: Asked, reply: Reply) -> None:
    for byte in b"HTTP/1.1 200 OK\r\n" + 1000 * b"x":
        await reply.stream.send_all(bytes([byte]))
        await trio.sleep(1)


async def not_a_peer() -> trio.abc.Stream:
    await trio.lowlevel.checkpoint()
    raise PeerError("127.0.0.1:22 does not speak TLS 1.3")


async def ask_long(world: World) -> float:
    """Ask for what takes a minute; how long it took."""
    began = trio.current_time()
    assert (await world.caller().ask("POST", CHAT, BODY))[0].status_code == 200
    return trio.current_time() - began


async def test_what_is_not_the_peer_means_the_next_replica(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.backends.put(target(THERE), not_a_peer)
        world.engine(hello, target(YONDER))
        for _ in range(16):
            head, _ = await world.caller().ask("POST", CHAT, BODY)
            assert head.status_code == 200
        assert world.backends.dialled.count("there") <= 1


@pytest.mark.parametrize("script", [silent, head_then_nothing, drip])
async def test_a_stalled_peer_costs_one_client_five_seconds(
    autojump_clock: MockClock, script: Script
) -> None:
    async with open_world() as world:
        bad = world.engine(script, target(THERE))
        world.engine(hello, target(YONDER))
        began = trio.current_time()
        taken = []
        while not bad.asked:  # the first of two is drawn
            taken.append(await ask_long(world))
        assert taken[-1] == pytest.approx(STALL_S, abs=0.01)
        assert [await ask_long(world) for _ in range(16)] == pytest.approx([0] * 16, abs=0.01)
        assert len(bad.asked) == 1
        assert trio.current_time() - began < STALL_S + 1
        assert bad.closed == 1


async def test_a_replica_that_was_avoided_is_tried_again_and_forgiven(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        bad = world.engine(silent, target(THERE))
        world.engine(hello, target(YONDER))
        while not bad.asked:
            await ask_long(world)
        bad.script = hello
        await trio.sleep(31)
        for _ in range(20):
            assert await ask_long(world) < 0.1
        assert len(bad.asked) > 2


async def test_those_who_wait_at_the_door_of_a_failed_replica_go_elsewhere(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        bad = world.engine(silent, target(THERE, slots=1))
        world.engine(hello, target(YONDER, slots=1))
        taken: list[float] = []

        async def ask() -> None:
            taken.append(await ask_long(world))

        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(ask)
        assert max(taken) == pytest.approx(STALL_S, abs=0.1)
        assert len(bad.asked) == 2 * (1 + ENGINE_SPARE)


async def test_a_peer_that_works_is_waited_for(autojump_clock: MockClock) -> None:
    async def slow(asked: Asked, reply: Reply) -> None:
        await work(asked, reply, 300)
        await hello(asked, reply)

    async with open_world() as world:
        world.engine(slow, target(THERE))
        caller = world.caller()
        assert (await caller.ask("POST", CHAT, BODY))[0].status_code == 200
        assert caller.informed == 0, "that is between nodes"
        assert world.gateway.statistics().retries == 0


async def test_a_local_engine_may_be_silent_as_long_as_it_is_healthy(
    autojump_clock: MockClock,
) -> None:
    async def slow(asked: Asked, reply: Reply) -> None:
        await trio.sleep(300)
        await hello(asked, reply)

    async with open_world() as world:
        world.engine(slow)
        assert await ask_long(world) == pytest.approx(300, abs=0.1)
        assert world.gateway.statistics().retries == 0


async def test_a_peer_cannot_say_for_ever_that_it_works(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_module, "ANSWER_DEADLINE_S", 60)
    async with open_world() as world:
        bad = world.engine(work, target(THERE))
        caller = world.caller()
        await caller.send("POST", CHAT, BODY)
        await trio.sleep(1)
        world.engine(hello, target(YONDER))
        assert (await caller.answer())[0].status_code == 200
        assert trio.current_time() == pytest.approx(60, abs=0.1)
        assert len(bad.asked) == 1


async def test_nor_say_it_all_the_time(autojump_clock: MockClock) -> None:
    async def flood(asked: Asked, reply: Reply) -> None:
        said = h11.InformationalResponse(status_code=102, headers=[(b"x", b"y" * 100)])
        while True:
            await reply.send(said)
            await trio.sleep(0.01)

    async with open_world() as world:
        world.engine(flood, target(THERE))
        caller = world.caller()
        await caller.send("POST", CHAT, BODY)
        await trio.testing.wait_all_tasks_blocked()
        world.engine(hello, target(YONDER))
        assert (await caller.answer())[0].status_code == 200
        assert trio.current_time() < 1


async def test_three_replicas_that_fail_are_enough(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        engines = [
            world.engine(status_script(504), target(node)) for node in (HERE, THERE, YONDER, FAR)
        ]
        head, body = await world.caller().ask("POST", CHAT, BODY)
        assert head.status_code == 502
        assert error_of(body)["code"] == "replicas_failed"
        assert "3 replicas of alpha failed to answer" in error_of(body)["message"]
        assert sum(len(engine.asked) for engine in engines) == 3


async def test_a_busy_replica_has_not_failed(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        engines: list[FakeEngine] = []

        async def once_all_were_asked(asked: Asked, reply: Reply) -> None:
            ready = sum(len(engine.asked) for engine in engines) > 4
            await (hello if ready else status_script(503))(asked, reply)

        engines += [
            world.engine(once_all_were_asked, target(node)) for node in (HERE, THERE, YONDER, FAR)
        ]
        assert (await world.caller().ask("POST", CHAT, BODY))[0].status_code == 200
        assert [len(engine.asked) > 0 for engine in engines] == [True] * 4


@pytest.mark.parametrize("peer", [True, False])
async def test_a_request_that_kills_an_engine_over_a_kept_connection_counts(
    autojump_clock: MockClock, *, peer: bool
) -> None:
    async with open_world() as world:

        async def script(asked: Asked, reply: Reply) -> None:
            if b"poison" in asked.body:
                world.backends.put(target(HERE), refuse)  # it is gone, not only the connection
                await hang_up(asked, reply)
            else:
                await hello(asked, reply)

        engine = world.engine(script, target(HERE))
        caller = world.caller(peer=peer)
        await caller.ask("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
        others = [world.engine(hang_up, target(node)) for node in (THERE, YONDER)]
        poison = BODY[:-1] + b', "x": "poison"}'
        head, body = await caller.ask("POST", CHAT, poison, x_p2pmesh_part=str(target().part))
        assert head.status_code == 502
        assert error_of(body)["code"] == "engine_lost"
        assert (len(engine.asked), engine.connections) == (2, 1)
        assert sum(len(other.asked) for other in others) == (0 if peer else 1)


async def test_junk_that_comes_with_the_first_part_of_an_answer_costs_no_answer(
    autojump_clock: MockClock,
) -> None:
    async def junk(asked: Asked, reply: Reply) -> None:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        await reply.stream.send_all(head + b"5\r\nhello\r\njunk\r\n")
        await trio.sleep_forever()

    async with open_world() as world:
        bad = world.engine(junk, target(THERE))
        caller = world.caller()
        await caller.send("POST", CHAT, BODY)
        await trio.testing.wait_all_tasks_blocked()
        world.engine(hello, target(YONDER))
        head, body = await caller.answer()
        assert (head.status_code, body) == (200, b'{"hello": 1}')
        assert len(bad.asked) == 1


async def test_who_worked_on_a_request_over_a_kept_stream_and_left_is_not_given_it_again(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:

        async def script(asked: Asked, reply: Reply) -> None:
            if b"poison" in asked.body:
                await work(asked, reply, 3)
                await hang_up(asked, reply)
            else:
                await hello(asked, reply)

        engine = world.engine(script, target(THERE))
        caller = world.caller()
        await caller.ask("POST", CHAT, BODY)
        poison = BODY[:-1] + b', "x": "poison"}'
        head, body = await caller.ask("POST", CHAT, poison)
        assert head.status_code == 502
        assert error_of(body)["code"] == "engine_lost"
        asked = [b"poison" in one.body for one in engine.asked]
        assert asked == [False, True, True], "the kept stream counts as the first of two losses"


async def test_requests_leave_a_local_engine_that_hangs(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        hanging = world.engine(silent, target(HERE))
        callers = world.caller(), world.caller(peer=True)
        for caller in callers:
            await caller.send("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
        await trio.sleep(20)
        world.engine(hello, target(THERE))
        world.backends.suspect(HERE)
        began = trio.current_time()
        assert (await callers[0].answer())[0].status_code == 200
        assert (await callers[1].answer())[0].status_code == 503, "its own node asks another"
        assert trio.current_time() - began < 0.1
        assert (len(hanging.asked), hanging.closed) == (2, 2)
        assert callers[1].informed in (9, 10)


async def test_a_peer_hears_that_its_request_waits_and_is_worked_on(
    autojump_clock: MockClock,
) -> None:
    async def slow(asked: Asked, reply: Reply) -> None:
        await trio.sleep(60)
        await echo(asked, reply)

    async with open_world() as owner, open_world() as entry:
        engine = owner.engine(slow, target(HERE, slots=1))

        async def dial() -> trio.abc.Stream:
            return owner.peer_stream(FAR)

        entry.backends.put(target(THERE, slots=1), dial)
        taken: list[float] = []

        async def ask() -> None:
            taken.append(await ask_long(entry))

        async with trio.open_nursery() as nursery:
            for _ in range(6):  # half of them wait at the door of the engine
                nursery.start_soon(ask)
        assert sorted(taken) == pytest.approx([60] * 3 + [120] * 3, abs=0.1)
        assert len(engine.asked) == 6
        assert entry.gateway.statistics().retries == 0

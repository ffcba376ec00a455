"""How long the proxy waits for a replica, and how often it tries again."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from p2pmesh.gateway.limits import READY_WAIT_S, UNSERVED_WAIT_S, Limits
from tests.gateway.fake import (
    BODY,
    CHAT,
    HERE,
    THERE,
    YONDER,
    Asked,
    Reply,
    error_of,
    field_of,
    hang_up,
    hello,
    model,
    open_world,
    refuse,
    status_script,
    target,
    work,
)


async def test_a_replacement_is_waited_for_even_when_the_loss_came_late(
    autojump_clock: MockClock,
) -> None:
    async def late(asked: Asked, reply: Reply) -> None:
        await work(asked, reply, 3 * READY_WAIT_S)
        await reply.stream.aclose()

    async with open_world() as world:
        world.engine(late, target(THERE))
        caller = world.caller()
        await caller.send("POST", CHAT, BODY)
        await trio.sleep(3 * READY_WAIT_S + 0.1)
        world.backends.drop(target(THERE))
        await trio.sleep(READY_WAIT_S / 2)
        world.engine(hello, target(YONDER))
        assert (await caller.answer())[0].status_code == 200


async def test_a_replacement_is_waited_for(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.backends.put(target(THERE), refuse)
        caller = world.caller()
        await caller.send("POST", CHAT, BODY)
        await trio.sleep(1)
        assert world.gateway.statistics().waiting == 1
        world.backends.drop(target(THERE))
        world.backends.set_models(model(state="loading"))
        await trio.sleep(READY_WAIT_S / 2)
        world.engine(hello, target(YONDER))
        head, _ = await caller.answer()
        assert head.status_code == 200
        assert world.gateway.statistics().waiting == 0


async def test_the_same_replica_is_tried_again_after_a_pause_though_nothing_changed(
    autojump_clock: MockClock,
) -> None:
    async def first_busy(asked: Asked, reply: Reply) -> None:
        await (status_script(503) if len(engine.asked) < 4 else hello)(asked, reply)

    async with open_world() as world:
        engine = world.engine(first_busy)
        began = trio.current_time()
        head, _ = await world.caller().ask("POST", CHAT, BODY)
        assert head.status_code == 200
        assert len(engine.asked) == 4
        assert 1 < trio.current_time() - began < 2


@pytest.mark.parametrize("peer", [True, False])
async def test_a_request_that_kills_engines_is_not_given_to_all_of_them(
    autojump_clock: MockClock, *, peer: bool
) -> None:
    async with open_world() as world:
        engines = [world.engine(hang_up, target(node)) for node in (HERE, THERE)]
        caller = world.caller(peer=peer)
        head, body = await caller.ask("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
        assert head.status_code == 502
        assert error_of(body)["code"] == "engine_lost"
        assert sum(len(engine.asked) for engine in engines) == (1 if peer else 2)


async def test_failing_replicas_are_not_tried_in_a_tight_loop(autojump_clock: MockClock) -> None:
    async with open_world(limits=Limits(ready_wait_s=2)) as world:
        world.backends.put(target(), refuse)

        async def restless() -> None:
            while True:
                await trio.sleep(0.001)
                world.backends.announce()

        world.nursery.start_soon(restless)
        head, body = await world.caller().ask("POST", CHAT, BODY)
        assert head.status_code == 503
        assert "refused" in error_of(body)["message"]
        assert len(world.backends.dialled) <= 41


@pytest.mark.parametrize(
    ("state", "waits_s"),
    [("ready", READY_WAIT_S), ("loading", READY_WAIT_S), ("failed", UNSERVED_WAIT_S)],
)
async def test_waiting_ends_with_503_and_a_time_to_come_again(
    autojump_clock: MockClock, state: str, waits_s: float
) -> None:
    async with open_world(model(state=state)) as world:
        began = trio.current_time()
        head, body = await world.caller().ask("POST", CHAT, BODY)
        assert head.status_code == 503
        assert error_of(body)["code"] == "model_not_ready"
        assert field_of(head, "retry-after") == "5"
        assert trio.current_time() - began == pytest.approx(waits_s, abs=0.01)


@pytest.mark.parametrize("waited_s", [0.0, UNSERVED_WAIT_S + 1])
async def test_a_model_that_this_mesh_does_not_have_is_not_waited_for_long(
    autojump_clock: MockClock, waited_s: float
) -> None:
    """The node has changed its mesh, say."""
    async with open_world(model(state="loading")) as world:
        caller = world.caller()
        began = trio.current_time()
        await caller.send("POST", CHAT, BODY)
        await trio.sleep(waited_s)
        await trio.testing.wait_all_tasks_blocked()
        world.backends.set_models()
        head, body = await caller.answer()
        assert head.status_code == 503
        assert "(not served): no node of this mesh has it any more" in error_of(body)["message"]
        assert trio.current_time() - began == pytest.approx(max(waited_s, UNSERVED_WAIT_S), abs=0.1)


async def test_waiting_is_bounded(autojump_clock: MockClock) -> None:
    async with open_world(model(state="loading"), limits=Limits(waiting=2)) as world:
        callers = [world.caller() for _ in range(2)]
        for caller in callers:
            await caller.send("POST", CHAT, BODY)
        await trio.sleep(1)
        head, body = await world.caller().ask("POST", CHAT, BODY)
        assert head.status_code == 429
        assert field_of(head, "retry-after") == "5"
        assert error_of(body)["type"] == "rate_limit_error"
        await callers[0].stream.aclose()
        await trio.sleep(1)
        assert world.gateway.statistics().waiting == 1


async def test_a_peer_is_never_sent_on_and_never_kept_waiting(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        other = world.engine(hello, target(THERE))
        caller = world.caller(peer=True)
        began = trio.current_time()
        head, _ = await caller.ask("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
        assert head.status_code == 503
        assert not other.asked
        assert trio.current_time() - began < 1
        local = world.engine(hello, target(HERE))
        head, _ = await caller.ask("POST", CHAT, BODY, x_p2pmesh_part=str(target().part))
        assert head.status_code == 200
        assert len(local.asked) == 1
        assert field_of(head, "x-p2pmesh-served-by") == "here/whole"

from __future__ import annotations

import json
from typing import Any

import h11
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2pmesh.gateway.limits import Limits
from p2pmesh.models.cards import ModelDigest
from p2pmesh.web_policy import WebPolicy
from tests.gateway.fake import (
    ALPHA,
    BETA,
    CHAT,
    HERE,
    THERE,
    Asked,
    Reply,
    World,
    echo,
    field_of,
    hang_up,
    hello,
    model,
    open_world,
    refuse,
    silent,
    target,
)

BODY = b'{"model": "alpha"}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


async def ask_json(world: World, method: str, path: str, **headers: str) -> tuple[int, Any]:
    head, body = await world.caller().ask(method, path, b"", **headers)
    assert field_of(head, "content-type") == "application/json"
    return head.status_code, json.loads(body)


async def refused(world: World, path: str = CHAT, body: bytes = BODY) -> tuple[int, str]:
    head, text = await world.caller().ask("POST", path, body)
    return head.status_code, json.loads(text)["error"]["code"]


async def test_models_are_listed_and_shown_one_by_one() -> None:
    async with open_world(model(), model(BETA, "beta", state="loading")) as world:
        for prefix in ("/v1", ""):
            status, listed = await ask_json(world, "GET", prefix + "/models")
            assert status == 200
            assert [entry["id"] for entry in listed["data"]] == ["alpha", "beta"]
            status, one = await ask_json(world, "GET", prefix + "/models/beta")
            assert (status, one["id"], one["p2pmesh"]["state"]) == (200, "beta", "loading")
        assert (await ask_json(world, "GET", "/v1/models/" + BETA))[1]["id"] == "beta"
        status, error = await ask_json(world, "GET", "/v1/models/gamma")
        assert (status, error["error"]["code"]) == (404, "model_not_found")


async def test_health_follows_the_models() -> None:
    async with open_world(model(state="loading")) as world:
        assert (await ask_json(world, "GET", "/health"))[0] == 503
        world.backends.set_models(model())
        assert await ask_json(world, "GET", "/health") == (200, {"status": "ok", "models": 1})


async def test_head_is_get_without_a_body() -> None:
    async with open_world() as world:
        caller = world.caller()
        caller_get = world.caller()
        got, body = await caller_get.ask("GET", "/v1/models")
        for _ in range(2):
            await caller.stream.send_all(b"HEAD /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            data = await caller.stream.receive_some()
            assert data.startswith(b"HTTP/1.1 200 OK\r\n")
            assert data.endswith(b"\r\n\r\n")
            assert b"content-length: %d" % len(body) in data.lower()
        assert got.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/health", 405),
        ("GET", "/x", 404),
    ],
)
async def test_wrong_methods_and_paths(method: str, path: str, status: int) -> None:
    async with open_world() as world:
        got, error = await ask_json(world, method, path)
        assert got == status
        assert error["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", (400, "invalid_json")),
        (b'{"model": 1}', (400, "invalid_type")),
        (b'{"model": "gamma"}', (404, "model_not_found")),
        (b'{"model": "vectors"}', (400, "model_not_supported")),
        (b'{"model": "twin"}', (409, "model_ambiguous")),
    ],
)
async def test_refusals(body: bytes, expected: tuple[int, str]) -> None:
    twins = [model(ModelDigest(c * 64), "twin") for c in "01"]
    async with open_world(model(), model(BETA, "vectors", modality="embedding"), *twins) as world:
        world.engine()
        assert await refused(world, body=body) == expected


@pytest.mark.parametrize("body", [b"{}", b'{"model": "auto"}', b'{"model": ""}'])
async def test_auto_picks_a_model_of_the_right_kind(body: bytes) -> None:
    async with open_world(model(), model(BETA, "vectors", modality="embedding")) as world:
        chat = world.engine(echo)
        vectors = world.engine(echo, target(digest=BETA))
        assert (await world.caller().ask("POST", CHAT, body))[1] == body
        assert (len(chat.asked), len(vectors.asked)) == (1, 0)
        assert (await world.caller().ask("POST", "/embeddings", body))[1] == body
        assert vectors.asked[0].head.target == b"/v1/embeddings"


async def test_auto_without_any_model_is_503() -> None:
    async with open_world(model(modality="embedding")) as world:
        assert await refused(world, body=b"{}") == (503, "model_not_ready")


async def test_auto_goes_on_to_the_next_model_when_one_is_lost(autojump_clock: MockClock) -> None:
    large, small = model(size_bytes=9), model(BETA, "beta")
    async with open_world(large, small) as world:
        world.backends.put(target(), refuse)
        there = target(THERE, BETA)
        world.engine(hello, there)
        for _ in range(2):
            head, _ = await world.caller().ask("POST", CHAT, b"{}")
            assert head.status_code == 200
        assert world.backends.dialled == ["here", "there"], "one that just failed comes last"
        assert world.backends.failures == [target().key]
        assert (await refused(world))[0] == 503, "who names a model gets that one or none"


async def test_auto_asks_no_second_model_after_a_request_that_killed_an_engine() -> None:
    async with open_world(model(size_bytes=9), model(BETA, "beta")) as world:
        world.engine(hang_up)
        untouched = world.engine(hello, target(HERE, BETA))
        assert await refused(world, body=b"{}") == (502, "engine_lost")
        assert untouched.asked == []


async def test_auto_waits_when_no_model_can_answer_yet(autojump_clock: MockClock) -> None:
    loading = [model(state="loading", size_bytes=9), model(BETA, "beta", state="loading")]
    async with open_world(*loading) as world:
        caller = world.caller()
        await caller.send("POST", CHAT, b"{}")
        await trio.sleep(20)
        world.engine()
        assert (await caller.answer())[0].status_code == 200


async def test_a_strangers_page_is_refused_before_any_work() -> None:
    async with open_world() as world:
        engine = world.engine()
        head, body = await world.caller().ask("POST", CHAT, BODY, origin="https://evil.com")
        assert head.status_code == 403
        assert json.loads(body)["error"]["code"] == "origin_not_allowed"
        assert field_of(head, "access-control-allow-origin") is None
        head, body = await world.caller().ask("GET", "/v1/models", host="evil.com:9337")
        assert head.status_code == 403
        assert json.loads(body)["error"]["code"] == "host_not_allowed"
        assert not engine.asked


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/alpha", "/health"])
async def test_a_peer_may_ask_for_inference_only(path: str) -> None:
    async with open_world() as world:
        world.engine()
        caller = world.caller(peer=True)
        for method in ("GET", "OPTIONS"):
            head, body = await caller.ask(method, path)
            assert head.status_code == 403
            assert json.loads(body)["error"]["code"] == "not_for_peers"
        head, _ = await caller.ask("POST", CHAT, BODY, **{"x-p2pmesh-part": f"{ALPHA}/whole"})
        assert head.status_code == 200, "the stream goes on"


async def test_names_and_pages_of_the_settings_are_let_in() -> None:
    policy = WebPolicy(hosts={"ai.example.org"}, origins={"https://chat.example"})
    async with open_world(policy=policy) as world:
        world.engine()
        head, _ = await world.caller().ask("POST", CHAT, BODY, host="ai.example.org")
        assert head.status_code == 200
        head, _ = await world.caller().ask("POST", CHAT, BODY, origin="https://chat.example")
        assert head.status_code == 200
        assert field_of(head, "access-control-allow-origin") == "https://chat.example"
        head, body = await world.caller().ask("POST", CHAT, BODY, host="b.example")
        assert head.status_code == 403
        assert json.loads(body)["error"]["message"].endswith("--hosts b.example")


async def test_a_page_of_this_machine_may_read_every_answer() -> None:
    async with open_world() as world:
        world.engine()
        page = "http://localhost:3131"
        for method, path, body in (
            ("GET", "/v1/models", b""),
            ("POST", CHAT, BODY),
            ("GET", "/x", b""),
        ):
            head, _ = await world.caller().ask(method, path, body, origin=page)
            assert field_of(head, "access-control-allow-origin") == page
            assert "X-P2PMesh-Served-By" in (field_of(head, "access-control-expose-headers") or "")


async def test_a_preflight_is_answered() -> None:
    async with open_world() as world:
        caller = world.caller()
        for _ in range(2):
            head, body = await caller.ask(
                "OPTIONS",
                CHAT,
                origin="http://127.0.0.1:3131",
                access_control_request_method="POST",
                access_control_request_headers="authorization, content-type",
            )
            assert (head.status_code, body) == (204, b"")
            assert field_of(head, "access-control-allow-methods") == "POST, OPTIONS"
            assert field_of(head, "access-control-allow-headers") == "authorization, content-type"


async def test_a_declared_body_that_is_too_large_is_413_before_it_is_sent(
    autojump_clock: MockClock,
) -> None:
    async with open_world(limits=Limits(body_bytes=1 << 20)) as world:
        ask = POST + b"Expect: 100-continue\r\nContent-Length: 2000000\r\n\r\n"
        got = await world.caller().raw(ask)
        assert got.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in got.lower()
        assert b"request_too_large" in got
        assert b" 100 " not in got


async def test_a_chunked_body_that_grows_too_large_is_413_and_the_connection_ends(
    autojump_clock: MockClock,
) -> None:
    async with open_world(limits=Limits(body_bytes=1 << 20)) as world:
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        got = await world.caller().raw(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 40)
        assert got.startswith(b"HTTP/1.1 413 ")
        head, body = await world.caller().ask("GET", "/health")
        assert (head.status_code, bool(body)) == (200, True)


async def test_bodies_together_are_bounded_and_given_back() -> None:
    async with open_world(limits=Limits(bodies_bytes=1000)) as world:
        world.engine(silent)
        hog = world.caller()
        await hog.send("POST", CHAT, b'{"model": "alpha", "x": "%s"}' % (b"y" * 900))
        await trio.testing.wait_all_tasks_blocked()
        assert await refused(world, body=b'{"model": "alpha", "x": "%s"}' % (b"y" * 100)) == (
            503,
            "overloaded",
        )
        await hog.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        world.engine(echo)
        for _ in range(5):
            head, _ = await world.caller().ask("POST", CHAT, BODY + b" " * 800)
            assert head.status_code == 200


async def test_bodies_of_peers_leave_room_for_those_of_clients() -> None:
    async with open_world(limits=Limits(bodies_bytes=1000)) as world:
        world.engine(echo)
        peer = world.caller(peer=True)
        await peer.stream.send_all(POST + b"Content-Length: 950\r\n\r\n" + b"x" * 940)
        await trio.testing.wait_all_tasks_blocked()
        head, _ = await world.caller().ask("POST", CHAT, BODY + b" " * 900)
        assert head.status_code == 200


async def test_expect_100_continue() -> None:
    async with open_world() as world:
        world.engine(echo)
        caller = world.caller()
        await caller.stream.send_all(
            POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY)
        )
        assert (await caller.stream.receive_some()).startswith(b"HTTP/1.1 100 ")
        await caller.stream.send_all(BODY)
        got = bytes(await caller.stream.receive_some())
        assert got.startswith(b"HTTP/1.1 200 ")
        assert got.endswith(BODY)


async def test_a_chunked_request_body_arrives_whole() -> None:
    async with open_world() as world:
        engine = world.engine(echo)
        caller = world.caller()
        half = len(BODY) // 2
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (BODY[:half], BODY[half:]))
        await caller.stream.send_all(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        await trio.testing.wait_all_tasks_blocked()
        assert not engine.asked
        await caller.stream.send_all(b"0\r\n\r\n")
        assert bytes(await caller.stream.receive_some()).endswith(BODY)
        assert engine.asked[0].header(b"content-length") == str(len(BODY)).encode()


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with open_world() as world:
        engine = world.engine(echo)
        caller = world.caller()
        bodies = [b'{"model": "alpha", "n": %d}' % n for n in range(5)]
        asks = [POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body) for body in bodies]
        asks.insert(2, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await caller.stream.send_all(b"".join(asks))
        got = await caller.until(
            lambda got: got.count(b"HTTP/1.1 200") == 6 and got.endswith(bodies[-1])
        )
        places = [got.index(body) for body in bodies]
        assert places == sorted(places)
        assert places[1] < got.index(b'"status"') < places[2]
        assert engine.connections == 1


async def test_http_1_0_clients_get_an_answer_and_the_end() -> None:
    async def chunked(asked: Asked, reply: Reply) -> None:
        await reply.head(200, ("Content-Type", "text/event-stream"))
        await reply.data(b"data: 1\n\n")
        await reply.data(b"data: 2\n\n")
        await reply.end()

    async with open_world() as world:
        world.engine(chunked)
        got = await world.caller().raw(b"GET /health HTTP/1.0\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200 ")
        ask = b"POST %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s"
        got = await world.caller().raw(ask % (CHAT.encode(), len(BODY), BODY))
        head, _, body = got.partition(b"\r\n\r\n")
        assert body == b"data: 1\n\ndata: 2\n\n"
        assert b"chunked" not in head.lower()


async def test_requests_in_flight_are_bounded_then_queued_then_429(
    autojump_clock: MockClock,
) -> None:
    async with open_world(limits=Limits(in_flight=2, queue=1, queue_wait_s=10)) as world:
        gate = trio.Event()

        async def gated(asked: Asked, reply: Reply) -> None:
            await gate.wait()
            await hello(asked, reply)

        engine = world.engine(gated)
        callers = [world.caller() for _ in range(3)]
        for caller in callers:
            await caller.send("POST", CHAT, BODY)
            await trio.testing.wait_all_tasks_blocked()
        assert len(engine.asked) == 2
        assert world.gateway.statistics().queued == 1
        assert await refused(world) == (429, "too_many_requests")
        peer = world.caller(peer=True)  # has places of its own
        await peer.send("POST", CHAT, BODY, x_p2pmesh_part=f"{ALPHA}/whole")
        await trio.testing.wait_all_tasks_blocked()
        assert len(engine.asked) == 3
        await callers[2].stream.aclose()  # leaving the queue frees it
        await trio.testing.wait_all_tasks_blocked()
        assert world.gateway.statistics().queued == 0
        gate.set()
        assert (await callers[0].answer())[0].status_code == 200


async def test_the_queue_is_left_after_a_time(autojump_clock: MockClock) -> None:
    async with open_world(limits=Limits(in_flight=1, queue_wait_s=10)) as world:
        world.engine(silent)
        hog = world.caller()
        await hog.send("POST", CHAT, BODY)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        assert await refused(world) == (429, "too_many_requests")
        assert trio.current_time() - began == pytest.approx(10)


async def test_a_peer_without_a_digest_or_with_an_unknown_one_is_404() -> None:
    async with open_world() as world:
        world.engine()
        caller = world.caller(peer=True)
        assert (await caller.ask("POST", CHAT, BODY))[0].status_code == 404
        head, _ = await caller.ask("POST", CHAT, BODY, x_p2pmesh_part=f"{BETA}/whole")
        assert head.status_code == 404


async def test_a_client_cannot_choose_by_the_peers_header() -> None:
    async with open_world(model(), model(BETA, "beta")) as world:
        alpha = world.engine(hello, target(THERE))
        beta = world.engine(hello, target(digest=BETA))
        await world.caller().ask("POST", CHAT, BODY, x_p2pmesh_part=f"{BETA}/whole")
        assert (len(alpha.asked), len(beta.asked)) == (1, 0)
        assert alpha.asked[0].header(b"x-p2pmesh-part") == f"{ALPHA}/whole".encode()


async def test_a_get_with_a_body_does_not_confuse_the_next_request() -> None:
    async with open_world() as world:
        ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello"
        caller = world.caller()
        await caller.stream.send_all(ask + ask)
        got = await caller.until(lambda got: got.count(b'"status"') == 2)
        assert got.count(b"HTTP/1.1 200") == 2
        assert isinstance(caller.http, h11.Connection)


# --- expert shards --------------------------------------------------------------------------------

SHARD, OTHER_SHARD, HEAD = "shard-00112233aabbccdd", "shard-ffeeddcc00112233", f"stage-{'a' * 16}-0"


async def test_full_quality_comes_from_the_whole_model_or_a_pipeline_only() -> None:
    async with open_world(model()) as world:
        shard = world.engine(hello, target(part=SHARD))
        ask = {"x-p2pmesh-quality": "full"}
        head, body = await world.caller().ask("POST", CHAT, BODY, **ask)
        error = json.loads(body)["error"]
        assert (head.status_code, error["code"]) == (503, "full_quality_not_served")
        assert "no node runs it whole" in error["message"]
        assert not shard.asked
        head, _ = await world.caller().ask("POST", CHAT, BODY)
        assert field_of(head, "x-p2pmesh-served-by") == f"here/{SHARD}"
        smaller = world.engine(hello, target(THERE, BETA))
        world.backends.stand_in(ALPHA, BETA)
        head, _ = await world.caller().ask("POST", CHAT, BODY, **ask)
        assert head.status_code == 503
        assert not smaller.asked
        world.engine(hello, target(THERE, part=HEAD))
        for _ in range(5):
            head, _ = await world.caller().ask("POST", CHAT, BODY, **ask)
            assert field_of(head, "x-p2pmesh-served-by") == f"there/{HEAD}"


async def test_a_conversation_moves_when_its_shard_fails() -> None:
    async with open_world(model()) as world:
        parts = {"here": target(part=SHARD), "there": target(THERE, part=OTHER_SHARD)}
        for one in parts.values():
            world.engine(hello, one)

        async def answered_by() -> str:
            head, _ = await world.caller().ask("POST", CHAT, BODY)
            return str(field_of(head, "x-p2pmesh-served-by")).partition("/")[0]

        first = await answered_by()
        assert {await answered_by() for _ in range(5)} == {first}
        del world.backends.ways[parts[first].key]
        assert {await answered_by() for _ in range(5)} == {*parts} - {first}


async def test_a_request_that_stays_here_is_told_where_its_model_runs() -> None:
    async with open_world(model(nodes=("there",))) as world:
        world.engine(hello, target(THERE))
        head, body = await world.caller().ask("POST", CHAT, BODY, **{"x-p2pmesh-where": "local"})
        assert head.status_code == 503
        message = json.loads(body)["error"]["message"]
        assert message == (
            "alpha does not run here but on there, and X-P2PMesh-Where: local keeps requests here"
        )


async def test_a_quality_that_is_none_is_refused() -> None:
    async with open_world(model()) as world:
        world.engine()
        head, body = await world.caller().ask("POST", CHAT, BODY, **{"x-p2pmesh-quality": "best"})
        assert head.status_code == 400
        assert "X-P2PMesh-Quality is full or any" in json.loads(body)["error"]["message"]


# --- guests ---------------------------------------------------------------------------------------


async def test_a_guest_is_answered_like_a_client_by_whatever_node_can() -> None:
    async with open_world(model()) as world:
        world.engine(hello, target(THERE))
        guest = world.guest()
        head, _ = await guest.ask("POST", CHAT, BODY)
        assert head.status_code == 200
        assert field_of(head, "x-p2pmesh-served-by") == "there/whole"
        head, listed = await world.guest().ask("GET", "/v1/models")
        assert (head.status_code, json.loads(listed)["data"][0]["id"]) == (200, "alpha")


async def test_a_guests_request_that_may_not_leave_its_machine_is_refused() -> None:
    async with open_world(model()) as world:
        engine = world.engine()
        head, body = await world.guest().ask("POST", CHAT, BODY, **{"x-p2pmesh-where": "local"})
        assert (head.status_code, json.loads(body)["error"]["code"]) == (503, "model_not_ready")
        assert not engine.asked


async def test_web_pages_reach_no_model_through_a_guest() -> None:
    async with open_world(model(), policy=WebPolicy(hosts=frozenset({"evil.com"}))) as world:
        engine = world.engine()
        head, _ = await world.guest().ask("POST", CHAT, BODY, host="evil.com")
        assert head.status_code == 403
        assert not engine.asked


async def test_guests_that_wait_keep_no_peer_from_its_answer() -> None:
    limits = Limits(in_flight=1, queue=1)
    async with open_world(model(), limits=limits) as world:
        world.engine(hello)
        world.engine(silent, target(THERE))
        world.backends.drop(target())
        waiting = world.guest()
        world.nursery.start_soon(waiting.ask, "POST", CHAT, BODY)
        await trio.testing.wait_all_tasks_blocked()
        world.engine(hello)
        part = {"x-p2pmesh-part": f"{ALPHA}/whole"}
        head, _ = await world.caller(peer=True).ask("POST", CHAT, BODY, **part)
        assert head.status_code == 200


@pytest.mark.parametrize("part", ["", "whole", "shard-1", "stage-00112233aabbccdd-1"])
async def test_a_peer_reaches_only_parts_that_take_requests(part: str) -> None:
    async with open_world(model()) as world:
        chosen = {"x-p2pmesh-part": f"{ALPHA}/{part}" if part != "whole" else part}
        head, body = await world.caller(peer=True).ask("POST", CHAT, BODY, **chosen)
        assert (head.status_code, json.loads(body)["error"]["code"]) == (404, "model_not_found")

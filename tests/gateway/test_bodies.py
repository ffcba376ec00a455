from __future__ import annotations

import mmap
import random

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.gateway.bodies import (
    RATE_MIN_BYTES_PER_S,
    SMALL_BODY_BYTES,
    BodyBudget,
    IncomingBody,
)
from p2pmesh.gateway.limits import BODY_BYTES_MAX, BODY_STALL_S, Limits
from p2pmesh.gateway.openai import ApiError, read_request
from p2pmesh.gateway.scan import Body

MIB = 1024 * 1024


def incoming(
    declared_bytes: int = 0, *, budget: BodyBudget | None = None, now: float = 0.0
) -> IncomingBody:
    return IncomingBody(
        budget or BodyBudget(Limits()),
        declared_bytes=declared_bytes,
        stall_s=BODY_STALL_S,
        now=now,
    )


def received(data: bytes, piece_bytes: int, declared_bytes: int) -> Body:
    body = incoming(declared_bytes)
    for start in range(0, len(data), piece_bytes):
        body.add(data[start : start + piece_bytes], 0.0)
    return body.finish()


def test_the_budget_of_bodies() -> None:
    budget = BodyBudget(Limits(body_bytes=100, bodies_bytes=150))
    budget.check(100)
    with pytest.raises(ApiError) as caught:
        budget.check(101)
    assert caught.value.status == 413
    budget.take(100)
    with pytest.raises(ApiError) as caught:
        budget.take(51)
    assert caught.value.status == 503
    budget.give_back(100)
    budget.take(150)


def refusal(budget: BodyBudget, size_bytes: int) -> int:
    with pytest.raises(ApiError) as caught:
        budget.take(size_bytes, large=True)
    return caught.value.status


def test_large_bodies_leave_a_reserve_to_small_ones() -> None:
    budget = BodyBudget(Limits(bodies_bytes=80 * MIB))
    budget.take(70 * MIB, large=True)
    assert refusal(budget, 1) == 503
    budget.take(10 * MIB)
    budget.give_back(70 * MIB)
    budget.take(60 * MIB, large=True)


def test_a_body_that_outgrows_the_reserve_is_refused_when_it_does() -> None:
    budget = BodyBudget(Limits(bodies_bytes=16 * MIB))
    budget.take(14 * MIB, large=True)
    body = incoming(budget=budget)
    body.add(bytes(SMALL_BODY_BYTES), 0.0)
    with pytest.raises(ApiError, match="Too much request data") as caught:
        body.add(b"x", 0.0)
    assert caught.value.status == 503
    assert body.size_bytes == SMALL_BODY_BYTES, "what was not kept is not counted"


@settings(max_examples=30, deadline=None)
@given(
    size_bytes=st.sampled_from(
        [0, 1, SMALL_BODY_BYTES - 1, SMALL_BODY_BYTES, SMALL_BODY_BYTES + 1, 5 * MIB + 3]
    ),
    piece_bytes=st.integers(1000, 3 * MIB),
    declared=st.sampled_from(["rightly", "not", "too short"]),
)
def test_a_body_is_what_came(size_bytes: int, piece_bytes: int, declared: str) -> None:
    data = random.Random(size_bytes).randbytes(size_bytes)
    declared_bytes = {"rightly": size_bytes, "not": 0, "too short": size_bytes // 2}[declared]
    body = received(data, piece_bytes, declared_bytes)
    assert len(body) == size_bytes
    assert bytes(body) == data
    assert isinstance(body, mmap.mmap) == (size_bytes > SMALL_BODY_BYTES)


def test_the_model_of_a_large_body_is_read() -> None:
    padding = b"y" * (2 * MIB)
    data = b'{"x": "%s", "model": "alpha", "z": ["}"]}' % padding
    assert read_request(received(data, 100_000, len(data)), "").model == "alpha"
    with pytest.raises(ApiError, match="not JSON"):
        read_request(received(b" " * (2 * MIB), 100_000, 0), "")


def test_a_large_bodys_memory_goes_back_to_the_system() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    bodies = [received(bytes(BODY_BYTES_MAX // 2), 65536, BODY_BYTES_MAX // 2) for _ in range(4)]
    held = process.memory_info().rss - before
    assert held > 100 * MIB
    del bodies
    assert process.memory_info().rss - before < held / 4


def test_a_declared_length_takes_no_memory_before_it_comes() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    body = incoming(BODY_BYTES_MAX)
    body.add(bytes(2 * MIB), 0.0)
    assert process.memory_info().rss - before < 16 * MIB


def test_a_byte_now_and_then_does_not_keep_a_body_alive() -> None:
    body = incoming()
    now = 0.0
    while now < body.due:
        body.add(b"x", now)
        now += 5.0
    assert now == pytest.approx(BODY_STALL_S, abs=5.1)


def test_a_burst_buys_no_time_beyond_the_usual() -> None:
    body = incoming()
    body.add(bytes(32 * MIB), 1.0)
    assert body.due == 1.0 + BODY_STALL_S


def test_a_slow_line_goes_on() -> None:
    body = incoming()
    for second in range(1, 200):
        assert second < body.due
        body.add(bytes(RATE_MIN_BYTES_PER_S + 100), float(second))

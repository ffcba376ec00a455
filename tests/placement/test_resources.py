"""Budgets of recorded machines, and how slowly the published one moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.placement.resources import (
    BAND_STEPS,
    GIB,
    HOLD_S,
    MIB,
    RAM_RESERVE_BYTES,
    STEP_BYTES,
    Memory,
    Published,
    budget_bytes,
    coarse_speed,
    publish,
    stage_bytes,
)


def ram(total: int, free: int, held: int = 0) -> Memory:
    return Memory(total_bytes=total * MIB, free_bytes=free * MIB, held_bytes=held * MIB, main=True)


def gpu(total: int, free: int, held: int = 0) -> Memory:
    return Memory(total_bytes=total * MIB, free_bytes=free * MIB, held_bytes=held * MIB)


@pytest.mark.parametrize(
    ("memories", "expected_mib"),
    [
        ([ram(16384, 12000)], 9000),
        ([ram(16384, 8000, held=4000)], 9000),
        ([ram(8192, 4096)], 2048),  # the reserve is more than a quarter
        ([ram(4096, 2048)], 0),
        ([ram(4096, 1000)], 0),
        ([ram(16384, 16000, held=4000)], 12288),  # counted twice by the system: never over all
        ([ram(32768, 2048), gpu(24080, 23657)], 17742),
        ([ram(32768, 24000), gpu(24119, 23852), gpu(12087, 3010)], 18000 + 17889 + 2257),
        ([ram(32768, 2048), gpu(24080, 3657, held=20000)], 17742),
        ([], 0),
    ],
)
def test_automatic_budget(memories: list[Memory], expected_mib: int) -> None:
    assert budget_bytes(None, memories) // MIB == expected_mib


@pytest.mark.parametrize("fixed", [0, 1, 123_456_789, 900 * GIB])
def test_a_named_budget_is_taken_exactly(fixed: int) -> None:
    assert budget_bytes(fixed, [ram(8192, 4096)]) == fixed


@given(total=st.integers(0, 2**42), free=st.integers(0, 2**42), held=st.integers(0, 2**42))
def test_the_reserve_is_never_promised(total: int, free: int, held: int) -> None:
    memory = Memory(total_bytes=total, free_bytes=free, held_bytes=held, main=True)
    budget = budget_bytes(None, [memory])
    usable = min(free + held, total)
    assert 0 <= budget <= max(usable - RAM_RESERVE_BYTES, 0)
    assert budget <= usable * 3 // 4


OLD = Published(budget_bytes=40 * STEP_BYTES, since_s=100.0)
LATER = OLD.since_s + HOLD_S


@pytest.mark.parametrize(
    ("budget", "now_s", "expected_steps"),
    [
        (40 * STEP_BYTES, LATER, 40),
        (42 * STEP_BYTES + STEP_BYTES - 1, LATER, 40),
        (38 * STEP_BYTES, LATER, 40),
        (43 * STEP_BYTES, LATER, 43),
        (43 * STEP_BYTES + 17, LATER, 43),
        (38 * STEP_BYTES - 1, LATER, 37),
        (0, LATER, 0),
        (0, LATER - 1, 40),
        (90 * STEP_BYTES, LATER - 1, 40),
    ],
)
def test_steps_band_and_hold(budget: int, now_s: float, expected_steps: int) -> None:
    new = publish(OLD, budget, exact=False, now_s=now_s)
    assert new.budget_bytes == expected_steps * STEP_BYTES
    assert (new is OLD) == (expected_steps == 40)
    if new is not OLD:
        assert new.since_s == now_s


def test_the_first_is_published_at_once_in_whole_steps() -> None:
    first = publish(None, 5 * STEP_BYTES + 1, exact=False, now_s=0.0)
    assert first == Published(budget_bytes=5 * STEP_BYTES, since_s=0.0)


def test_a_named_budget_is_neither_rounded_nor_held() -> None:
    first = publish(None, 12_345, exact=True, now_s=0.0)
    assert first.budget_bytes == 12_345
    assert publish(first, 12_346, exact=True, now_s=1.0).budget_bytes == 12_346
    assert publish(first, 12_345, exact=True, now_s=9.0) is first


@given(st.lists(st.integers(0, 10 * GIB), max_size=50))
def test_wobbling_within_the_band_publishes_nothing_new(wobbles: list[int]) -> None:
    published = publish(None, 100 * GIB, exact=False, now_s=0.0)
    for index, wobble in enumerate(wobbles):
        near = 100 * GIB - wobble % (BAND_STEPS * STEP_BYTES)
        assert publish(published, near, exact=False, now_s=1000.0 * index) is published


speeds = st.integers(0, 2**30)


@given(speeds)
def test_a_coarse_speed_is_near_and_has_two_significant_bits(speed: int) -> None:
    coarse = coarse_speed(speed)
    assert abs(coarse - speed) * 4 <= speed
    assert coarse == 0 or bin(coarse)[4:].strip("0") == ""
    assert coarse_speed(coarse) == coarse


@given(speeds, speeds)
def test_coarse_speeds_keep_their_order(one: int, other: int) -> None:
    assert coarse_speed(min(one, other)) <= coarse_speed(max(one, other))


def test_measurements_of_one_machine_are_one_coarse_speed() -> None:
    seen = [26_531, 26_903, 25_992, 23_274, 26_864]
    assert {coarse_speed(speed) for speed in seen} == {24_576}


def test_stages_take_main_memory_only() -> None:
    main, device = ram(16 * 1024, 12 * 1024), gpu(8 * 1024, 8 * 1024)
    told = budget_bytes(None, [main, device])
    assert stage_bytes(told, exact=False, main=main, devices=[device]) == budget_bytes(None, [main])
    assert stage_bytes(told, exact=False, main=main, devices=[]) == told
    shrunk = budget_bytes(None, [device]) - MIB
    assert stage_bytes(shrunk, exact=False, main=main, devices=[device]) == 0


def test_of_a_budget_that_was_named_stages_may_take_all_that_main_memory_has() -> None:
    main, device = ram(16 * 1024, 12 * 1024), gpu(8 * 1024, 8 * 1024)
    for named, found in ((4, 4), (14, 14), (20, 14)):
        given = stage_bytes(named * 1024 * MIB, exact=True, main=main, devices=[device])
        assert given == found * 1024 * MIB
    assert stage_bytes(20 * 1024 * MIB, exact=True, main=main, devices=[]) == 20 * 1024 * MIB

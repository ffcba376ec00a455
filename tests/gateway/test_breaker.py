from __future__ import annotations

from p2pmesh.gateway.breaker import (
    FORGET_S,
    PAUSE_MAX_S,
    PAUSE_MIN_S,
    PAUSE_PER_LOST_S,
    TRIAL_S,
    Breaker,
)
from tests.gateway.fake import THERE, YONDER, target

KEY, OTHER = target(THERE).key, target(YONDER).key


def pause_of(breaker: Breaker, now: float) -> float:
    """How long the replica is still avoided, to a tenth of a second."""
    tenths = 0
    while breaker.is_avoided(KEY, now + tenths / 10):
        tenths += 1
    return tenths / 10


def test_a_failure_is_avoided_for_a_while_and_concerns_one_replica() -> None:
    breaker = Breaker()
    assert not breaker.is_avoided(KEY, 100)
    breaker.failed(KEY, 100)
    assert breaker.is_avoided(KEY, 100)
    assert not breaker.is_avoided(OTHER, 100)
    assert pause_of(breaker, 100) == PAUSE_MIN_S


def test_the_pause_doubles_with_each_failed_trial_and_has_a_bound() -> None:
    breaker, now, pauses = Breaker(), 100.0, []
    for _ in range(8):
        breaker.attempted(KEY, now)
        breaker.failed(KEY, now)
        pauses.append(pause_of(breaker, now))
        now += pauses[-1]
    assert pauses == [1, 2, 4, 8, 16, PAUSE_MAX_S, PAUSE_MAX_S, PAUSE_MAX_S]


def test_requests_that_fail_together_are_one_failure() -> None:
    breaker = Breaker()
    for _ in range(30):
        breaker.attempted(KEY, 100)
    for _ in range(30):
        breaker.failed(KEY, 101)
    assert pause_of(breaker, 101) == PAUSE_MIN_S


def test_after_the_pause_one_request_may_try() -> None:
    breaker = Breaker()
    breaker.failed(KEY, 100)
    now = 100 + PAUSE_MIN_S
    assert not breaker.is_avoided(KEY, now)
    breaker.attempted(KEY, now)
    assert breaker.is_avoided(KEY, now)
    breaker.succeeded(KEY)
    assert not breaker.is_avoided(KEY, now)
    breaker.failed(KEY, now)
    assert pause_of(breaker, now) == PAUSE_MIN_S


def test_a_trial_whose_client_left_does_not_keep_the_others_away_for_ever() -> None:
    breaker = Breaker()
    breaker.failed(KEY, 100)
    breaker.attempted(KEY, 101)
    assert pause_of(breaker, 101) == TRIAL_S


def test_a_failure_that_took_long_is_avoided_longer() -> None:
    breaker = Breaker()
    breaker.failed(KEY, 100, lost_s=2)
    assert pause_of(breaker, 100) == 2 * PAUSE_PER_LOST_S
    breaker.failed(OTHER, 100, lost_s=3600)
    assert not breaker.is_avoided(OTHER, 100 + PAUSE_MAX_S)


def test_old_failures_are_forgotten() -> None:
    breaker = Breaker()
    breaker.failed(KEY, 100, lost_s=4)
    later = 100 + PAUSE_MAX_S + FORGET_S
    breaker.failed(OTHER, later)
    breaker.failed(KEY, later)
    assert pause_of(breaker, later) == PAUSE_MIN_S

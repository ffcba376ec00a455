from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gossip.probe import (
    ALL_MUTE_S,
    CALM_S,
    MISSES_MAX,
    MISSES_MIN,
    MUTE_S,
    PROBE_TIMEOUT_S,
    SILENCE_S,
    Prober,
)
from p2pmesh.identity.keys import NodeId

ANNA, BEN = NodeId(b"a" * 16), NodeId(b"b" * 16)


def linked() -> Prober:
    prober = Prober()
    prober.link_up(ANNA, 0.0)
    return prober


def miss(prober: Prober, at: float) -> None:
    prober.ask(ANNA, at)
    assert prober.count({ANNA}, at + PROBE_TIMEOUT_S) == [ANNA]


def test_nothing_is_known_of_strangers() -> None:
    prober = Prober()
    assert not prober.answering(ANNA)
    assert prober.misses(ANNA) == 0
    assert prober.miss_limit(ANNA) == MISSES_MIN
    assert prober.rtt_s(ANNA) is None
    assert prober.heard_at(ANNA) is None
    assert not prober.quiet(ANNA, 1e9)


def test_a_link_is_a_sign_of_life() -> None:
    prober = linked()
    assert prober.answering(ANNA)
    assert prober.heard_at(ANNA) == 0.0


def test_answers_are_timed_and_smoothed() -> None:
    prober = linked()
    for at, rtt in ((1.0, 0.1), (2.0, 0.2)):
        token = prober.ask(ANNA, at)
        assert token is not None
        assert prober.answered(ANNA, token, at + rtt) == pytest.approx(rtt)
    assert prober.rtt_s(ANNA) == pytest.approx(0.125)


def test_one_probe_is_under_way_at_a_time() -> None:
    prober = linked()
    token = prober.ask(ANNA, 1.0)
    assert token is not None
    assert prober.ask(ANNA, 1.1) is None
    prober.answered(ANNA, token, 1.2)
    assert prober.ask(ANNA, 1.3) not in (None, token)


@pytest.mark.parametrize("node", [ANNA, BEN])
def test_an_answer_that_nobody_waits_for_is_not_timed(node: NodeId) -> None:
    prober = linked()
    token = prober.ask(ANNA, 1.0)
    assert token is not None
    assert prober.answered(node, token + 1, 1.1) is None
    prober.count({ANNA}, 1.0 + PROBE_TIMEOUT_S)
    assert prober.answered(node, token, 1.6) is None
    assert prober.rtt_s(ANNA) is None


def test_an_answer_on_a_later_link_is_not_that_of_the_earlier() -> None:
    prober = linked()
    token = prober.ask(ANNA, 1.0)
    assert token is not None
    prober.link_down(ANNA, 1.1)
    prober.link_up(ANNA, 1.2)
    assert prober.answered(ANNA, token, 1.3) is None
    assert prober.ask(ANNA, 1.3) is not None


def test_misses_add_up_until_a_sign_of_life() -> None:
    prober = linked()
    for second in range(1, 4):
        prober.ask(ANNA, float(second))
        assert prober.count({ANNA}, second + PROBE_TIMEOUT_S / 2) == []
        assert prober.count({ANNA}, second + PROBE_TIMEOUT_S) == [ANNA]
        assert prober.misses(ANNA) == second
        assert not prober.answering(ANNA)
    prober.heard(ANNA, 3.9)
    assert prober.misses(ANNA) == 0
    assert prober.answering(ANNA)


def test_seconds_without_a_wanted_link_count_like_misses() -> None:
    prober = linked()
    prober.link_down(ANNA, 5.0)
    assert not prober.answering(ANNA)
    assert prober.count({ANNA}, 5.9) == []
    assert prober.count({ANNA}, 6.0) == [ANNA]
    assert prober.count({ANNA}, 6.5) == []
    assert prober.count({ANNA}, 7.0) == [ANNA]
    assert prober.misses(ANNA) == 2


def test_who_was_never_linked_is_missed_from_when_it_is_wanted() -> None:
    prober = Prober()
    assert prober.count({ANNA}, 100.0) == []
    assert prober.count({ANNA}, 101.0) == [ANNA]


def test_nobody_is_missed_without_being_wanted() -> None:
    prober = linked()
    prober.link_down(ANNA, 5.0)
    for second in range(6, 20):
        assert prober.count(set(), float(second)) == []
    assert prober.misses(ANNA) == 0


def test_time_that_a_link_was_not_wanted_counts_for_nothing() -> None:
    prober = linked()
    prober.link_down(ANNA, 5.0)
    for second in range(6, 20):
        prober.count(set(), float(second))
    assert prober.count({ANNA}, 20.0) == []
    assert prober.count({ANNA}, 20.5) == []
    assert prober.count({ANNA}, 21.0) == [ANNA]


def test_word_of_absence_counts_as_all_misses_but_only_without_a_link() -> None:
    prober = linked()
    prober.nobody_there(ANNA)
    assert prober.misses(ANNA) == 0
    prober.link_down(ANNA, 1.0)
    prober.nobody_there(ANNA)
    assert prober.misses(ANNA) == prober.miss_limit(ANNA)


def false_alarm(prober: Prober, at: float) -> None:
    for number in range(MISSES_MIN - 1):
        miss(prober, at + number)
    prober.heard(ANNA, at + MISSES_MIN)


def test_each_false_alarm_buys_a_lossy_link_more_time_up_to_a_bound() -> None:
    prober = linked()
    for number in range(1, 10):
        false_alarm(prober, 5.0 * number)
        assert prober.miss_limit(ANNA) == min(MISSES_MIN + number, MISSES_MAX)


def test_calm_takes_it_back_step_by_step() -> None:
    prober = linked()
    false_alarm(prober, 0.0)
    false_alarm(prober, 5.0)
    calm_from = 5.0 + MISSES_MIN
    prober.count({ANNA}, calm_from + CALM_S - 1)
    assert prober.miss_limit(ANNA) == MISSES_MIN + 2
    for step in (1, 2, 3):
        prober.count({ANNA}, calm_from + CALM_S * step)
    assert prober.miss_limit(ANNA) == MISSES_MIN


def test_a_single_miss_and_a_link_that_came_back_are_no_false_alarm() -> None:
    prober = linked()
    miss(prober, 1.0)
    prober.heard(ANNA, 2.0)
    prober.link_down(ANNA, 3.0)
    prober.nobody_there(ANNA)
    prober.link_up(ANNA, 9.0)
    prober.heard(ANNA, 9.1)
    assert prober.miss_limit(ANNA) == MISSES_MIN


def test_quiet_is_who_should_have_probed_by_now() -> None:
    prober = linked()
    assert not prober.quiet(ANNA, SILENCE_S)
    assert prober.quiet(ANNA, SILENCE_S + 0.1)
    prober.heard(ANNA, 5.0)
    assert not prober.quiet(ANNA, 5.0 + SILENCE_S)


def test_a_link_on_which_nothing_comes_for_long_is_mute() -> None:
    prober = linked()
    prober.link_up(BEN, MUTE_S - PROBE_TIMEOUT_S)  # this machine itself hears something
    prober.ask(ANNA, MUTE_S - PROBE_TIMEOUT_S)
    assert prober.unresponsive_links(MUTE_S) == [], "the answer may still come"
    miss(prober, MUTE_S)
    assert prober.unresponsive_links(MUTE_S - 0.1) == []
    assert prober.unresponsive_links(MUTE_S) == [ANNA]
    prober.heard(ANNA, MUTE_S)
    assert prober.unresponsive_links(2 * MUTE_S) == []
    prober.link_down(ANNA, 2 * MUTE_S)
    assert prober.unresponsive_links(3 * MUTE_S) == [], "there is no link"


def test_one_miss_before_a_suspicion_there_is_doubt() -> None:
    prober = linked()
    for misses in range(1, MISSES_MIN):
        assert not prober.doubts(ANNA)
        miss(prober, float(misses))
    assert prober.doubts(ANNA)
    prober.heard(ANNA, 10.0)
    assert not prober.doubts(ANNA)


def test_when_nobody_says_anything_all_links_are_dead() -> None:
    prober = linked()
    prober.link_up(BEN, 0.5)
    assert prober.unresponsive_links(0.5 + ALL_MUTE_S) == [], "nobody was asked"
    miss(prober, ALL_MUTE_S)
    assert prober.unresponsive_links(0.4 + ALL_MUTE_S) == []
    assert prober.unresponsive_links(0.5 + ALL_MUTE_S) == [ANNA, BEN]
    prober.heard(BEN, 0.5 + ALL_MUTE_S)
    assert prober.unresponsive_links(0.5 + ALL_MUTE_S) == []


def test_own_absence_is_nobodys_fault() -> None:
    prober = linked()
    miss(prober, 1.0)
    prober.ask(ANNA, 2.0)
    prober.count({ANNA, BEN}, 2.1)
    prober.forgive(100.0)
    assert prober.answering(ANNA)
    assert prober.count({ANNA, BEN}, 100.0) == []
    assert not prober.quiet(ANNA, 101.0)


def test_what_nobody_needs_is_forgotten_but_never_a_link() -> None:
    prober = linked()
    prober.count({BEN}, 1.0)
    prober.count({BEN}, 2.0)
    prober.keep_only([BEN])
    assert prober.misses(BEN) == 1
    assert prober.answering(ANNA)
    prober.keep_only([])
    assert prober.misses(BEN) == 0
    assert prober.answering(ANNA)
    prober.link_down(ANNA, 3.0)
    prober.keep_only([])
    assert prober.heard_at(ANNA) is None


Step = Callable[[Prober, float], object]


def say_gone(prober: Prober, _now: float) -> None:
    prober.nobody_there(ANNA)


STEPS: list[Step] = [
    lambda prober, now: prober.link_up(ANNA, now),
    lambda prober, now: prober.link_down(ANNA, now),
    lambda prober, now: prober.heard(ANNA, now),
    say_gone,
    lambda prober, now: prober.ask(ANNA, now) if prober.heard_at(ANNA) is not None else None,
    lambda prober, now: prober.count({ANNA}, now),
    lambda prober, now: prober.count(set(), now),
    lambda prober, now: prober.forgive(now),
]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from([0.0, 0.25, 0.5, 1.0, 7.0]))))
def test_misses_never_outrun_time(steps: list[tuple[Step, float]]) -> None:
    prober, now, last_well_at, told_gone = Prober(), 0.0, 0.0, False
    for step, after_s in steps:
        now += after_s
        before = prober.misses(ANNA)
        step(prober, now)
        told_gone |= step is say_gone and prober.misses(ANNA) > before
        if not prober.misses(ANNA):
            last_well_at, told_gone = now, False
        # A miss takes the time-out of a probe, or a second without a link.
        assert told_gone or prober.misses(ANNA) <= 1 + (now - last_well_at) / PROBE_TIMEOUT_S
        assert MISSES_MIN <= prober.miss_limit(ANNA) <= MISSES_MAX

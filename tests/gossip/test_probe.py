from __future__ import annotations

import pytest

from p2pmesh.gossip.events import Health
from p2pmesh.gossip.probe import MISSES_DEAD, PROBE_TIMEOUT_S, SILENCE_DEAD_S, Prober
from p2pmesh.identity.keys import NodeId

ANNA = NodeId(b"a" * 16)


def linked() -> Prober:
    prober = Prober()
    assert prober.link_up(ANNA, 0.0) is Health.LIVE
    return prober


def test_a_node_never_reached_is_suspect() -> None:
    assert Prober().health(ANNA) is Health.SUSPECT
    assert Prober().rtt_s(ANNA) is None


def test_answers_are_timed_and_smoothed() -> None:
    prober = linked()
    for at, rtt in ((1.0, 0.1), (2.0, 0.2)):
        token = prober.ask(ANNA, at)
        assert token is not None
        assert prober.ask(ANNA, at) is None
        prober.answered(ANNA, token, at + rtt)
    assert prober.rtt_s(ANNA) == pytest.approx(0.125)
    prober.answered(ANNA, 999, 9.0)
    assert prober.rtt_s(ANNA) == pytest.approx(0.125)


def test_misses_add_up_until_a_sign_of_life() -> None:
    prober = linked()
    seen = []
    for second in range(1, MISSES_DEAD + 1):
        prober.ask(ANNA, float(second))
        assert prober.missed(second + PROBE_TIMEOUT_S / 2) == []
        seen += prober.missed(second + PROBE_TIMEOUT_S)
    assert seen == [(ANNA, Health.SUSPECT), (ANNA, Health.DEAD)]
    assert prober.heard(ANNA, 9.0) is Health.LIVE
    prober.ask(ANNA, 10.0)
    assert prober.missed(10.0 + PROBE_TIMEOUT_S) == [(ANNA, Health.SUSPECT)]


def test_a_broken_link_and_silence_end_dead_too() -> None:
    prober = linked()
    assert prober.link_down(ANNA) is Health.SUSPECT
    prober.heard(ANNA, 1.0)
    assert prober.link_down(ANNA) is Health.SUSPECT
    assert prober.missed(1.0 + SILENCE_DEAD_S - 0.1) == []
    assert prober.missed(1.0 + SILENCE_DEAD_S) == [(ANNA, Health.DEAD)]


def test_word_of_absence_counts_only_without_a_link() -> None:
    prober = linked()
    assert prober.nobody_there(ANNA) is Health.LIVE
    prober.link_down(ANNA)
    assert prober.nobody_there(ANNA) is Health.DEAD


def test_own_absence_is_nobodys_fault() -> None:
    prober = linked()
    prober.ask(ANNA, 1.0)
    prober.forgive(100.0)
    assert prober.missed(100.0) == []
    assert prober.health(ANNA) is Health.LIVE


def test_what_nobody_knows_any_more_is_forgotten() -> None:
    prober = linked()
    prober.forget_except([])
    assert prober.health(ANNA) is Health.LIVE
    prober.link_down(ANNA)
    prober.nobody_there(ANNA)
    prober.forget_except([ANNA])
    assert prober.health(ANNA) is Health.DEAD
    prober.forget_except([])
    assert prober.health(ANNA) is Health.SUSPECT

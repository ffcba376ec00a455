from __future__ import annotations

import pytest

from p2pmesh.identity.keys import NodeId
from p2pmesh.transport.banlist import (
    BAR_FIRST_S,
    BAR_MAX_S,
    BARRED_MAX,
    GOOD_CONDUCT_S,
    HOSTS_MAX,
    TROUBLE_BURST,
    TROUBLE_RATE_PER_S,
    Banlist,
    Troublesome,
)

ANNA, BERT = NodeId(b"a" * 16), NodeId(b"b" * 16)


def test_who_did_nothing_is_not_barred() -> None:
    barred = Banlist()
    barred.bar(BERT, 0.0)
    assert not barred.is_barred(ANNA, 0.0)


def test_a_bar_ends_after_its_pause() -> None:
    barred = Banlist()
    assert barred.bar(ANNA, 100.0) == BAR_FIRST_S
    assert barred.is_barred(ANNA, 100.0)
    assert barred.is_barred(ANNA, 100.9)
    assert not barred.is_barred(ANNA, 101.0)


def test_pauses_double_up_to_a_minute_and_stay_there() -> None:
    barred, now, pauses = Banlist(), 0.0, []
    for _ in range(40):
        pauses.append(barred.bar(ANNA, now))
        now += pauses[-1]
    assert pauses[:7] == [1, 2, 4, 8, 16, 32, 60]
    assert set(pauses[7:]) == {BAR_MAX_S}


def test_long_good_conduct_is_rewarded_and_short_is_not() -> None:
    barred = Banlist()
    barred.bar(ANNA, 0.0)
    assert barred.bar(ANNA, BAR_FIRST_S + GOOD_CONDUCT_S - 1) == pytest.approx(2 * BAR_FIRST_S)
    assert barred.bar(ANNA, 3 * GOOD_CONDUCT_S) == BAR_FIRST_S


def test_a_crowd_pushes_out_the_oldest_only() -> None:
    barred = Banlist()
    crowd = [NodeId(number.to_bytes(16, "big")) for number in range(BARRED_MAX)]
    barred.bar(ANNA, 0.0)
    for node in crowd[:-1]:
        barred.bar(node, 0.1)
    barred.bar(ANNA, 0.2)  # again, so that others are older now
    barred.bar(crowd[-1], 0.3)
    assert barred.is_barred(ANNA, 0.5)
    assert not barred.is_barred(crowd[0], 0.5)
    assert all(barred.is_barred(node, 0.5) for node in crowd[1:])


# Addresses

HOST, OTHER = "192.168.1.5", "192.168.1.6"


def test_some_trouble_from_an_address_is_borne() -> None:
    troublesome = Troublesome()
    for _ in range(TROUBLE_BURST):
        assert not troublesome.is_too_much(HOST, 5.0)
        troublesome.note(HOST, 5.0)
    assert not troublesome.is_too_much(HOST, 5.0)
    troublesome.note(HOST, 5.0)
    assert troublesome.is_too_much(HOST, 5.0)
    assert not troublesome.is_too_much(OTHER, 5.0)


def test_trouble_without_end_is_heard_at_its_rate_only() -> None:
    troublesome, heard, step_s = Troublesome(), 0, 1 / 64
    for step in range(64 * 60):
        now = step * step_s
        if not troublesome.is_too_much(HOST, now):
            heard += 1
            troublesome.note(HOST, now)
    assert heard == pytest.approx(TROUBLE_BURST + 60 * TROUBLE_RATE_PER_S, abs=3)


def test_trouble_is_forgotten() -> None:
    troublesome = Troublesome()
    for _ in range(2 * TROUBLE_BURST):
        troublesome.note(HOST, 0.0)
    assert troublesome.is_too_much(HOST, 0.0)
    assert not troublesome.is_too_much(HOST, TROUBLE_BURST / TROUBLE_RATE_PER_S)


def test_a_crowd_of_addresses_pushes_out_the_oldest() -> None:
    troublesome = Troublesome()
    for _ in range(2 * TROUBLE_BURST):
        troublesome.note(HOST, 0.0)
    for number in range(HOSTS_MAX):
        troublesome.note(f"10.0.{number // 256}.{number % 256}", 0.0)
    assert not troublesome.is_too_much(HOST, 0.0)
    assert len(troublesome._paid_until) == HOSTS_MAX

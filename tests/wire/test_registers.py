from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.wire.records import REGISTER
from p2pmesh.wire.registers import (
    MEMBER,
    MODELS,
    REFRESHES_PER_S,
    REGISTERS,
    SERVING,
    TTL_S_MAX,
    WANTS,
    Life,
    Register,
    register_of,
)

ROWS = pytest.mark.parametrize("row", REGISTERS.values(), ids=REGISTERS)


def test_names_are_those_of_records_and_pages_are_of_one_register() -> None:
    assert all(REGISTER.fullmatch(name) and row.name == name for name, row in REGISTERS.items())
    assert register_of(f"{MODELS}/7") is register_of(MODELS) is REGISTERS[MODELS]
    assert register_of(SERVING) is not REGISTERS[MODELS]


def test_what_a_newer_node_keeps_lives_on_its_lease() -> None:
    assert register_of("future/3").life is Life.LEASED
    assert register_of("future").ttl_s_max == TTL_S_MAX


def test_one_register_is_the_lease_and_comes_first() -> None:
    leases = [row for row in REGISTERS.values() if row.life is Life.LEASE]
    assert leases == [REGISTERS[MEMBER]]
    assert leases[0].urgent


@ROWS
@given(members=st.integers(1, 100_000))
def test_a_record_is_renewed_long_before_it_ends(row: Register, members: int) -> None:
    refresh_s, ttl_s = row.refreshed_every_s(members), row.ttl_s(members)
    assert refresh_s < ttl_s <= row.ttl_s_max
    assert refresh_s >= min(row.refresh_s, members / REFRESHES_PER_S)


@pytest.mark.parametrize(
    ("name", "members", "refresh_s", "ttl_s"),
    [
        (MEMBER, 2, 60, 240),
        (MEMBER, 1000, 200, 800),
        (MEMBER, 100_000, 900, 3600),
        (WANTS, 2, 300, 900),
        (WANTS, 100_000, 3000, 3600),
        (MODELS, 2, TTL_S_MAX // 2, TTL_S_MAX),
    ],
)
def test_times_of_the_table(name: str, members: int, refresh_s: float, ttl_s: int) -> None:
    row = REGISTERS[name]
    assert (row.refreshed_every_s(members), row.ttl_s(members)) == (refresh_s, ttl_s)

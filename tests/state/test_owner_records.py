from __future__ import annotations

import gc
from weakref import WeakValueDictionary

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.state import owner_records as module
from p2pmesh.state.owner_records import EXPIRY_GRACE_S, NEVER, NOTHING, OwnerRecords, hold
from p2pmesh.wire.records import Record
from tests.state.builders import NOW, record

SOME = [
    record(register=register, epoch=NOW + epoch, seq=seq, body={"x": "y" * size})
    for register in ("accused", "caps", "member", "wants")
    for epoch in (0, 1)
    for seq, size in ((1, 0), (2, 900), (3, 300))
]
some = st.sampled_from(range(len(SOME)))


def held(*records: Record) -> OwnerRecords:
    return hold({one.register: one for one in sorted(records, key=lambda one: one.register)})


def taken(records: list[Record], into: OwnerRecords = NOTHING) -> OwnerRecords:
    """As a document takes them, over and over until nothing is news."""
    while True:
        before = into
        for one in records:
            mine = into.records.get(one.register)
            if (
                not into.is_past(one.register, one.epoch, one.seq)
                and (mine is None or mine.version < one.version)
                and into.end_of(one) > NOW
                and into.has_room(one)
            ):
                into = into.with_record(one)
        if into == before:
            return into


def test_a_new_epoch_voids_all_but_the_wants() -> None:
    before = held(record(register="member"), record(register="caps"), record(register="wants"))
    after = before.with_record(record(register="member", epoch=NOW + 1))
    assert list(after.records) == ["member", "wants"]
    assert after.epoch == NOW + 1
    assert [one.register for one in before.lost(after)] == ["caps", "member"]
    assert not list(after.lost(after))


def test_registers_live_on_the_lease_of_their_epoch() -> None:
    lease = record(register="member", ttl_s=60)
    short, long = record(register="load", ttl_s=10), record(register="caps", ttl_s=9999)
    wants = record(register="wants", ttl_s=3600)
    one = held(lease, short, long, wants)
    over = NOW + 60 + EXPIRY_GRACE_S
    assert [one.end_of(r) - NOW - EXPIRY_GRACE_S for r in (short, long, lease, wants)] == [
        10,
        60,
        60,
        3600,
    ]
    assert one.ends_at == NOW + 10 + EXPIRY_GRACE_S
    assert one.end_of(record(epoch=NOW + 1)) == 0
    assert NOTHING.end_of(long) == 0
    assert one.at(one.ends_at - 1) == one
    assert list(one.at(one.ends_at).records) == ["caps", "member", "wants"]
    assert list(one.at(over - 1).records) == ["caps", "member", "wants"]
    assert list(one.at(over).records) == ["wants"]
    assert one.at(NOW + 99999) == NOTHING
    assert NOTHING.ends_at >= NEVER


@given(st.lists(some))
def test_the_first_to_run_out_says_when_to_look(numbers: list[int]) -> None:
    one = taken([SOME[number] for number in numbers])
    ends = [one.end_of(record_) for record_ in one.records.values()]
    assert one.ends_at == min(ends, default=one.ends_at)
    assert list(one.records) == sorted(one.records)
    assert one.size_bytes == sum(len(record_.raw) for record_ in one.records.values())
    assert one.digests == tuple(record_.digest for record_ in one.records.values())


@given(st.lists(some), st.lists(some), st.integers(1, 4), st.integers(600, 3000))
def test_bounds_cut_alike_whatever_came_first(
    one: list[int], other: list[int], registers: int, size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "REGISTERS_PER_OWNER_MAX", registers)
        patch.setattr(module, "OWNER_BYTES_MAX", size)
        left, right = (taken([SOME[number] for number in seen]) for seen in (one, other))
        # Two nodes tell each other what they have until neither learns anything.
        for _ in range(len(SOME)):
            told = list(left.records.values())
            left, right = taken(list(right.records.values()), left), taken(told, right)
        assert left == right
        assert len(left.records) <= registers
        assert left.size_bytes <= size


def test_equal_values_can_be_one() -> None:
    interned: WeakValueDictionary[tuple[bytes, ...], OwnerRecords] = WeakValueDictionary()
    one, other = (held(record(), record(register="member")) for _ in range(2))
    assert one == other != NOTHING
    assert hash(one) == hash(other)
    assert one != "something else"
    assert interned.setdefault(one.digests, one) is interned.setdefault(other.digests, other)
    del one
    gc.collect()
    assert len(interned) == 0

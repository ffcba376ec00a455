from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.identity.keys import MeshId
from p2pmesh.state.document import (
    AHEAD_S_MAX,
    EPOCH_AHEAD_S_MAX,
    EXPIRY_GRACE_S,
    REGISTERS_PER_OWNER_MAX,
    Document,
    Verdict,
)
from p2pmesh.wire.records import Record
from tests.state.make import MESH, NODES, NOW, record

# A few owners, registers, epochs and versions, so that most orders meet a conflict.
RECORDS = [
    record(owner, register, epoch=NOW + epoch, seq=seq, body={"value": value})
    for owner in (0, 1)
    for register in ("member", "caps", "wants")
    for epoch in (0, 1)
    for seq, value in ((1, 1), (2, 1), (2, 2))
]
some_records = st.lists(st.sampled_from(RECORDS), max_size=12)


def merged(records: list[Record]) -> Document:
    document = Document(MESH)
    for one in records:
        document.merge(one, NOW)
    return document


def state(document: Document) -> list[bytes]:
    return [one.raw for one in document.records()]


@given(some_records, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(records: list[Record], rng: Any) -> None:
    shuffled = list(records)
    rng.shuffle(shuffled)
    assert state(merged(shuffled)) == state(merged(records))


@given(some_records, some_records)
def test_merging_again_or_in_two_parts_changes_nothing(
    left: list[Record], right: list[Record]
) -> None:
    together = merged(left + right)
    assert state(merged(left + right + left)) == state(together)
    parts = Document(MESH)
    for part in (merged(right), merged(left)):
        for one in part.records():
            parts.merge(one, NOW)
    assert state(parts) == state(together)


@given(some_records, some_records)
def test_equal_fingerprints_mean_equal_documents(left: list[Record], right: list[Record]) -> None:
    one, other = merged(left), merged(right)
    assert (one.fingerprint == other.fingerprint) == (state(one) == state(other))


@given(some_records, some_records)
def test_what_is_lacking_makes_both_equal(left: list[Record], right: list[Record]) -> None:
    one, other = merged(left), merged(right)
    for record_ in list(other.lacking(one.versions())):
        one.merge(record_, NOW)
    for record_ in list(one.lacking(other.versions())):
        other.merge(record_, NOW)
    assert state(one) == state(other)
    assert not list(one.lacking(other.versions()))


def test_a_new_epoch_voids_everything_but_wants() -> None:
    document = merged([record(register="caps"), record(register="wants", ttl_s=9999)])
    document.merge(record(register="member", epoch=NOW + 1), NOW)
    assert document.get(NODES[0], "caps") is None
    assert document.get(NODES[0], "wants") is not None
    assert document.judge(record(register="load"), NOW) is Verdict.STALE


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": MeshId(b"n" * 16)},
        {"issued_at": NOW - 1000, "ttl_s": 10},
        {"issued_at": NOW + AHEAD_S_MAX + 1},
        {"epoch": NOW + EPOCH_AHEAD_S_MAX + 1},
    ],
    ids=["other mesh", "run out", "future", "forged epoch"],
)
def test_what_is_void_is_not_taken(changes: dict[str, Any]) -> None:
    assert Document(MESH).judge(record(**changes), NOW) is Verdict.VOID
    assert not Document(MESH).merge(record(**changes), NOW)


def test_nothing_that_ran_out_comes_back() -> None:
    lease = record(register="member", ttl_s=60)
    caps = record(register="caps", ttl_s=9999)
    wants = record(register="wants", ttl_s=9999)
    document = merged([lease, caps, wants])
    over = NOW + 60 + EXPIRY_GRACE_S
    assert document.expire(over - 1) == frozenset()
    assert document.expire(over) == {NODES[0]}
    assert [one.register for one in document.records()] == ["wants"]
    assert not document.merge(lease, over)
    document.merge(caps, over)
    assert document.expire(over) == {NODES[0]}
    assert document.expire(NOW + 9999 + EXPIRY_GRACE_S) == {NODES[0]}
    assert document.owners == ()
    assert document.fingerprint == Document(MESH).fingerprint


def test_one_owner_cannot_fill_everybodys_memory() -> None:
    document = Document(MESH)
    names = [f"{letter}/{page}" for letter in "ab" for page in range(40)]
    for seq, name in enumerate(names):
        document.merge(record(register=name, seq=seq), NOW)
    assert len(document.registers(NODES[0])) == REGISTERS_PER_OWNER_MAX
    big = [record(1, f"c/{page}", body={"x": "y" * 16_000}) for page in range(20)]
    taken = [document.merge(one, NOW) for one in big]
    assert 0 < sum(taken) < len(big)
    assert document.judge(big[-1], NOW) is Verdict.REFUSED

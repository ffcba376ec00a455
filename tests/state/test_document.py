from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.identity.keys import MeshId, NodeId
from p2pmesh.state import document as module
from p2pmesh.state.document import Document, MergeOutcome, MergeResult
from p2pmesh.state.fingerprint import CHANGES_KEPT_S, fingerprint_of
from p2pmesh.state.forks import HOLD_S_MAX
from p2pmesh.state.owner_records import (
    EXPIRY_GRACE_S,
    OWNER_BYTES_MAX,
    REGISTERS_PER_OWNER_MAX,
    OwnerRecords,
)
from p2pmesh.state.pending import PENDING_S
from p2pmesh.state.trust import Trust, members_only
from p2pmesh.wire.evidence import make_fork
from p2pmesh.wire.facts import Fact
from p2pmesh.wire.records import CREDENTIAL
from tests.state.builders import MESH, NODES, NOW, certificate, record, sealed
from tests.state.facts import FACTS, LATER, SEQ_S, items, raws, some_facts, tell, told, written
from tests.state.statements import ANNA, CARL, PAUL

# --- as of a moment ago ---------------------------------------------------------------------------

CUTOFF = LATER + 5
NEW = [
    record(owner, register, epoch=NOW + epoch, seq=seq, issued_at=CUTOFF + seq, ttl_s=60, body=body)
    for owner in (0, 1)
    for register in ("member", "caps", "wants")
    for epoch in (0, 1, 2)
    for seq in (3, 4)
    for body in ({"value": 1}, {"value": 2})
]
NEWS: list[Fact] = [
    *NEW,
    *(make_fork(one, other) for one, other in zip(NEW[::2], NEW[1::2], strict=True)),
    *(certificate(0, (2,), seq=seq, issued_at=CUTOFF + seq) for seq in (1, 2, 3)),
]
some_news = st.lists(st.sampled_from(range(len(NEWS))), max_size=15)


@given(some_facts, some_news, some_news)
def test_what_was_issued_since_does_not_tell_documents_apart(
    facts: list[int], one: list[int], other: list[int]
) -> None:
    now, before = CUTOFF + 5, items(told(facts))
    left, right = (tell(told(before), (NEWS[n] for n in news), now) for news in (one, other))
    for document in (left, right):
        document.expire(now)
    assert left.fingerprint_at(CUTOFF) == right.fingerprint_at(CUTOFF)
    assert left.fingerprint_at(CUTOFF) == told(facts).fingerprint
    assert left.fingerprint_at(CUTOFF + 5) == left.fingerprint


@given(some_facts, st.integers(0, 700), st.integers(0, CHANGES_KEPT_S))
def test_who_has_looked_what_ran_out_does_not_matter(
    facts: list[int], after_s: int, ago_s: int
) -> None:
    now = LATER + after_s
    tidy, lazy = told(facts), told(facts)
    lazy.expire(now - ago_s)
    tidy.expire(now - ago_s)
    tidy.expire(now)
    cutoff = now - ago_s
    assert tidy.fingerprint_at(cutoff) == lazy.fingerprint_at(cutoff) is not None


def test_long_ago_cannot_be_told() -> None:
    document = told([written(0, "member", 0, 1)])
    document.expire(NOW + 100)
    assert document.fingerprint_at(NOW + 100 - CHANGES_KEPT_S - 1) is None
    assert document.fingerprint_at(NOW + 100 - CHANGES_KEPT_S) == document.fingerprint


# --- leases ---------------------------------------------------------------------------------------


def test_a_new_epoch_voids_everything_but_wants() -> None:
    document = told([record(register=r) for r in ("member", "caps", "wants")], NOW)
    document.merge(record(register="member", epoch=NOW + 1), NOW)
    assert [one.register for one in document.registers(NODES[0])] == ["member", "wants"]
    assert document.judge(record(register="load"), NOW) is MergeOutcome.STALE
    assert document.stale(NODES[0], "load", NOW, 99)
    assert not document.stale(NODES[0], "wants", NOW, 99)
    assert not document.stale(NODES[7], "load", 0, 0)


def test_what_comes_before_its_lease_waits_for_it() -> None:
    early = record(register="caps", epoch=NOW + 1, issued_at=NOW - 1000, ttl_s=9999)
    first = record(register="member")
    document = told([first], NOW)
    assert document.judge(early, NOW) is MergeOutcome.PENDING
    assert not document.merge(early, NOW)
    assert document.judge(early, NOW) is MergeOutcome.STALE  # it is known, if not seen
    assert raws(document) == [first.raw]  # an epoch begins with its lease, not before
    assert document.merge(record(register="member", seq=2), NOW)
    assert document.judge(early, NOW) is MergeOutcome.STALE
    begun = document.merge(lease := record(register="member", epoch=NOW + 1), NOW)
    assert document.get(NODES[0], "caps") == early
    both = lease.digest, early.digest
    assert begun == MergeResult(MergeOutcome.NEWS, frozenset({NODES[0]}), both)


def test_old_registers_do_not_come_back_without_their_lease() -> None:
    lease, caps = record(register="member", ttl_s=60), record(register="caps", ttl_s=9999)
    wants = record(register="wants", ttl_s=3600)
    document = told([lease, caps, wants], NOW)
    over = NOW + 60 + EXPIRY_GRACE_S
    assert document.expire(over - 1) == frozenset()
    assert document.expire(over) == {NODES[0]}
    assert raws(document) == [wants.raw]
    for now in range(over, over + 3000, 500):
        assert not document.merge(lease, now)
        assert not document.merge(caps, now)
        document.expire(now)
        assert raws(document) == [wants.raw]
        assert document.fingerprint == fingerprint_of([wants.digest])
    document.expire(over + 3000 + PENDING_S)
    assert document._pending.size_bytes == 0
    assert document.expire(NOW + 3600 + EXPIRY_GRACE_S) == {NODES[0]}
    assert document.owners == ()
    assert document.fingerprint == Document(MESH).fingerprint


@given(some_facts, some_facts, st.integers(0, 700), st.integers(0, 700))
def test_nothing_that_ran_out_comes_back(
    facts: list[int], again: list[int], first_s: int, then_s: int
) -> None:
    document = told(facts)
    document.expire(LATER + first_s)
    now = LATER + first_s + then_s
    newest = {one.key: one.version for one in document.records()}
    document.expire(now)
    tell(document, (FACTS[fact] for fact in [*facts, *again]), now)
    for one in document.records():
        assert one.version >= newest.get(one.key, one.version)
    # Time commutes with what is told: only what still has a lease is there, whoever looked when.
    late = told([*facts, *again], now)
    assert late.ids() == document.ids()
    assert document.expire(now) == frozenset()


def test_looking_for_what_ran_out_is_cheap_before_anything_can_have() -> None:
    document = told([written(0, "member", 0, 1)])
    standing = document._held
    document._held = None  # type: ignore[assignment]  # it would be missed
    assert document.expire(NOW + SEQ_S + 60 + EXPIRY_GRACE_S - 1) == frozenset()
    document._held = standing
    assert document.expire(NOW + SEQ_S + 60 + EXPIRY_GRACE_S) == {NODES[0]}


# --- certificates and forks -----------------------------------------------------------------------


def test_a_certificate_names_the_version_that_stands() -> None:
    document = told([record(register="member", seq=2)], NOW)
    assert not document.merge(certificate(0, seq=1), NOW)
    assert document.merge(first := certificate(0, (1,), seq=2), NOW)
    assert not document.merge(certificate(0, (2,), seq=2), NOW)  # the same, by others
    assert document.certificates == (first,)
    assert document.certificate(NODES[0]) == first
    assert document.removed == {NODES[0]}
    assert document.merge(record(register="caps"), NOW)  # says nothing against it
    assert document.removed == {NODES[0]}
    assert document.merge(record(register="member", seq=3), NOW)
    assert document.removed == frozenset()
    assert document.certificate(NODES[0]) is None
    assert not document.merge(first, NOW)
    assert document.item(first.id) is None


def test_a_certificate_is_judged_by_the_version_that_it_names() -> None:
    document = told([record(register="member", seq=2)], NOW)
    named = [document.judge(certificate(0, seq=seq), NOW) for seq in (1, 2, 3)]
    assert named == [MergeOutcome.STALE, MergeOutcome.NEWS, MergeOutcome.PENDING]
    assert document.judge(certificate(2), NOW) is MergeOutcome.PENDING
    assert document.judge(certificate(0, seq=2, issued_at=NOW + 999), NOW) is MergeOutcome.VOID
    assert not document.merge(certificate(0, seq=3), NOW)
    merged = document.merge(first := certificate(0, seq=2), NOW, MergeOutcome.NEWS)
    assert merged == MergeResult(MergeOutcome.NEWS, frozenset({NODES[0]}), (first.id,))
    assert document.judge(certificate(0, (2,), seq=2), NOW) is MergeOutcome.STALE


def test_a_certificate_goes_with_the_lease() -> None:
    document = told([record(register="member"), certificate(0)], NOW)
    over = NOW + 240 + EXPIRY_GRACE_S
    assert document.expire(over) == {NODES[0]}
    assert document.removed == frozenset()
    assert document.fingerprint == Document(MESH).fingerprint
    assert document.fingerprint_at(over - 1) == fingerprint_of(
        [record(register="member").digest, certificate(0).id]
    )


def test_certificates_and_forks_of_elsewhere_mean_nothing() -> None:
    mesh: dict[str, Any] = {"mesh": MeshId(b"n" * 16)}
    document = told([record(register="member")], NOW)
    one, other = (record(body={"value": value}, **mesh) for value in (1, 2))
    assert not document.merge(certificate(0, **mesh), NOW)
    assert not document.merge(make_fork(one, other), NOW)
    assert not document.merge(certificate(0, issued_at=NOW + 999), NOW)
    assert document.ids() == [record(register="member").digest]


def test_of_two_values_under_one_number_the_larger_stands_and_the_fork_is_told() -> None:
    pair = [record(register="member", body={"value": value}) for value in (1, 2)]
    smaller, larger = sorted(pair, key=lambda one: one.digest)
    document = told([smaller], NOW)
    assert document.judge(larger, NOW) is MergeOutcome.EQUIVOCATION
    assert document.merge(larger, NOW)
    assert document.judge(smaller, NOW) is MergeOutcome.EQUIVOCATION
    assert not document.merge(smaller, NOW)
    assert document.registers(NODES[0]) == (larger,)


def test_a_fork_outlives_the_epoch_and_ends_with_its_time() -> None:
    pair = [record(register="member", body={"value": value}) for value in (1, 2)]
    document = told([*pair, fork := make_fork(*pair)], NOW)
    assert not document.merge(fork, NOW)
    assert document.merge(record(register="member", epoch=NOW + 1, ttl_s=3600), NOW)
    assert document.forks(NODES[0]) == (fork,)
    assert document.held(NOW + 29) == {NODES[0]}
    assert document.held(NOW + 30) == frozenset()
    assert document.expire(NOW + HOLD_S_MAX - 1) == frozenset()
    assert document.expire(NOW + HOLD_S_MAX) == {NODES[0]}
    assert document.forks(NODES[0]) == ()
    assert not document.merge(fork, NOW + HOLD_S_MAX)
    assert document.fingerprint == fingerprint_of([one.digest for one in document.records()])


# --- authorisation --------------------------------------------------------------------------------


def test_facts_count_for_as_long_as_their_owner_is_authorised() -> None:
    allowed, asked = {NODES[1]}, list[float]()

    def authorised(_trust: Trust, fact: Fact, now: float) -> bool:
        asked.append(now)
        return fact.owner in allowed

    document = Document(MESH, authorised=authorised)
    others = [record(1, "member")]
    pair = [record(register="caps", body={"value": value}) for value in (1, 2)]
    theirs: list[Fact] = [record(register="member"), record(register="wants"), *pair]
    theirs += [make_fork(*pair), certificate(0, (1,))]
    without = tell(document, [*others, *theirs], NOW).fingerprint
    assert raws(document) == [others[0].raw]
    assert {document.judge(fact, NOW) for fact in theirs} == {MergeOutcome.VOID}
    assert document.reauthorise([NODES[0]], NOW) == frozenset()

    allowed.add(NODES[0])
    tell(document, theirs, NOW)
    assert document.ids() == tell(Document(MESH), [*others, *theirs], NOW).ids()
    assert document.removed == {NODES[0]}
    assert document.reauthorise(NODES, NOW + 1) == frozenset()

    allowed.discard(NODES[0])
    assert document.reauthorise([NODES[1]], NOW + 2) == frozenset()
    assert document.reauthorise(NODES, NOW + 2.5) == {NODES[0]}
    assert asked[-1] == NOW + 2.5
    assert (raws(document), document.fingerprint) == ([others[0].raw], without)
    assert document.fingerprint_at(NOW + 2) == without
    assert document.fingerprint_at(NOW + 1) != without
    assert document.removed == frozenset()
    assert document.forks(NODES[0]) == ()
    assert document.held(NOW + 3) == frozenset()

    allowed.add(NODES[0])
    tell(document, theirs, NOW + 3)
    assert document.ids() == tell(Document(MESH), [*others, *theirs], NOW).ids()


def test_a_node_hears_itself_whether_it_is_authorised_or_not() -> None:
    document = Document(MESH, keeper=NODES[0], authorised=lambda *_: False)
    assert document.merge(record(register="member"), NOW)
    assert not document.merge(record(1, "member"), NOW)
    assert document.reauthorise(NODES, NOW) == frozenset()
    assert document.owners == (NODES[0],)


# --- bounds ---------------------------------------------------------------------------------------


def test_one_owner_cannot_fill_everybodys_memory() -> None:
    lease = record(register="member")
    document = told([lease], NOW)
    names = [f"{letter}/{page}" for letter in "az" for page in range(40)]
    for name in names:
        document.merge(record(register=name), NOW)
    assert len(document.registers(NODES[0])) == REGISTERS_PER_OWNER_MAX
    assert document.get(NODES[0], "member") == lease
    assert document.judge(record(register="zz"), NOW) is MergeOutcome.REFUSED
    assert not document.merge(record(register="zz"), NOW)
    assert document.merge(record(register="a/99"), NOW)  # in front, so the last one makes way
    assert len(document.registers(NODES[0])) == REGISTERS_PER_OWNER_MAX
    big = [record(register=f"b/{10 + page}", body={"x": "y" * 16_000}) for page in range(20)]
    taken = [bool(document.merge(one, NOW)) for one in big]
    assert taken == sorted(taken, reverse=True)
    assert 0 < sum(taken) < len(big)
    assert sum(len(one.raw) for one in document.records()) <= OWNER_BYTES_MAX
    assert document.fingerprint == fingerprint_of(document.ids())


def test_there_are_only_so_many_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OWNERS_MAX", 2)
    document = told([record(owner, "member") for owner in range(4)], NOW)
    assert document.owners == tuple(sorted(NODES[:2]))
    assert len(document) == 2
    assert NODES[0] in document
    assert NODES[2] not in document
    assert document.judge(record(2, "member"), NOW) is MergeOutcome.REFUSED
    assert document.merge(record(1, "caps"), NOW)


def test_there_is_always_room_for_its_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OWNERS_MAX", 2)
    document = Document(MESH, keeper=NODES[3])
    for owner in range(3):
        document.merge(record(owner, "member"), NOW)
    assert document.owners == tuple(sorted(NODES[:2]))
    assert document.judge(record(3, "member"), NOW) is MergeOutcome.NEWS
    assert document.merge(record(3, "member"), NOW)


def test_equal_values_are_shared() -> None:
    copies: dict[OwnerRecords, OwnerRecords] = {}
    homes: dict[bytes, NodeId] = {}
    plain = told(range(len(FACTS)))
    one, other = (
        tell(
            Document(MESH, share=lambda held: copies.setdefault(held, held), homes=homes),
            facts,
        )
        for facts in (FACTS, FACTS[::-1])
    )
    assert one.ids() == other.ids() == plain.ids()
    assert all(one._held[owner] is other._held[owner] for owner in one.owners)
    assert [one.item(item) for item in one.ids()] == items(plain)
    # Homes are of all documents: what is in one of them is not therefore in another.
    assert not any(Document(MESH, homes=homes).item(item) for item in plain.ids())


# --- statements of trust ------------------------------------------------------------------------


def test_a_statement_is_an_item_like_any_other() -> None:
    revocation, lease = ANNA.revokes(CARL), record(register="member")
    document = tell(Document(MESH), [revocation, lease], NOW)
    assert document.ids() == sorted([revocation.id, lease.digest])
    assert document.item(revocation.id) is revocation
    assert document.statements == (revocation,)
    assert document.item(ANNA.revokes(PAUL).id) is None
    assert document.fingerprint == fingerprint_of([revocation.id, lease.digest])


def test_a_statement_counts_from_when_it_was_made_until_another_replaced_it() -> None:
    first = ANNA.lays_down(1, is_open=True, at=NOW)
    second = ANNA.lays_down(2, is_open=False, at=NOW + 4)
    document = tell(Document(MESH), [first], NOW)
    assert document.merge(second, NOW + 6)
    assert document.statements == (second,)
    told = [document.fingerprint_at(NOW + at) for at in (-1, 0, 3, 4, 6)]
    empty = fingerprint_of([])
    one, other = fingerprint_of([first.id]), fingerprint_of([second.id])
    assert told == [empty, one, one, other, other]
    assert tell(Document(MESH), [second, first], NOW + 6).fingerprint == document.fingerprint


def test_an_invitation_runs_out_with_a_clocks_grace() -> None:
    invited = ANNA.invites(until=NOW + 10)
    document = tell(Document(MESH), [invited, ANNA.revokes(CARL)], NOW)
    end = NOW + 10 + EXPIRY_GRACE_S
    assert document.expire(end - 1) == frozenset()
    assert invited in document.statements
    trust = document.trust
    assert document.expire(end) == frozenset()
    assert document.statements == (ANNA.revokes(CARL),)
    assert document.trust is not trust
    assert document.fingerprint_at(end - 1) != document.fingerprint_at(end)
    assert document.judge(invited, end) is MergeOutcome.VOID
    assert document.expire(end + 100) == frozenset()


def test_what_a_revocation_voids_falls_at_once_in_the_fingerprint_too() -> None:
    document = Document(MESH, authorised=members_only)
    carls = sealed(CARL.key, "member", body={CREDENTIAL: CARL.own.raw})
    tell(document, [carls, sealed(CARL.key, "caps")], NOW)
    assert len(document.ids()) == 2
    revoked = PAUL.revokes(CARL)
    assert document.merge(revoked, NOW).owners == {CARL.id}
    assert document.ids() == [revoked.id]
    assert document.fingerprint == fingerprint_of([revoked.id])

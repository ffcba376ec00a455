from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gossip import members as module
from p2pmesh.gossip.members import BOOK_MAX
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import EXPIRY_GRACE_S
from p2pmesh.wire.records import Record
from p2pmesh.wire.registers import MEMBER
from tests.gossip.builders import (
    HERE,
    STARTED,
    THERE,
    View,
    accused_by,
    certificate_by,
    member_of,
    mesh_of,
)
from tests.state.builders import NODES, NOW, record

ME, ANNA, BEN = NODES[:3]
LEASE_OVER = NOW + 240 + EXPIRY_GRACE_S


def test_a_node_is_live_for_itself_before_it_says_so() -> None:
    assert View().members.live == {ME}
    assert View().members.population == {(ME, True)}


def test_live_is_who_has_a_lease() -> None:
    view = mesh_of(3)
    assert view.members.live == {ME, ANNA, BEN}
    view.expire(LEASE_OVER)
    assert view.members.live == {ME}


def test_who_said_goodbye_is_neither_live_nor_missed() -> None:
    view = mesh_of(3)
    view.learn(member_of(1, 2, left=True))
    assert view.members.live == {ME, BEN}
    assert view.members.departed() == []
    view.learn(member_of(1, 3))
    assert view.members.live == {ME, ANNA, BEN}


def test_the_removed_are_not_live_but_looked_for_until_they_refute() -> None:
    view = mesh_of(3)
    view.learn(accused_by(0, 1), certificate_by([0], 1))
    assert view.members.live == {ME, BEN}
    assert view.members.population == {(ME, True), (BEN, True)}
    assert view.members.departed() == [ANNA]
    view.learn(member_of(1, 2))
    assert view.members.live == {ME, ANNA, BEN}
    assert view.members.departed() == []


def test_who_left_and_was_removed_as_well_is_not_looked_for() -> None:
    view = mesh_of(3)
    view.learn(member_of(1, 2, left=True), certificate_by([0], 1, 2))
    assert view.members.departed() == []


def test_who_has_no_address_cannot_be_dialled() -> None:
    view = mesh_of(2)
    view.learn(member_of(2, addresses=()))
    assert view.members.dialable(ANNA)
    assert not view.members.dialable(BEN)
    assert view.members.population == {(ME, True), (ANNA, True), (BEN, False)}
    view.learn(member_of(2, 2))
    assert (BEN, True) in view.members.population


def test_the_book_is_in_one_order_whatever_the_hashes() -> None:
    members = mesh_of(6).members
    members.known.clear()
    members.refresh(frozenset(NODES[:6]))
    assert list(members.book) == sorted(NODES[1:6])


def test_a_refreshed_lease_makes_no_new_population() -> None:
    view = mesh_of(3)
    before = view.members.population
    view.learn(member_of(1, 2))
    assert view.members.population is before
    assert view.members.known[ANNA].version == (STARTED, 2)


@pytest.mark.parametrize("body", [{}, {"name": 7}], ids=["withdrawn", "nonsense"])
def test_a_member_record_that_says_nothing_is_none(body: dict[str, object]) -> None:
    view = mesh_of(2)
    view.learn(record(1, MEMBER, seq=2, epoch=STARTED, body=body))
    assert view.members.live == {ME}
    assert ANNA not in view.members.known
    assert view.members.addresses(ANNA) == (HERE,)


def test_addresses_outlive_the_lease() -> None:
    view = mesh_of(2)
    assert view.members.book == {ANNA: (HERE,)}
    view.expire(LEASE_OVER)
    assert view.members.addresses(ANNA) == (HERE,)
    assert view.members.book == {ANNA: (HERE,)}
    assert view.members.departed() == [ANNA]


def test_who_said_goodbye_leaves_the_book_with_its_lease() -> None:
    view = mesh_of(3)
    view.learn(member_of(1, 2, left=True))
    assert view.members.book == {ANNA: (HERE,), BEN: (HERE,)}
    view.expire(LEASE_OVER)
    assert view.members.book == {BEN: (HERE,)}
    assert view.members.departed() == [BEN]


def test_the_book_serves_until_a_record_says_otherwise() -> None:
    view = View(book={ANNA: (THERE,), BEN: (THERE,)})
    assert view.members.departed() == sorted([ANNA, BEN])
    assert view.members.addresses(ANNA) == (THERE,)
    view.learn(member_of(1))
    assert view.members.addresses(ANNA) == (HERE,)
    assert view.members.departed() == [BEN]
    assert view.members.book == {ANNA: (HERE,), BEN: (THERE,)}


def test_nodes_without_address_are_not_in_the_book() -> None:
    view = View()
    view.learn(member_of(1, addresses=()))
    assert view.members.book == {}


def test_a_node_is_not_in_its_own_book() -> None:
    view = View(book={ME: (THERE,)})
    assert view.members.book == {}
    view.learn(member_of(0))
    view.expire(LEASE_OVER)
    assert view.members.book == {}
    assert view.members.departed() == []


def test_the_book_forgets_who_was_seen_longest_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BOOK_MAX >= 1000
    monkeypatch.setattr(module, "BOOK_MAX", 2)
    view = View(book={NodeId(b"a" * 16): (THERE,), NodeId(b"b" * 16): (THERE,)})
    view.learn(member_of(1))
    view.expire(LEASE_OVER)
    assert set(view.members.book) == {NodeId(b"b" * 16), ANNA}


STEPS = [
    member_of(owner, seq, left=left, addresses=addresses)
    for owner in (0, 1, 2)
    for seq, left, addresses in (
        (1, False, (HERE,)),
        (2, False, ()),
        (3, True, (HERE,)),
        (4, False, (HERE,)),
    )
]


@given(st.lists(st.sampled_from(STEPS), max_size=12))
def test_what_is_kept_is_what_reading_anew_would_find(steps: list[Record]) -> None:
    view = View()
    for step in steps:
        assert view.members.population  # what was worked out before must not linger
        view.learn(step)
    anew = View()
    anew.learn(*view.document.records())
    assert view.members.population == anew.members.population
    assert view.members.live == anew.members.live
    assert view.members.known == anew.members.known

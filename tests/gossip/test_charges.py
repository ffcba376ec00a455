from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gossip.charges import (
    EFFECT_DELAY_S,
    STRIKES_MAX,
    STRIKES_S,
    needed,
)
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.evidence import ACCUSED, Accusation, Certificate
from p2pmesh.wire.records import Record
from tests.gossip.make import (
    STARTED,
    View,
    accusation,
    accused_by,
    certificate_by,
    member_of,
)
from tests.state.make import NODES, NOW, record

SOON = NOW + EFFECT_DELAY_S
WATCHER = NodeId(b"w" * 16)  # whose view it is; no member yet


def mesh_of(count: int) -> View:
    view = View(WATCHER)
    view.learn(*(member_of(number) for number in range(count)))
    return view


def ripe_for(view: View, now: float = NOW) -> dict[NodeId, Certificate]:
    """Whom the mesh removes of what is known now, once the delay is over."""
    view.charges.ripe(now)
    return {one.subject: one for one in view.charges.ripe(now + EFFECT_DELAY_S)}


# How many are needed


def test_all_of_up_to_three_are_needed_and_then_all_but_one() -> None:
    assert [needed(voters) for voters in range(6)] == [1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("members", "accusers"), [(2, 1), (3, 2), (4, 3), (5, 3), (6, 4), (7, 4), (8, 4)]
)
def test_enough_accusers_remove_a_node_and_one_fewer_do_not(members: int, accusers: int) -> None:
    view = mesh_of(members)
    for accuser in range(1, accusers):
        view.learn(accused_by(accuser, 0))
    assert ripe_for(view) == {}
    view.learn(accused_by(accusers, 0) if accusers < members else accused_by(1, 0))
    found = ripe_for(view)
    assert set(found) == {NODES[0]}
    assert found[NODES[0]].accusers == {NODES[n] for n in range(1, accusers + 1)}


def test_who_started_later_is_not_asked() -> None:
    view = mesh_of(3)
    for late in (3, 4, 5):
        view.learn(member_of(late, epoch=NOW + 1))
    view.learn(accused_by(1, 0), accused_by(2, 0))
    assert set(ripe_for(view)) == {NODES[0]}


def test_who_left_or_was_removed_is_not_asked() -> None:
    view = mesh_of(5)
    view.learn(member_of(3, 2, left=True), certificate_by([0, 1, 2], 4))
    view.learn(accused_by(1, 0), accused_by(2, 0))
    assert set(ripe_for(view)) == {NODES[0]}


def test_the_accused_are_not_asked_and_do_not_count() -> None:
    view = mesh_of(5)
    view.learn(accused_by(4, 0), accused_by(1, 0, 4), accused_by(2, 0))
    assert ripe_for(view) == {}  # three accuse node 0, but one of them is accused itself
    view.learn(accused_by(3, 0))
    found = ripe_for(view)
    assert set(found) == {NODES[0]}
    assert found[NODES[0]].accusers == {NODES[1], NODES[2], NODES[3]}


def test_only_those_who_can_be_linked_with_the_subject_are_asked() -> None:
    view = View(WATCHER)
    view.learn(member_of(0), *(member_of(number, addresses=()) for number in range(1, 8)))
    view.learn(accused_by(0, 1))
    assert set(ripe_for(view)) == {NODES[1]}, "nobody else can ever observe it"


def test_half_of_a_mesh_that_dies_at_once_is_removed_by_the_other_half() -> None:
    view = mesh_of(8)
    view.learn(*(accused_by(accuser, 4, 5, 6, 7) for accuser in (0, 1)))
    assert ripe_for(view) == {}
    view.learn(accused_by(2, 4, 5, 6))
    assert ripe_for(view).keys() == {NODES[4], NODES[5], NODES[6]}
    view.learn(accused_by(3, 7))
    assert ripe_for(view).keys() == {NODES[4], NODES[5], NODES[6], NODES[7]}


# What an accusation is


def test_an_accusation_names_the_version_that_stands() -> None:
    view = mesh_of(3)
    view.learn(accused_by(1, (0, 2)))
    assert view.charges.accused(NOW) == frozenset()
    view.learn(member_of(0, 2))
    assert view.charges.accused(NOW) == {NODES[0]}
    view.learn(member_of(0, 3))
    assert view.charges.accused(NOW) == frozenset()


def test_nobody_is_accused_by_itself_or_by_signed_nonsense() -> None:
    view = mesh_of(2)
    view.learn(accused_by(0, 0))
    view.learn(record(1, ACCUSED, epoch=STARTED, body={"s": 7}))
    assert view.charges.accused(NOW) == frozenset()


def test_withdrawing_takes_an_accusation_back() -> None:
    view = mesh_of(4)
    view.learn(accused_by(1, 0, 2))
    assert view.charges.accused(NOW) == {NODES[0], NODES[2]}
    view.learn(accused_by(1, 2, seq=2))
    assert view.charges.accused(NOW) == {NODES[2]}
    assert view.charges.accusers(NODES[2], NOW) == {NODES[1]: accused_by(1, 2, seq=2)}
    view.learn(accused_by(1, seq=3))
    assert view.charges.accused(NOW) == frozenset()


def test_accusations_go_with_the_lease_of_the_accuser() -> None:
    view = mesh_of(2)
    view.learn(member_of(2, ttl_s=60), accused_by(2, 0))
    assert view.charges.accused(NOW) == {NODES[0]}
    view.expire(NOW + 130)
    assert view.charges.accused(NOW + 130) == frozenset()


def test_a_new_epoch_of_the_accuser_starts_with_a_clean_sheet() -> None:
    view = mesh_of(3)
    view.learn(accused_by(1, 0))
    view.learn(member_of(1, epoch=STARTED + 1))
    assert view.charges.accused(NOW) == frozenset()


def test_of_two_rows_about_one_subject_the_later_version_counts() -> None:
    rows = [[NODES[0], STARTED, 5], [NODES[0], STARTED, 2]]
    twice = record(1, ACCUSED, epoch=STARTED, body={"s": rows})
    for facts in permutations([member_of(0, 2), member_of(0, 5), member_of(1), twice]):
        view = View(WATCHER)
        view.learn(*facts)
        assert view.charges.accused(NOW) == {NODES[0]}


# Time


def test_the_living_have_time_to_refute() -> None:
    view = mesh_of(2)
    view.learn(accused_by(0, 1))
    assert view.charges.next_ripe_s(NOW) is None
    assert view.charges.ripe(NOW) == []
    assert view.charges.next_ripe_s(NOW + 0.1) == pytest.approx(EFFECT_DELAY_S - 0.1)
    assert view.charges.ripe(SOON - 0.01) == []
    assert [one.accusation for one in view.charges.ripe(SOON)] == [accusation(1)]
    assert view.charges.next_ripe_s(SOON + 9) == 0


def test_a_refutation_starts_the_time_anew() -> None:
    view = mesh_of(2)
    view.learn(accused_by(0, 1))
    view.charges.ripe(NOW)
    view.learn(member_of(1, 2))
    assert view.charges.ripe(SOON) == []
    view.learn(accused_by(0, (1, 2), seq=2))
    assert view.charges.ripe(SOON) == []
    assert [one.seq for one in view.charges.ripe(SOON + EFFECT_DELAY_S)] == [2]


def test_who_is_removed_already_is_not_removed_again() -> None:
    view = mesh_of(2)
    view.learn(accused_by(0, 1))
    view.learn(*ripe_for(view).values())
    assert view.document.removed == {NODES[1]}
    assert ripe_for(view) == {}
    assert view.charges.next_ripe_s(SOON) is None


def test_a_node_makes_no_certificate_about_itself() -> None:
    view = View(NODES[1])
    view.learn(member_of(0), member_of(1), accused_by(0, 1))
    assert view.charges.accused(NOW) == {NODES[1]}
    assert ripe_for(view) == {}


# Who was wrong too often


def refuted(view: View, accuser: int, times: range, now: float = NOW) -> None:
    """Node 0 refutes the accuser so often; both number what they say."""
    for seq in times:
        view.learn(accused_by(accuser, (0, seq), seq=seq, issued_at=NOW), now=now)
        view.learn(member_of(0, seq + 1, issued_at=NOW), now=now)


def test_who_was_refuted_too_often_does_not_count_for_a_while() -> None:
    view = mesh_of(3)
    refuted(view, 1, range(1, STRIKES_MAX))
    assert not view.charges.discredited(NODES[1], NOW)
    refuted(view, 1, range(STRIKES_MAX, STRIKES_MAX + 1))
    assert view.charges.discredited(NODES[1], NOW)
    assert view.charges.wrong(NOW) == {NODES[1]}
    view.learn(accused_by(1, 2, seq=99))
    assert view.charges.accused(NOW) == frozenset()
    assert ripe_for(view) == {}
    later = NOW + STRIKES_S + 1
    assert not view.charges.discredited(NODES[1], later)
    view.charges.ripe(later)
    assert view.charges.accused(later) == {NODES[2]}


def test_being_wrong_about_many_at_once_is_being_wrong_once() -> None:
    view = mesh_of(8)
    view.learn(accused_by(1, 0, 2, 3, 4, 5))
    view.learn(*(member_of(number, 2) for number in (0, 2, 3, 4, 5)))
    assert not view.charges.discredited(NODES[1], NOW)


def test_a_restart_or_a_version_from_before_the_accusation_refutes_nobody() -> None:
    view = mesh_of(2)
    for seq in range(1, 2 * STRIKES_MAX):
        view.learn(accused_by(1, (0, 1), seq=seq, issued_at=NOW + seq))
        view.learn(member_of(0, 1, epoch=STARTED + seq, issued_at=NOW + seq))
    late = mesh_of(2)
    for seq in range(1, 2 * STRIKES_MAX):
        late.learn(accused_by(1, (0, seq), seq=seq, issued_at=NOW + 1))
        late.learn(member_of(0, seq + 1, issued_at=NOW))
    assert not view.charges.discredited(NODES[1], NOW)
    assert not late.charges.discredited(NODES[1], NOW)


# Certificates that others made


@pytest.mark.parametrize(("accusers", "good"), [((1,), False), ((1, 2), False), ((1, 2, 3), True)])
def test_a_certificate_convinces_with_enough_accusers(
    accusers: tuple[int, ...], *, good: bool
) -> None:
    view = mesh_of(5)
    assert view.charges.convincing(certificate_by(accusers, 0)) is good


def test_what_a_node_would_make_itself_convinces_it() -> None:
    view = mesh_of(6)
    view.learn(*(accused_by(accuser, 0, 5) for accuser in (1, 2, 3, 4)))
    found = ripe_for(view)
    assert set(found) == {NODES[0], NODES[5]}
    newcomer = mesh_of(6)
    for certificate in found.values():
        assert newcomer.charges.convincing(certificate)


def test_evidence_of_strangers_does_not_count() -> None:
    view = mesh_of(3)
    assert view.charges.convincing(certificate_by([1, 2], 0))
    assert not view.charges.convincing(certificate_by([1, 7], 0))


def test_a_certificate_convinces_whatever_was_seen_of_its_accusers_here() -> None:
    view = mesh_of(3)
    refuted(view, 1, range(1, STRIKES_MAX + 1))
    assert view.charges.discredited(NODES[1], NOW)
    assert view.charges.convincing(certificate_by([1, 2], 0))


# Order


FACTS: list[Record] = [
    *(member_of(number, seq) for number in range(4) for seq in (1, 2)),
    member_of(3, 1, epoch=STARTED + 1),
    member_of(2, 3, left=True),
    accused_by(0, 1, 2),
    accused_by(0, (1, 2), 3, seq=2),
    accused_by(1, (3, 2), (2, 2)),
    accused_by(2, (1, 2), (3, 1)),
    accused_by(2, (1, 2), seq=2),
    accused_by(3, (0, 2), 1),
    accused_by(3, (1, 2), seq=1, epoch=STARTED + 1),
]


@given(st.permutations(FACTS), st.permutations(FACTS), st.integers(0, len(FACTS)), st.booleans())
def test_nodes_that_were_told_the_same_decide_alike_whatever_came_first(
    facts: list[Record],
    order: list[Record],
    count: int,
    ask: bool,  # noqa: FBT001 - Hypothesis passes by position
) -> None:
    told = facts[:count]
    one, other = View(WATCHER), View(WATCHER)
    one.learn(*told)
    for fact in (fact for fact in order if fact in told):
        if ask:  # what was worked out in between must not linger
            other.charges.accused(NOW)
        other.learn(fact)
    assert one.document.fingerprint == other.document.fingerprint
    assert one.charges.accused(NOW) == other.charges.accused(NOW)
    ripe, ripe_there = ripe_for(one), ripe_for(other)
    assert {s: c.raw for s, c in ripe.items()} == {s: c.raw for s, c in ripe_there.items()}


@given(st.lists(st.sampled_from(FACTS)))
def test_only_members_that_are_accused_become_ripe(facts: list[Record]) -> None:
    view = View(WATCHER)
    view.learn(*facts)
    accused = view.charges.accused(NOW)
    for subject, certificate in ripe_for(view).items():
        assert subject in accused & view.roster.known.keys()
        assert certificate.accusers <= view.roster.live - accused
        stands = view.document.get(subject, "member")
        assert stands is not None
        assert certificate.accusation == Accusation(subject, stands.epoch, stands.seq)

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gossip.removal import EFFECT_DELAY_S, REFUTED_BURST, quorum
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.evidence import Accusation, Certificate, make_certificate
from p2pmesh.wire.records import Record
from p2pmesh.wire.registers import ACCUSED
from tests.gossip.builders import (
    STARTED,
    View,
    accusation,
    accused_by,
    certificate_by,
    member_of,
    mesh_of,
)
from tests.state.builders import NODES, NOW, record

SOON = NOW + EFFECT_DELAY_S
WATCHER = NodeId(b"w" * 16)  # whose view it is; no member yet


def ripe_for(view: View, now: float = NOW) -> dict[NodeId, Certificate]:
    """Whom the mesh removes of what is known now, once the delay is over."""
    view.removal.ripe(now)
    return {one.subject: one for one in view.removal.ripe(now + EFFECT_DELAY_S)}


# How many are needed


def test_all_of_up_to_three_are_needed_and_then_all_but_one() -> None:
    assert [quorum(voters) for voters in range(6)] == [1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("members", "accusers"), [(2, 1), (3, 2), (4, 3), (5, 3), (6, 4), (7, 4), (8, 4)]
)
def test_enough_accusers_remove_a_node_and_one_fewer_do_not(members: int, accusers: int) -> None:
    view = mesh_of(members, WATCHER)
    for accuser in range(1, accusers):
        view.learn(accused_by(accuser, 0))
    assert ripe_for(view) == {}
    view.learn(accused_by(accusers, 0) if accusers < members else accused_by(1, 0))
    found = ripe_for(view)
    assert set(found) == {NODES[0]}
    assert found[NODES[0]].accusers == {NODES[n] for n in range(1, accusers + 1)}


def test_who_started_later_is_not_asked() -> None:
    view = mesh_of(3, WATCHER)
    for late in (3, 4, 5):
        view.learn(member_of(late, epoch=NOW + 1))
    view.learn(accused_by(1, 0), accused_by(2, 0))
    assert set(ripe_for(view)) == {NODES[0]}


def test_who_left_or_was_removed_is_not_asked() -> None:
    view = mesh_of(5, WATCHER)
    view.learn(member_of(3, 2, left=True), certificate_by([0, 1, 2], 4))
    view.learn(accused_by(1, 0), accused_by(2, 0))
    assert set(ripe_for(view)) == {NODES[0]}


def test_whom_two_accuse_is_not_asked_and_does_not_count() -> None:
    view = mesh_of(6, WATCHER)
    view.learn(accused_by(1, 0, 5), accused_by(2, 0, 5), accused_by(5, 0))
    assert ripe_for(view) == {}, "of the four others three are needed, and node 5 does not count"
    view.learn(accused_by(3, 0))
    found = ripe_for(view)
    assert set(found) == {NODES[0]}
    assert found[NODES[0]].accusers == {NODES[1], NODES[2], NODES[3]}


def test_whom_one_alone_accuses_is_asked_and_counts() -> None:
    view = mesh_of(5, WATCHER)
    view.learn(accused_by(1, 0, 4), accused_by(2, 0))
    assert ripe_for(view) == {}, "node 4 might speak, so three are needed"
    view.learn(accused_by(4, 0))
    assert ripe_for(view)[NODES[0]].accusers == {NODES[1], NODES[2], NODES[4]}


def test_only_those_who_can_be_linked_with_the_subject_are_asked() -> None:
    view = View(WATCHER)
    view.learn(member_of(0), *(member_of(number, addresses=()) for number in range(1, 8)))
    view.learn(accused_by(0, 1))
    assert set(ripe_for(view)) == {NODES[1]}, "nobody else can ever observe it"


def test_half_of_a_mesh_that_dies_at_once_is_removed_by_the_other_half() -> None:
    view = mesh_of(8, WATCHER)
    view.learn(*(accused_by(accuser, 4, 5, 6, 7) for accuser in (0, 1)))
    assert ripe_for(view) == {}
    view.learn(accused_by(2, 4, 5, 6))
    assert ripe_for(view).keys() == {NODES[4], NODES[5], NODES[6]}
    view.learn(accused_by(3, 7))
    assert ripe_for(view).keys() == {NODES[4], NODES[5], NODES[6], NODES[7]}


# What an accusation is


def test_an_accusation_names_the_version_that_stands() -> None:
    view = mesh_of(3, WATCHER)
    view.learn(accused_by(1, (0, 2)))
    assert view.removal.accused == frozenset()
    view.learn(member_of(0, 2))
    assert view.removal.accused == {NODES[0]}
    view.learn(member_of(0, 3))
    assert view.removal.accused == frozenset()


def test_nobody_is_accused_by_itself_or_by_signed_nonsense() -> None:
    view = mesh_of(2, WATCHER)
    view.learn(accused_by(0, 0))
    view.learn(record(1, ACCUSED, epoch=STARTED, body={"s": 7}))
    assert view.removal.accused == frozenset()


def test_withdrawing_takes_an_accusation_back() -> None:
    view = mesh_of(4, WATCHER)
    view.learn(accused_by(1, 0, 2))
    assert view.removal.accused == {NODES[0], NODES[2]}
    view.learn(accused_by(1, 2, seq=2))
    assert view.removal.accused == {NODES[2]}
    assert view.removal.accusers(NODES[2]) == {NODES[1]: accused_by(1, 2, seq=2)}
    view.learn(accused_by(1, seq=3))
    assert view.removal.accused == frozenset()


def test_accusations_go_with_the_lease_of_the_accuser() -> None:
    view = mesh_of(2, WATCHER)
    view.learn(member_of(2, ttl_s=60), accused_by(2, 0))
    assert view.removal.accused == {NODES[0]}
    view.expire(NOW + 130)
    assert view.removal.accused == frozenset()


def test_a_new_epoch_of_the_accuser_starts_with_a_clean_sheet() -> None:
    view = mesh_of(3, WATCHER)
    view.learn(accused_by(1, 0))
    view.learn(member_of(1, epoch=STARTED + 1))
    assert view.removal.accused == frozenset()


def test_of_two_rows_about_one_subject_the_later_version_counts() -> None:
    rows = [[NODES[0], STARTED, 5], [NODES[0], STARTED, 2]]
    twice = record(1, ACCUSED, epoch=STARTED, body={"s": rows})
    for facts in permutations([member_of(0, 2), member_of(0, 5), member_of(1), twice]):
        view = View(WATCHER)
        view.learn(*facts)
        assert view.removal.accused == {NODES[0]}


# Time


def test_the_living_have_time_to_refute() -> None:
    view = mesh_of(2, WATCHER)
    view.learn(accused_by(0, 1))
    assert view.removal.next_ripe_s(NOW) is None
    assert view.removal.ripe(NOW) == []
    assert view.removal.next_ripe_s(NOW + 0.1) == pytest.approx(EFFECT_DELAY_S - 0.1)
    assert view.removal.ripe(SOON - 0.01) == []
    assert [one.accusation for one in view.removal.ripe(SOON)] == [accusation(1)]
    assert view.removal.next_ripe_s(SOON + 9) == 0


def test_a_refutation_starts_the_time_anew() -> None:
    view = mesh_of(2, WATCHER)
    view.learn(accused_by(0, 1))
    view.removal.ripe(NOW)
    view.learn(member_of(1, 2))
    assert view.removal.ripe(SOON) == []
    view.learn(accused_by(0, (1, 2), seq=2))
    assert view.removal.ripe(SOON) == []
    assert [one.seq for one in view.removal.ripe(SOON + EFFECT_DELAY_S)] == [2]


def test_who_is_removed_already_is_not_removed_again() -> None:
    view = mesh_of(2, WATCHER)
    view.learn(accused_by(0, 1))
    view.learn(*ripe_for(view).values())
    assert view.document.removed == {NODES[1]}
    assert ripe_for(view) == {}
    assert view.removal.next_ripe_s(SOON) is None


def test_a_node_makes_no_certificate_about_itself() -> None:
    view = View(NODES[1])
    view.learn(member_of(0), member_of(1), accused_by(0, 1))
    assert view.removal.accused == {NODES[1]}
    assert ripe_for(view) == {}


# Who does not count


def test_a_liar_that_names_everybody_is_one_voice() -> None:
    view = mesh_of(8, WATCHER)
    view.learn(accused_by(7, 0, 1, 2, 3, 4, 5, 6))
    assert view.removal.accused == set(NODES[:7])
    assert view.removal.non_voters == frozenset()
    assert ripe_for(view) == {}


def test_two_accusers_discount() -> None:
    view = mesh_of(8, WATCHER)
    view.learn(accused_by(6, 1, 2), accused_by(7, 2, 3))
    assert view.removal.non_voters == {NODES[2]}
    view.learn(member_of(2, 2))
    assert view.removal.non_voters == frozenset()


def test_two_accusers_of_different_versions_do_not_discount() -> None:
    view = mesh_of(8, WATCHER)
    view.learn(accused_by(6, 2), accused_by(7, (2, 2)))
    assert view.removal.non_voters == frozenset()


def test_the_word_of_this_node_discounts_for_itself() -> None:
    mine, other = mesh_of(4, NODES[0]), mesh_of(4, NODES[1])
    for view in (mine, other):
        view.learn(accused_by(0, 3))
    assert mine.removal.non_voters == {NODES[3]}
    assert other.removal.non_voters == frozenset()


def test_naming_somebody_twice_is_one_voice() -> None:
    rows = [[NODES[2], STARTED, 1], [NODES[2], STARTED, 1], [NODES[2], STARTED, 7]]
    view = mesh_of(8, WATCHER)
    view.learn(record(1, ACCUSED, epoch=STARTED, body={"s": rows}))
    assert view.removal.non_voters == frozenset()


@pytest.mark.parametrize("members", [2, 3, 4, 8])
def test_the_only_one_left_removes_all_others(members: int) -> None:
    view = mesh_of(members, NODES[0])
    view.learn(accused_by(0, *range(1, members)))
    found = ripe_for(view)
    assert set(found) == set(NODES[1:members])
    view.learn(*found.values())
    assert view.members.live == {NODES[0]}


def test_the_only_one_left_does_not_decide_for_others() -> None:
    view = mesh_of(3, NODES[0])
    view.learn(accused_by(0, 1, 2))
    found = ripe_for(view)
    other = mesh_of(3, NODES[1])
    assert not other.removal.is_sufficient(found[NODES[2]])
    other.learn(accused_by(1, 2))
    assert other.removal.is_sufficient(found[NODES[2]]), "node 1 misses it as well"


def test_an_accusation_that_is_dated_back_does_not_silence_who_was_there() -> None:
    view = View(WATCHER)
    view.learn(*(member_of(number) for number in range(7)), member_of(7, epoch=1))
    view.learn(accused_by(7, 0, epoch=1, issued_at=STARTED - 1))
    assert view.removal.accused == {NODES[0]}
    assert ripe_for(view) == {}


def test_who_was_removed_on_few_words_is_looked_for_by_the_others() -> None:
    view = mesh_of(5, NODES[0])
    view.learn(accused_by(1, 3), certificate_by([1, 2], 3))
    assert view.removal.weakly_removed == {NODES[3]}
    view.learn(accused_by(0, 3))
    assert view.removal.weakly_removed == frozenset(), "this node has said what it found"


@pytest.mark.parametrize("accusers", [(0, 1), (1, 2, 4, 5)], ids=["mine", "enough for anybody"])
def test_who_was_removed_on_enough_words_is_not_looked_for(accusers: tuple[int, ...]) -> None:
    view = mesh_of(6, NODES[0])
    view.learn(certificate_by(accusers, 3))
    assert view.document.removed == {NODES[3]}
    assert view.removal.weakly_removed == frozenset()


def test_only_so_many_are_looked_for_at_a_time() -> None:
    view = mesh_of(7, NODES[0])
    view.learn(*(certificate_by([1, 2], number) for number in (3, 4, 5, 6)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("p2pmesh.gossip.removal.WEAKLY_REMOVED_MAX", 2)
        assert view.removal.weakly_removed == set(sorted(NODES[3:7])[:2])


def test_a_removed_one_speaks_up_against_a_certificate_that_does_not_convince_it() -> None:
    view = mesh_of(7, NODES[0])
    certificate = certificate_by([1], 0)
    assert not view.removal.is_sufficient(certificate)
    answers = [view.removal.must_answer(certificate, NOW) for _ in range(REFUTED_BURST + 1)]
    assert answers == [True] * REFUTED_BURST + [False], "a liar does not make it speak for ever"
    stranger = certificate_by([7], 0)
    assert not view.removal.must_answer(stranger, NOW)


# Certificates that others made


@pytest.mark.parametrize(("accusers", "good"), [((1,), False), ((1, 2), False), ((1, 2, 3), True)])
def test_a_certificate_convinces_with_enough_accusers(
    accusers: tuple[int, ...], *, good: bool
) -> None:
    view = mesh_of(5, WATCHER)
    assert view.removal.is_sufficient(certificate_by(accusers, 0)) is good


def test_what_a_node_would_make_itself_convinces_it() -> None:
    view = mesh_of(6, WATCHER)
    view.learn(*(accused_by(accuser, 0, 5) for accuser in (1, 2, 3, 4)))
    found = ripe_for(view)
    assert set(found) == {NODES[0], NODES[5]}
    newcomer = mesh_of(6, WATCHER)
    for certificate in found.values():
        assert newcomer.removal.is_sufficient(certificate)


def test_evidence_of_strangers_does_not_count() -> None:
    view = mesh_of(3, WATCHER)
    assert view.removal.is_sufficient(certificate_by([1, 2], 0))
    assert not view.removal.is_sufficient(certificate_by([1, 7], 0))


def test_a_certificate_convinces_whatever_was_refuted_before() -> None:
    view = mesh_of(3, WATCHER)
    for seq in range(1, 20):
        view.learn(accused_by(1, (2, seq), seq=seq), member_of(2, seq + 1))
    assert view.removal.is_sufficient(certificate_by([1, 2], 0))


def test_whom_the_evidence_names_twice_is_not_asked() -> None:
    evidence = [accused_by(1, 0, 3, 4), accused_by(2, 0, 3, 4)]
    assert mesh_of(5, WATCHER).removal.is_sufficient(make_certificate(accusation(0), evidence))
    once = [accused_by(1, 0, 3), accused_by(2, 0, 4)]
    assert not mesh_of(5, WATCHER).removal.is_sufficient(make_certificate(accusation(0), once))


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
            assert other.removal.non_voters <= other.removal.accused
        other.learn(fact)
    assert one.document.fingerprint == other.document.fingerprint
    assert one.removal.accused == other.removal.accused
    assert one.removal.non_voters == other.removal.non_voters
    ripe, ripe_there = ripe_for(one), ripe_for(other)
    assert {s: c.raw for s, c in ripe.items()} == {s: c.raw for s, c in ripe_there.items()}


@given(st.lists(st.sampled_from(FACTS)))
def test_only_members_that_are_accused_become_ripe(facts: list[Record]) -> None:
    view = View(WATCHER)
    view.learn(*facts)
    accused, non_voters = view.removal.accused, view.removal.non_voters
    for subject, certificate in ripe_for(view).items():
        assert subject in accused & view.members.known.keys()
        assert certificate.accusers <= view.members.live - non_voters
        stands = view.document.get(subject, "member")
        assert stands is not None
        assert certificate.accusation == Accusation(subject, stands.epoch, stands.seq)

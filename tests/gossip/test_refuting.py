"""When this node has to answer those who accuse it."""

from __future__ import annotations

import pytest

from p2pmesh.gossip.removal import REFUTED_BURST, REFUTED_PER_S
from tests.gossip.builders import View, accused_by, member_of, mesh_of
from tests.state.builders import NODES, NOW


def answers(view: View, accusers: range, now: float) -> int:
    """How often node 0 speaks up if these, one after the other, keep accusing it."""
    known = view.members.known[NODES[0]]
    count, seq = 0, known.seq
    for turn in accusers:
        view.learn(accused_by(1, (0, seq), seq=turn))
        if view.removal.must_refute(now):
            count, seq = count + 1, seq + 1
            view.learn(member_of(0, seq))
    return count


def test_who_is_not_accused_has_nothing_to_answer() -> None:
    view = mesh_of(4)
    view.learn(accused_by(1, 2))
    assert not view.removal.must_refute(NOW)


def test_a_lone_accuser_is_answered_a_few_times_and_then_rarely() -> None:
    view = mesh_of(4)
    assert answers(view, range(1, 50), NOW) == REFUTED_BURST == 3
    every_s = 1 / REFUTED_PER_S
    assert answers(view, range(50, 60), NOW + every_s - 1) == 0
    assert answers(view, range(60, 70), NOW + every_s + 1) == 1
    assert answers(view, range(70, 80), NOW + 700 + every_s) == REFUTED_BURST


def test_a_second_accuser_is_answered_at_once() -> None:
    view = mesh_of(4)
    seq = 1 + answers(view, range(1, 50), NOW)
    assert not view.removal.must_refute(NOW)
    view.learn(accused_by(2, (0, seq)))
    assert view.removal.must_refute(NOW)
    assert view.removal.must_refute(NOW), "as often as it takes"


def test_other_accusers_have_answers_of_their_own() -> None:
    view = mesh_of(4)
    seq = 1 + answers(view, range(1, 50), NOW)
    view.learn(accused_by(1, seq=50), accused_by(2, (0, seq)))
    assert view.removal.must_refute(NOW)


@pytest.mark.parametrize("gone", [(), (2,), (2, 3)])
def test_who_could_be_removed_by_one_always_answers(gone: tuple[int, ...]) -> None:
    view = mesh_of(2 + len(gone))
    view.learn(*(member_of(number, 2, left=True) for number in gone))
    assert answers(view, range(1, 50), NOW) == 49

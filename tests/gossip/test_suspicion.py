from __future__ import annotations

import pytest

from p2pmesh.gossip.probe import MISSES_MIN
from p2pmesh.gossip.suspicion import (
    ASK_AGAIN_S,
    DENIERS_SURE,
    HELPERS_MAX,
    KEPT_AFTER_REMOVAL_S,
    REST_FIRST_S,
    REST_MAX_S,
    STRANGER_FACTOR,
    SUSPECTS_PER_TURN,
    TOLD_WITHIN_S,
    Question,
)
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.evidence import ACCUSED_MAX
from tests.gossip.builders import STARTED, accusation, certificate_by, member_of, mesh_of
from tests.gossip.observer import HELPERS, SUBJECT, Observer, accusing, silent
from tests.state.builders import NODES, NOW

# Asking


def test_helpers_are_asked_before_the_last_miss() -> None:
    observer = Observer()
    observer.link()
    observer.miss(MISSES_MIN - 2)
    assert observer.ask() == []
    observer.miss(1)
    asked = observer.ask()
    assert [one.helper for one in asked] == HELPERS[:HELPERS_MAX]
    assert {one.subject for one in asked} == {SUBJECT}


def test_at_most_so_many_helpers_are_asked_and_only_once_in_a_while() -> None:
    observer = silent()
    observer.helpers = list(NODES[2:8])
    assert len(observer.ask()) == HELPERS_MAX
    assert observer.ask() == []
    observer.now += ASK_AGAIN_S
    again = observer.ask()
    assert len(again) == HELPERS_MAX
    assert len({one.token for one in again}) == 1


def test_each_round_of_questions_has_its_own_token() -> None:
    observer = silent()
    first = observer.ask()
    observer.now += ASK_AGAIN_S
    assert {one.token for one in observer.ask()}.isdisjoint(one.token for one in first)


# Accusing


def test_who_misses_enough_and_is_reached_by_nobody_is_accused() -> None:
    assert accusing().suspicion.accusations == {SUBJECT: accusation(1)}


def test_too_few_misses_accuse_nobody_whatever_helpers_say() -> None:
    observer = Observer()
    observer.link()
    observer.miss(MISSES_MIN - 1)
    observer.tell(observer.ask(), alive=False)
    assert not observer.review()


def test_nobody_is_accused_while_helpers_may_still_answer() -> None:
    observer = silent()
    observer.ask()
    assert not observer.review()
    observer.now += TOLD_WITHIN_S
    assert observer.review()


def test_one_helper_that_reaches_it_is_enough_to_wait() -> None:
    observer = silent()
    asked = observer.ask()
    observer.tell(asked[:1], alive=True)
    observer.tell(asked[1:], alive=False)
    assert not observer.review()
    observer.now += ASK_AGAIN_S
    assert observer.review()


@pytest.mark.parametrize("wrong", ["helper", "token", "twice"])
def test_word_that_was_not_asked_for_does_not_count(wrong: str) -> None:
    observer = silent()
    first, *rest = observer.ask()
    observer.tell(rest, alive=False)
    match wrong:
        case "helper":
            observer.suspicion.told(NODES[7], SUBJECT, first.token, alive=True, now=observer.now)
            observer.tell([first], alive=False)
        case "token":
            other = Question(first.helper, SUBJECT, first.token + 1)
            observer.tell([other], alive=True)
            observer.tell([first], alive=False)
        case _:
            observer.tell([first], alive=False)
            observer.tell([first], alive=True)
    assert observer.review()


def test_a_sign_of_life_ends_the_suspicion() -> None:
    observer = silent()
    asked = observer.ask()
    observer.hear()
    observer.tell(asked, alive=False)
    assert not observer.review()
    observer.miss(MISSES_MIN)
    assert not observer.review(), "the old denials are gone"


@pytest.mark.parametrize(("deniers", "factor"), [(1, STRANGER_FACTOR), (DENIERS_SURE, 1)])
def test_who_was_never_reached_is_given_more_time_unless_two_deny_it(
    deniers: int, factor: int
) -> None:
    observer = Observer(helpers=HELPERS[:deniers])
    observer.prober.count({SUBJECT}, observer.now)
    for second in range(1, factor * MISSES_MIN + 1):
        assert not observer.accuses
        observer.now = float(second)
        observer.prober.count({SUBJECT}, observer.now)
        observer.tell(observer.ask(), alive=False)
        observer.review()
    assert observer.accuses


@pytest.mark.parametrize("others", [True, False])
def test_without_any_word_a_stranger_is_accused_only_if_nobody_could_know(*, others: bool) -> None:
    observer = Observer(view=mesh_of(5 if others else 2), helpers=[])
    observer.prober.count({SUBJECT}, observer.now)
    for second in range(1, 5 * MISSES_MIN):
        observer.now = float(second)
        observer.prober.count({SUBJECT}, observer.now)
        observer.ask()
        observer.review()
    assert observer.accuses is not others


def test_having_reached_an_earlier_life_is_not_having_reached_this_one() -> None:
    observer = silent()
    observer.learn(member_of(1, epoch=STARTED + 1))
    observer.ask()
    observer.now += ASK_AGAIN_S
    assert not observer.review()
    observer.tell(observer.ask(), alive=False)
    observer.miss(STRANGER_FACTOR * MISSES_MIN - MISSES_MIN)
    assert observer.review()


@pytest.mark.parametrize("gone", ["stranger", "left"])
def test_only_members_are_accused(gone: str) -> None:
    observer = silent() if gone == "left" else Observer(view=mesh_of(1))
    if gone == "left":
        observer.learn(member_of(1, 2, left=True))
    observer.link()
    observer.miss(MISSES_MIN)
    observer.tell(observer.ask(), alive=False)
    assert not observer.review()


def test_only_who_is_observed_is_accused() -> None:
    observer = silent()
    observer.tell(observer.ask(), alive=False)
    observer.subjects = set()
    assert not observer.review()


def test_accusations_fit_their_register() -> None:
    observer = silent()
    others = [NodeId(number.to_bytes(16, "big")) for number in range(ACCUSED_MAX)]
    for node in others:
        observer.view.members.known[node] = observer.view.members.known[SUBJECT]
        observer.suspicion.accusations[node] = accusation(1)._replace(subject=node)
        observer.suspicion.heard(node)
    observer.tell(observer.ask(), alive=False)
    assert not observer.review()
    del observer.suspicion.accusations[others[0]]
    assert observer.review()


def test_whoever_was_never_there_gives_way_to_a_subject_that_was() -> None:
    observer = silent()
    strangers = [NodeId(number.to_bytes(16, "big")) for number in range(ACCUSED_MAX)]
    for node in strangers:
        observer.view.members.known[node] = observer.view.members.known[SUBJECT]
        observer.suspicion.accusations[node] = accusation(1)._replace(subject=node)
    observer.tell(observer.ask(), alive=False)
    assert observer.review()
    assert observer.accuses
    assert len(observer.suspicion.accusations) == ACCUSED_MAX
    assert not observer.review()


def test_whom_this_node_once_reached_it_asks_about_before_all_strangers() -> None:
    observer = silent()
    strangers = {NodeId(bytes([0, number]) + bytes(14)) for number in range(SUSPECTS_PER_TURN)}
    observer.subjects |= strangers
    for _ in range(MISSES_MIN + 1):
        observer.now += 1.0
        observer.prober.count(strangers, observer.now)
    first = [one.subject for one in observer.ask()]
    assert first[0] == SUBJECT
    assert len(set(first)) == SUSPECTS_PER_TURN
    assert {one.subject for one in observer.ask()} == strangers - set(first)
    assert observer.ask() == []


# Withdrawing


def test_an_answer_withdraws_an_accusation() -> None:
    observer = accusing()
    observer.hear()
    assert observer.review()
    assert not observer.accuses


def test_a_refutation_withdraws_an_accusation() -> None:
    observer = accusing()
    observer.learn(member_of(1, 2))
    assert observer.review()
    assert not observer.accuses


@pytest.mark.parametrize("how", ["left", "gone"])
def test_who_is_gone_for_good_is_not_accused_any_longer(how: str) -> None:
    observer = accusing()
    if how == "left":
        observer.learn(member_of(1, 2, left=True))
    else:
        observer.view.expire(NOW + 1000)
    assert observer.review()
    assert not observer.accuses


def test_nothing_is_kept_of_suspects_that_are_gone() -> None:
    observer = silent()
    observer.ask()
    assert SUBJECT in observer.suspicion._suspects
    observer.view.expire(NOW + 1000)
    observer.review()
    assert not observer.suspicion._suspects


def test_an_accusation_stays_beside_the_certificate_while_there_is_room() -> None:
    observer = accusing()
    observer.view.learn(certificate_by([2, 3, 4], 1))
    assert not observer.review()
    observer.subjects = set()
    observer.now += 2 * KEPT_AFTER_REMOVAL_S
    assert not observer.review()
    assert observer.accuses


def test_without_room_the_accusations_of_removed_ones_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("p2pmesh.gossip.suspicion.ACCUSED_MAX", 1)
    observer = accusing()
    observer.view.learn(certificate_by([2, 3, 4], 1))
    assert not observer.review()
    observer.subjects = set()
    observer.now += KEPT_AFTER_REMOVAL_S
    assert not observer.review(), "others may still be making theirs"
    observer.now += 1
    assert observer.review()
    assert not observer.accuses


def pauses_between_accusations(observer: Observer, *, rounds: int) -> list[float]:
    pauses = []
    for seq in range(2, rounds + 2):
        observer.learn(member_of(1, seq))
        observer.review()
        refuted_at = observer.now
        while not observer.accuses:
            observer.tell(observer.ask(), alive=False)
            observer.now += 0.5
            observer.review()
        pauses.append(observer.now - refuted_at)
    return pauses


def test_who_was_wrong_rests_longer_each_time() -> None:
    pauses = pauses_between_accusations(accusing(), rounds=7)
    expected = [min(REST_FIRST_S * 2**n, REST_MAX_S) for n in range(7)]
    assert pauses == pytest.approx(expected, abs=TOLD_WITHIN_S)


def test_a_restart_of_the_subject_is_no_error_of_the_observer() -> None:
    observer = accusing()
    observer.learn(member_of(1, epoch=STARTED + 1))
    observer.review()
    assert not observer.accuses
    observer.suspicion.heard(SUBJECT)
    observer.tell(observer.ask(), alive=False)
    assert observer.review()


def test_who_was_away_itself_begins_anew() -> None:
    observer = silent()
    observer.tell(observer.ask(), alive=False)
    observer.suspicion.forgive()
    assert not observer.review()

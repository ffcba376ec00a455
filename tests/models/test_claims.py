"""What several nodes say about shards, made one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.models.claims import agreed, vouched
from p2pmesh.models.parts import UNMEASURED, ShardKind, ShardQuality

R, S = "ab" * 32, "cd" * 32
HONEST = ShardQuality(ShardKind.EXPERTS, R, 16, 8, 50_000, 930_000)


def said(divergence: int, coverage: int = 930_000) -> tuple[ShardQuality, ...]:
    return (HONEST._replace(divergence=divergence, coverage=coverage),)


def test_what_all_say_is_agreed() -> None:
    assert agreed([(HONEST,), (), (HONEST,)]) == (HONEST,)
    assert agreed([(), ()]) == ()


def test_of_two_claims_the_worse_one_counts() -> None:
    [one] = agreed([said(0, 990_000), said(70_000, 930_000)])
    assert (one.divergence, one.coverage) == (70_000, 930_000)


@given(st.integers(0, 10**8), st.integers(0, 10**6), st.permutations(range(3)))
def test_one_of_three_moves_nothing(divergence: int, coverage: int, order: list[int]) -> None:
    claims = [said(50_000), said(50_000), said(divergence, coverage)]
    assert agreed([claims[at] for at in order]) == (HONEST,)


def test_a_guess_is_no_measure() -> None:
    guess = HONEST._replace(divergence=UNMEASURED)
    assert set(agreed([(HONEST, guess), (guess,)])) == {HONEST, guess}


def test_who_repeats_itself_has_one_voice() -> None:
    loud = tuple(HONEST._replace(divergence=n) for n in range(10))
    [one] = agreed([loud, (HONEST,), (HONEST,)])
    assert one == HONEST


def test_several_vouch_for_a_ranking_or_all_there_are() -> None:
    other = HONEST._replace(ranking=S)
    mine = (ShardKind.EXPERTS, R)
    assert vouched([(HONEST,)]) == {mine}, "the only holder has nobody to ask"
    assert vouched([(HONEST,), ()]) == frozenset()
    assert vouched([(HONEST,), (other,)]) == frozenset()
    assert vouched([(HONEST, HONEST._replace(critical=9)), ()]) == frozenset(), "one voice"
    assert vouched([(HONEST,), (), (HONEST._replace(critical=9),)]) == {mine}
    assert vouched([]) == frozenset()


def test_who_has_a_ranking_need_not_have_the_scores_of_neurons() -> None:
    thin = HONEST._replace(kind=ShardKind.THIN)
    assert vouched([(HONEST, thin), (HONEST,)]) == {(ShardKind.EXPERTS, R)}

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import ModelError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.experts import ExpertLayout, check_lists, layout_of
from p2pmesh.models.importance import Ranking, digest_of, rank
from p2pmesh.models.parts import UNMEASURED, Shard, ShardKind
from p2pmesh.models.shards import Places, sizes_to_measure
from tests.models.sliced import assembled, assert_kept, source

LAYOUT = ExpertLayout(count=4, used=2, groups=1, groups_used=1, layers=(1, 2, 5), fixed_used=False)
# Layer 5 predicts further tokens: it has experts, and no text runs through them.
WEIGHTS = [[4.0, 1.0, 3.0, 2.0], [1.0, 5.0, 1.0, 1.0]]


def ranking(
    critical: tuple[tuple[int, ...], ...] = ((), ()), **domains: list[list[float]]
) -> Ranking:
    scores = domains or {"prose": WEIGHTS}
    return rank(ModelDigest("a" * 64), "counts-energy", (1, 2), scores, critical)


def test_the_first_places_are_the_most_important_experts_of_each_layer() -> None:
    places = Places(ranking(), LAYOUT)
    assert places.count == 4
    assert places.lists([0]) == {1: (0,), 2: (1,), 5: (0,)}
    assert places.lists([1, 0, 3]) == {1: (0, 1, 2), 2: (0, 1, 3), 5: (0, 1, 3)}
    assert places.lists(range(4)) == dict.fromkeys(LAYOUT.layers, (0, 1, 2, 3))


def test_what_every_shard_needs_comes_first_and_is_in_the_smallest() -> None:
    assert Places(ranking(), LAYOUT).critical_min == 2, "as many as each token uses"
    places = Places(ranking(critical=((), (0, 2, 3))), LAYOUT)
    assert places.lists([0, 1, 2])[2] == (0, 2, 3)
    assert places.critical_min == 3


def test_all_domains_count_alike_whatever_their_scale() -> None:
    code = [[0.0, 900.0, 0.0, 100.0], WEIGHTS[1]]
    both = Places(ranking(prose=WEIGHTS, code=code), LAYOUT)
    assert both.lists([0])[1] == (1,)
    assert both.lists([0, 1])[1] == (0, 1)
    # Of prose the layer keeps 4 + 1 of 10, of code 900 of 1000.
    assert both.coverage(2) == pytest.approx(500_000, abs=20)


def test_a_group_of_experts_gives_as_many_as_any_other() -> None:
    layout = replace(LAYOUT, groups=2, used=2)
    places = Places(ranking(), layout)
    assert places.count == 2
    assert places.lists([0]) == {1: (0, 2), 2: (1, 2), 5: (0, 2)}
    assert check_lists(layout, places.lists([0, 1])) == 4
    assert places.critical_min == 2


def test_the_experts_of_a_shard() -> None:
    places = Places(ranking(), LAYOUT)
    shard = Shard(ShardKind.EXPERTS, digest_of(places.ranking), 4, 1, 0b1001)
    assert places.of(shard) == places.lists([0, 3])
    for other in (shard._replace(ranking="b" * 64), shard._replace(places=5)):
        with pytest.raises(ModelError, match="another ranking"):
            places.of(other)


def test_a_ranking_of_other_experts_is_refused() -> None:
    for layout in (replace(LAYOUT, count=8), replace(LAYOUT, layers=(1, 3))):
        with pytest.raises(ModelError, match="other experts; rank this one anew"):
            Places(ranking(), layout)


def test_quality_says_what_is_covered_where_that_is_least() -> None:
    places = Places(ranking(), LAYOUT)
    assert places.quality(2).coverage == pytest.approx(700_000, abs=20)  # 4 + 3 of 10
    assert places.quality(3, 80_000) == (
        ShardKind.EXPERTS, digest_of(places.ranking), 4, 3, 80_000, places.coverage(3)
    )  # fmt: skip
    assert places.predicted() is None, "three of four cover 87 %"
    steep = Places(ranking(prose=[[90.0, 8.0, 1.0, 1.0]] * 2), LAYOUT)
    predicted = steep.predicted()
    assert predicted is not None
    assert (predicted.critical, predicted.divergence) == (2, UNMEASURED)


@given(st.integers(2, 40))
def test_the_sizes_to_measure_go_from_half_to_all_but_one(experts: int) -> None:
    layout = replace(LAYOUT, count=experts)
    flat = rank(ModelDigest("a" * 64), "counts", (1,), {"x": [[1.0] * experts]}, ((),))
    places = Places(flat, replace(layout, layers=(1,)))
    sizes = [*sizes_to_measure(places)]
    assert sizes == [n for n in range(experts // 2, experts) if n >= places.critical_min]


def test_the_plan_of_places_is_that_of_their_experts() -> None:
    model = source("qwen3moe")
    flat = rank(ModelDigest("a" * 64), "counts", range(3), {"x": [[1.0] * 16] * 3}, ((),) * 3)
    places = Places(flat, layout_of(model.headers))
    shard = Shard(ShardKind.EXPERTS, digest_of(flat), 16, 4, 0b1011111)
    cut = assembled(model, places.plan_of(shard)(model.headers))
    assert_kept(model, cut, dict.fromkeys(range(3), (0, 1, 2, 3, 4, 6)))
    critical = assembled(model, places.plan(4)(model.headers))
    assert_kept(model, critical, dict.fromkeys(range(3), (0, 1, 2, 3)))

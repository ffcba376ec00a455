from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import ModelError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.importance import Ranking, digest_of, rank
from p2pmesh.models.parts import UNMEASURED, Shard, ShardKind
from p2pmesh.models.shards import RankedPlaces, sizes_to_measure
from p2pmesh.models.thin import ThinLayout
from p2pmesh.models.thin_places import Floats, ThinPlaces

# Layer 5 predicts further tokens: it has experts, and no text runs through them.
LAYOUT = ThinLayout(experts=2, width=4, step=1, blocks={1: 1, 2: 1, 5: 1}, keys=())
FIRST = [[1, 5, 3, 4], [2, 2, 2, 2]]
OTHER = [[8, 0, 0, 0], [0, 1, 2, 0]]


def ranking(*domains: str) -> Ranking:
    weights = {name: [[1.0, 1.0]] * 2 for name in domains or ("prose",)}
    return rank(ModelDigest("a" * 64), "counts-energy", (1, 2), weights, ((), ()))


def places(*layers: object, layout: ThinLayout = LAYOUT, of: Ranking | None = None) -> ThinPlaces:
    """Places by the scores of two layers, [domains, experts, width] each."""
    return ThinPlaces(of or ranking(), np.array(layers, np.float32), layout)


def test_the_neurons_with_the_largest_scores_are_kept() -> None:
    both = places([FIRST], [OTHER])
    assert both.count == 4
    assert both.kept(1, 2).tolist() == [[1, 3], [0, 1]]
    assert both.kept(2, 1).tolist() == [[0], [2]]
    assert both.kept(5, 2).tolist() == [[0, 1], [0, 1]], "nothing is known of them"
    for layer in LAYOUT.blocks:
        assert both.kept(layer, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_blocks_are_kept_by_the_sums_of_their_scores() -> None:
    layout = replace(LAYOUT, step=2, blocks={1: 2, 2: 1, 5: 2})
    both = places([FIRST], [OTHER], layout=layout)
    assert both.count == 2
    assert both.kept(1, 1).tolist() == [[2, 3], [0, 1]], "of layer 1 in pairs"
    assert both.kept(2, 1).tolist() == [[0, 1], [1, 2]], "of layer 2 one by one"
    assert both.kept(5, 1).tolist() == [[0, 1], [0, 1]]


def test_all_domains_count_alike_whatever_their_scale() -> None:
    loud = [[[900, 0, 100, 0], [0, 0, 0, 0]]]
    quiet = [[[0, 0.3, 0.1, 0], [0, 0.6, 0, 0]]]
    both = places(loud + quiet, [OTHER, OTHER], of=ranking("code", "prose"))
    assert both.kept(1, 2).tolist() == [[0, 1], [0, 1]]


def test_coverage_is_that_of_the_worst_layer_and_domain() -> None:
    both = places([FIRST], [OTHER])
    # Of 21 in layer 1 the first places of both experts have 5 + 2, 9 + 4, 12 + 6 and all.
    expected = [0, 7 / 21, 13 / 21, 18 / 21, 1]
    assert [both.coverage(n) for n in range(5)] == pytest.approx([10**6 * x for x in expected], 1)
    assert both.coverage(4) == 1_000_000
    two = places([FIRST, OTHER], [OTHER, OTHER], of=ranking("code", "prose"))
    assert two.coverage(1) <= both.coverage(1)


def test_a_layer_that_no_token_reached_has_equal_neurons() -> None:
    silent = places([FIRST], [np.zeros((2, 4))])
    assert silent.coverage(1) == 250_000
    assert silent.kept(2, 2).tolist() == [[0, 1], [0, 1]]


def test_quality_and_prediction_are_those_of_any_places() -> None:
    steep: RankedPlaces = places([[[97, 2, 1, 0]] * 2], [OTHER])
    assert steep.quality(1, 80_000) == (
        ShardKind.THIN, digest_of(steep.ranking), 4, 1, 80_000, steep.coverage(1)
    )  # fmt: skip
    predicted = steep.predicted()
    assert predicted is not None
    assert (predicted.critical, predicted.divergence) == (1, UNMEASURED)
    assert places([[[1, 1, 1, 1]] * 2], [OTHER]).predicted() is None
    assert list(sizes_to_measure(steep)) == [2, 3]


def test_only_shards_of_the_ranking_have_a_plan() -> None:
    both = places([FIRST], [OTHER])
    shard = Shard(ShardKind.THIN, digest_of(both.ranking), 4, 3, 0b111)
    assert callable(both.plan_of(shard))
    for other in (
        shard._replace(ranking="b" * 64),
        shard._replace(places=5),
        shard._replace(kind=ShardKind.EXPERTS),
        shard._replace(kept=0),
    ):
        with pytest.raises(ModelError, match="another ranking"):
            both.plan_of(other)


def test_scores_of_other_experts_are_refused() -> None:
    scores: Floats = np.zeros((2, 1, 2, 4), np.float32)
    for layout in (
        replace(LAYOUT, experts=3),
        replace(LAYOUT, width=8),
        replace(LAYOUT, blocks={1: 1, 5: 1}),
    ):
        with pytest.raises(ModelError, match="other experts; rank this one anew"):
            ThinPlaces(ranking(), scores, layout)
    with pytest.raises(ModelError, match="other experts"):
        ThinPlaces(ranking("code", "prose"), scores, LAYOUT)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]))
def test_more_places_hold_what_fewer_hold_and_cover_more(seed: int, sizes: tuple[int, int]) -> None:
    step, block = sizes
    layout = ThinLayout(
        experts=3, width=16, step=step, blocks=dict.fromkeys((1, 2), block), keys=()
    )
    scores = np.random.default_rng(seed).random((2, 2, 3, 16), np.float32)
    flat = {"x": [[1.0] * 3] * 2, "y": [[1.0] * 3] * 2}
    ranked = rank(ModelDigest("a" * 64), "counts", (1, 2), flat, ((), ()))
    both = ThinPlaces(ranked, scores, layout)
    for critical in range(1, both.count + 1):
        fewer, more = both.kept(1, critical - 1), both.kept(1, critical)
        assert more.shape == (3, critical * step)
        assert all(set(a) < set(b) for a, b in zip(fewer.tolist(), more.tolist(), strict=True))
        assert (np.diff(more, axis=1) > 0).all()
        assert both.coverage(critical - 1) <= both.coverage(critical)
    assert both.coverage(both.count) == 1_000_000

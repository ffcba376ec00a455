"""Rankings: weights, orders and shares, and their canonical bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.importance import (
    RANKING_BYTES_MAX,
    WEIGHT_MAX,
    Neurons,
    Ranking,
    coverage,
    critical_experts,
    digest_of,
    from_bytes,
    kept_experts,
    merged,
    ordered,
    rank,
    to_bytes,
)
from p2pmesh.sharing import MILLION
from p2pmesh.wire.codec import decode, encode

MODEL = ModelDigest("a" * 64)
NEURONS = Neurons("b" * 64, 128)


def two_layers(critical: tuple[tuple[int, ...], ...] = ((), ())) -> Ranking:
    scores = {
        "prose": [[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0]],
        "code": [[1.0, 1.0, 1.0, 7.0], [0.0, 0.0, 0.0, 0.0]],
    }
    return rank(MODEL, "counts-energy", (1, 2), scores, critical, neurons=NEURONS)


@st.composite
def rankings(draw: st.DrawFn) -> Ranking:
    experts, layers = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    row = st.lists(st.floats(0, 1e30), min_size=experts, max_size=experts)
    rows = st.lists(row, min_size=layers, max_size=layers)
    ids = st.lists(st.integers(0, experts - 1), unique=True)
    return rank(
        MODEL,
        draw(st.sampled_from(["counts-energy", "counts"])),
        sorted(draw(st.lists(st.integers(0, 99), min_size=layers, max_size=layers, unique=True))),
        draw(st.dictionaries(st.text("abc é", min_size=1), rows, min_size=1, max_size=3)),
        draw(st.lists(ids, min_size=layers, max_size=layers)),
        neurons=draw(st.sampled_from([None, NEURONS])),
    )


@given(rankings())
def test_a_ranking_survives_its_bytes(ranking: Ranking) -> None:
    assert from_bytes(to_bytes(ranking)) == ranking


@given(st.binary(max_size=200))
def test_junk_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        from_bytes(data)


@given(rankings(), st.data())
def test_a_changed_byte_is_refused_or_another_ranking(
    ranking: Ranking, data: st.DataObject
) -> None:
    changed = bytearray(to_bytes(ranking))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = from_bytes(bytes(changed))
    except PeerError:
        return
    assert to_bytes(found) == changed
    assert digest_of(found) != digest_of(ranking)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("experts", 0, "impossible number of experts"),
        ("experts", 5, "too many or too few weights"),
        ("layers", [], "without layers"),
        ("layers", [2, 1], "out of order"),
        ("method", "guess", "a method that this version does not know"),
        ("domains", [], "without domains"),
        ("domains", [["b", bytes(16)], ["a", bytes(16)]], "domains out of order"),
        ("domains", [["", bytes(16)]], "no domain"),
        ("critical", [[]], "critical experts of other layers"),
        ("critical", [[4], []], "critical experts that are none"),
        ("critical", [[1, 0], []], "critical experts out of order"),
        ("neurons", ["../secret", 1], "names no file of neurons"),
        ("neurons", ["b" * 64, 0], "names no file of neurons"),
        ("model", "../secret", "a model without a digest"),
    ],
)
def test_what_is_no_ranking_is_refused(field: str, value: Any, words: str) -> None:
    fields = decode(to_bytes(two_layers()), bytes_max=RANKING_BYTES_MAX)
    with pytest.raises(PeerError, match=words):
        from_bytes(encode({**fields, field: value}))


def test_weights_are_relative_to_the_largest_of_their_layer() -> None:
    code, prose = two_layers().domains
    assert prose.weights[0] == (WEIGHT_MAX, WEIGHT_MAX * 3 // 4, WEIGHT_MAX // 2, WEIGHT_MAX // 4)
    assert code.weights[1] == (0, 0, 0, 0)


def test_critical_experts_come_first_then_the_heaviest_then_the_lowest_id() -> None:
    ranking = two_layers(critical=((3,), ()))
    assert ordered(ranking, "prose") == (((3, 0, 1, 2),), ((2, 3, 0, 1),))
    assert ordered(ranking, "code", groups=2) == (((0, 1), (3, 2)), ((0, 1), (2, 3)))


def test_each_group_keeps_the_same_number() -> None:
    assert kept_experts(two_layers(), "prose", 2) == ((0, 1), (2, 3))
    assert kept_experts(two_layers(), "prose", 2, groups=2) == ((0, 2), (0, 2))


def test_coverage_is_the_share_of_the_importance() -> None:
    ranking = two_layers()
    half, whole = coverage(ranking, "prose", ((0, 3), (2, 3)))
    assert math.isclose(half, MILLION / 2, rel_tol=1e-4)
    assert whole == MILLION
    # No token reached this layer: its experts count alike.
    assert coverage(ranking, "code", ((), (1,)))[1] == MILLION // 4


def test_domains_count_alike_when_merged() -> None:
    # Shares of the first layer: prose .4 .3 .2 .1, code .1 .1 .1 .7
    assert ordered(merged(two_layers(), "mean"), "mean")[0] == ((3, 0, 1, 2),)
    (mean,) = merged(two_layers(), "mean").domains
    assert math.isclose(mean.weights[0][0] / mean.weights[0][3], 0.5 / 0.8, rel_tol=1e-3)
    (worst,) = merged(two_layers(), "worst").domains
    assert math.isclose(worst.weights[0][0] / worst.weights[0][3], 0.4 / 0.7, rel_tol=1e-3)
    assert merged(two_layers(), "worst").neurons is None


def test_only_outliers_of_model_and_layer_are_critical() -> None:
    plain = [1.0, 2.0, 3.0, 0.0]
    assert critical_experts([plain, plain]) == ((), ())
    # A peak is a square: a hundred times the median is ten times the output.
    assert critical_experts([plain, [1.0, 1.0, 1.0, 1000.0]]) == ((), (3,))
    # An outlier of its layer, and nothing beside the largest of the model.
    assert critical_experts([[1.0, 1.0, 500.0], [1.0, 1.0, 1e9]]) == ((), (2,))
    assert critical_experts([[0.0, 0.0]]) == ((),)

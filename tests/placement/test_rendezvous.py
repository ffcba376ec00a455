from __future__ import annotations

import math
from fractions import Fraction
from random import Random

from hypothesis import example, given
from hypothesis import strategies as st

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.placement.rendezvous import WEIGHT_MAX, draw, neg_log2, rank
from tests.placement.placement_strategies import model, node

KNOWN_DRAWS = [
    0xD95C220AD9911536,
    0x2DEF2B5D18E3A30C,
    0x476CD108677F6352,
    0x7E7C4F0A0DF5D0E0,
]
KNOWN_ORDER = "adcb"

numbers = st.integers(0, 2**64 - 1)
node_ids = st.binary(min_size=16, max_size=16).map(NodeId)
weights = st.dictionaries(node_ids, st.integers(1, WEIGHT_MAX), max_size=8)


@given(numbers)
@example(0)
@example(2**63 - 1)
@example(2**63)
@example(2**64 - 1)
def test_the_logarithm_is_within_one_unit(number: int) -> None:
    # math.log2 of a value up to 65 is itself off by up to 2^-47, far below one unit of 2^-32.
    exact = 65 - math.log2(2 * number + 1)
    assert -0.001 <= neg_log2(number) - exact * 2**32 <= 1.001


@given(numbers, numbers)
@example(2**64 - 1, 2**64 - 2)
def test_the_logarithm_never_rises(one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert neg_log2(low) >= neg_log2(high) >= 1


def test_known_logarithms() -> None:
    assert [neg_log2(number) for number in (0, 2**64 - 1, 2**63, 0x0123456789ABCDEF)] == [
        65 << 32,
        1,
        2**32,
        33559934675,
    ]


def test_known_draws_and_order() -> None:
    nodes = [node(name) for name in "abcd"]
    assert [draw(model("m"), n) for n in nodes] == KNOWN_DRAWS
    assert rank(model("m"), [(n, 1 + i) for i, n in enumerate(nodes)]) == [
        node(name) for name in KNOWN_ORDER
    ]


@given(weights)
def test_quotients_order_like_exact_scores(by_node: dict[NodeId, int]) -> None:
    digest = model("m")

    def inverse(n: NodeId) -> tuple[Fraction, int, NodeId]:
        number = draw(digest, n)
        return Fraction(neg_log2(number), by_node[n]), number, n

    assert rank(digest, by_node.items()) == sorted(by_node, key=inverse)


@given(st.integers(1, WEIGHT_MAX), st.integers(1, WEIGHT_MAX), st.integers(1, 65 << 32))
def test_close_scores_keep_their_order(one: int, other: int, log: int) -> None:
    # The nearest neighbour of log/one with the other denominator: the hardest pair to tell apart.
    near = log * other // one + 1
    assert Fraction(log, one) < Fraction(near, other)
    assert (log << 64) // one < (near << 64) // other


@given(weights, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(by_node: dict[NodeId, int], rng: Random) -> None:
    items = list(by_node.items())
    rng.shuffle(items)
    assert rank(model("m"), items) == rank(model("m"), by_node.items())


@given(weights.filter(bool), st.data())
def test_a_node_that_goes_leaves_the_others_in_order(
    by_node: dict[NodeId, int], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(by_node)))
    before = rank(model("m"), by_node.items())
    left = rank(model("m"), [(n, w) for n, w in by_node.items() if n != gone])
    assert left == [n for n in before if n != gone]


def test_weights_out_of_range_are_clamped() -> None:
    odd = [(node("a"), 0), (node("b"), -5), (node("c"), 2**80)]
    clamped = [(node("a"), 1), (node("b"), 1), (node("c"), WEIGHT_MAX)]
    assert rank(model("m"), odd) == rank(model("m"), clamped)


KEYS = [model(number) for number in range(4000)]


def owners(by_node: dict[NodeId, int]) -> dict[ModelDigest, NodeId]:
    return {key: rank(key, by_node.items())[0] for key in KEYS}


def test_shares_follow_the_weights_and_little_moves() -> None:
    by_node = {node(number): (number % 4 + 1) * 8192 for number in range(12)}
    total = sum(by_node.values())
    before = owners(by_node)
    for n, weight in by_node.items():
        share = sum(owner == n for owner in before.values())
        ideal = len(KEYS) * weight / total
        assert abs(share - ideal) < 4 * math.sqrt(ideal), "further than four standard deviations"

    gone = node(3)
    without = owners({n: w for n, w in by_node.items() if n != gone})
    moved = {key for key in KEYS if without[key] != before[key]}
    assert moved == {key for key in KEYS if before[key] == gone}

    new = node("new")
    joined = owners({**by_node, new: 16384})
    moved = {key for key in KEYS if joined[key] != before[key]}
    assert {joined[key] for key in moved} == {new}
    ideal = len(KEYS) * 16384 / (total + 16384)
    assert abs(len(moved) - ideal) < 4 * math.sqrt(ideal)

from __future__ import annotations

import pytest

from p2pmesh.placement.distance import (
    FARTHEST,
    LOOKS,
    NEAR,
    ONE_WAY_NS,
    Distances,
    Link,
    link_class,
)
from tests.placement.placement_strategies import node

A, B, C = node("a"), node("b"), node("c")


@pytest.mark.parametrize(
    ("rtt_us", "found"),
    [(0, NEAR), (14_999, NEAR), (15_000, 1), (40_000, 2), (150_000, FARTHEST), (10**9, FARTHEST)],
)
def test_a_round_trip_has_a_class(rtt_us: int, found: int) -> None:
    assert link_class(rtt_us) == found


def test_further_classes_cost_more() -> None:
    assert list(ONE_WAY_NS) == sorted(ONE_WAY_NS)
    assert len(ONE_WAY_NS) == FARTHEST + 1


def test_a_link_close_to_a_border_keeps_its_class() -> None:
    for rtt_us in (13_000, 15_000, 18_000):
        assert link_class(rtt_us, NEAR) == NEAR
        assert link_class(rtt_us, 1) == 1
    assert link_class(19_000, NEAR) == 1
    assert link_class(11_000, 1) == NEAR
    assert link_class(500_000, NEAR) == link_class(500_000) == FARTHEST
    assert link_class(100, FARTHEST) == NEAR


def test_the_shortest_of_the_latest_looks_counts() -> None:
    link = Link()
    link.look(2_000)
    for _ in range(LOOKS - 1):
        link.look(300_000)  # weights are on their way
    assert link.link_class == NEAR
    link.look(300_000)
    assert link.link_class == FARTHEST
    link.look(2_000)
    assert link.link_class == NEAR


def test_of_two_ends_the_one_that_says_more_counts() -> None:
    distances = Distances([(A, ((B, 1),)), (B, ((A, 2), (C, 1))), (C, ())])
    assert distances.between(A, B) == distances.between(B, A) == 2
    assert distances.between(B, C) == distances.between(C, B) == 1
    assert distances.between(A, C) == distances.between(A, A) == NEAR
    assert Distances([(A, ())]).between(A, B) == NEAR

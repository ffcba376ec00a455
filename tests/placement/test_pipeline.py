from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations
from random import Random

import pytest

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import STAGES_MAX, StageRange
from p2pmesh.placement.distance import FARTHEST, NEAR, ONE_WAY_NS, Distances
from p2pmesh.placement.pipeline import (
    CUTS_MAX,
    CUTS_OF_MANY_MAX,
    MEMORY_MIB_PER_S,
    NS_PER_S,
    Candidate,
    Stage,
    choose,
    token_us,
)
from p2pmesh.placement.shape import Shape, shape_of
from tests.placement.placement_strategies import GIB, MIB, node
from tests.state.builders import card

A, B, C, D = (node(name) for name in "abcd")
EVEN = Shape((GIB,) * 8, (GIB,) * 8, head_bytes=GIB, stage_bytes=GIB // 2, hop_bytes=8192)


def one(name: str, room_bytes: int, **changes: object) -> Candidate:
    made = Candidate(node=node(name), budget_bytes=room_bytes, room_bytes=room_bytes, rpc="7.0.0")
    return replace(made, **changes)  # type: ignore[arg-type]  # the tests name fields of it


def head(name: str, room_bytes: int, **changes: object) -> Candidate:
    return one(name, room_bytes, **{"holds": True, "heads": EVEN, **changes})


def ranges(stages: tuple[Stage, ...] | None) -> list[tuple[int, int]]:
    return [(stage.first_layer, stage.last_layer) for stage in stages or ()]


def nodes(stages: tuple[Stage, ...] | None) -> list[object]:
    return [stage.node for stage in stages or ()]


# What a stage takes


def test_the_memory_of_a_stage_is_no_part_of_its_units_id() -> None:
    assert Stage(A, 0, 3, 77).range == Stage(A, 0, 3, 78).range == StageRange(A, 0, 3)


def test_a_model_that_does_not_tell_its_layers_makes_no_pipeline() -> None:
    shape = shape_of(card(layers=0, layer_bytes=()), context=512)
    assert shape.layer_bytes == ()
    assert choose([head("a", 9 * GIB, heads=shape), one("b", 9 * GIB)]) is None


def test_a_head_takes_memory_whatever_a_forged_card_says() -> None:
    forged = card(layers=2, layer_bytes=(0, 9 * MIB), other_bytes=0, size_bytes=1)
    shape = shape_of(replace(forged, kv_bytes_per_token=0, kv_layer_bytes=()), context=512)
    assert shape.need(0, 0) >= 128 * MIB
    assert choose([head("a", 0, heads=shape), one("b", 2 * GIB)], split=2) is None


@pytest.mark.parametrize(("count", "layers"), [(2, 1000), (3, 1000), (5, 200), (5, 1000)])
def test_a_deep_model_is_cut_between_groups_of_layers(count: int, layers: int) -> None:
    each = GIB // layers
    deep = Shape((each,) * layers, (each,) * layers, GIB, GIB, hop_bytes=0)
    speeds = {"a": 9000, "b": 8000, "c": 7000, "d": 6000, "e": 5000}
    some = list(speeds)[:count]
    found = choose(
        [head(name, 3 * GIB // 2 - ord(name), heads=deep, memory_mib_per_s=speeds[name])
         for name in some],
        split=count,
    )  # fmt: skip
    assert found is not None
    assert [stage.first_layer for stage in found[1:]] == [s.last_layer + 1 for s in found[:-1]]
    assert (found[0].first_layer, found[-1].last_layer) == (0, layers - 1)
    assert [stage.need_bytes for stage in found] == [deep.need(*stage[1:3]) for stage in found]
    step = -(-layers // CUTS_MAX.get(count, CUTS_OF_MANY_MAX))
    assert step > 1
    assert all(stage.first_layer % step == 0 for stage in found)


# What is chosen


def test_fewest_nodes_first_and_more_only_where_they_are_needed() -> None:
    rooms = {"a": 4, "b": 4, "c": 4, "d": 4}
    many = [head(name, room * GIB) for name, room in rooms.items()]
    found = choose(many)
    assert len(found or ()) == 3
    large = [*many, one("e", 6 * GIB)]
    assert nodes(choose(large))[1:] == [node("e")]
    assert len(choose(large, split=4) or ()) == 4


def test_only_equal_builds_go_together() -> None:
    mixed = [head("a", 9 * GIB), one("b", 9 * GIB, rpc="6.0.0"), one("c", 9 * GIB, rpc="")]
    assert choose(mixed) is None
    assert nodes(choose([*mixed, one("d", 9 * GIB)])) == [A, D]


def test_only_who_may_head_heads() -> None:
    two = [one("a", 20 * GIB, holds=True), head("b", 5 * GIB)]
    assert nodes(choose(two)) == [B, A]
    assert choose([one("a", 20 * GIB), one("b", 20 * GIB)]) is None


def test_a_head_without_the_right_uses_only_nodes_that_confine_stages() -> None:
    guest = head("a", 9 * GIB, may_head=False)
    roomy, confined = one("b", 64 * GIB), one("c", 9 * GIB, confined=True)
    assert choose([guest, roomy]) is None
    assert nodes(choose([guest, roomy, confined])) == [A, C]
    assert choose([guest, roomy, confined], split=3) is None
    assert len(choose([guest, confined, one("d", 9 * GIB, confined=True)], split=3) or ()) == 3
    # That it is confined itself is no matter; who has the right uses any.
    assert choose([replace(guest, confined=True), roomy]) is None
    assert nodes(choose([replace(guest, may_head=True), roomy, confined])) == [A, B]


def test_who_has_the_file_is_preferred_to_who_has_not() -> None:
    three = [head("a", 9 * GIB), one("b", 9 * GIB), one("c", 9 * GIB, holds=True)]
    assert nodes(choose(three)) == [A, C]


def test_a_faster_memory_gets_all_the_layers_that_it_can_hold() -> None:
    fast = one("b", 6 * GIB, memory_mib_per_s=400_000)
    found = choose([head("a", 20 * GIB), fast])
    assert ranges(found) == [(0, 2), (3, 7)]
    assert found is not None
    assert found[1].need_bytes == 5 * GIB + GIB // 2
    assert ranges(choose([head("a", 20 * GIB, memory_mib_per_s=400_000), one("b", 20 * GIB)])) == [
        (0, 6),
        (7, 7),
    ]


def test_equal_nodes_are_filled_alike() -> None:
    assert ranges(choose([head("a", 9 * GIB), one("b", 9 * GIB)])) == [(0, 3), (4, 7)]
    assert ranges(choose([head("a", 18 * GIB), one("b", 9 * GIB)])) == [(0, 4), (5, 7)]


def test_what_is_left_of_a_budget_decides_only_whether_a_stage_fits() -> None:
    free = [head("a", 9 * GIB), one("b", 9 * GIB), one("c", 9 * GIB)]
    found = choose(free)
    for stage in found or ():
        taken = [
            replace(other, room_bytes=stage.need_bytes) if other.node == stage.node else other
            for other in free
        ]
        assert choose(taken) == found


@pytest.mark.parametrize(("split", "rooms"), [(2, (9, 1)), (9, (9,) * 9), (3, (9, 9))])
def test_a_split_that_does_not_go_is_none(split: int, rooms: tuple[int, ...]) -> None:
    assert choose([head(str(n), room * GIB) for n, room in enumerate(rooms)], split=split) is None


def test_the_cost_of_a_token_is_that_of_a_star() -> None:
    fast, slow = head("a", 9 * GIB, memory_mib_per_s=100_000), one("b", 9 * GIB)
    read = GIB * NS_PER_S // (100_000 * MIB) * 5 + GIB * NS_PER_S // (MEMORY_MIB_PER_S * MIB) * 3
    hop = 2 * 1_000_000 + 8192 * NS_PER_S // (110 * MIB)
    assert token_us(EVEN, [(fast, 0, 4), (slow, 5, 7)]) == (read + hop) // 1000


def test_a_stage_across_a_vpn_is_the_last_resort_and_costs_what_it_takes() -> None:
    far = one("d", 64 * GIB, far=((A, 1), (B, 2)))
    near = [one("b", 4 * GIB), one("c", 4 * GIB)]
    found = choose([head("a", 4 * GIB), far, *near])
    assert nodes(found)[0] == A
    assert set(nodes(found)) == {A, B, C}, "more nodes, but all of them near"
    assert nodes(choose([head("a", 4 * GIB), far])) == [A, D]
    farther = one("e", 64 * GIB, far=((A, 2),))
    assert nodes(choose([head("a", 4 * GIB), farther, far])) == [A, D]
    stages = [(head("a", 9 * GIB), 0, 3), (far, 4, 7)]
    added_ns = 2 * (ONE_WAY_NS[1] - ONE_WAY_NS[NEAR])
    assert token_us(EVEN, stages, [1]) - token_us(EVEN, stages) == added_ns // 1000


# Against trying everything

_Way = tuple[int, int, int, list[int], list[int], tuple[Stage, ...]]


def brute(candidates: list[Candidate], split: int) -> tuple[Stage, ...] | None:
    """Every choice of nodes, order and ranges: the nearest first, then the fewest nodes.

    Among equals of the same group of nodes their ranks decide, between groups their ids.
    """
    distances = Distances((one.node, one.far) for one in candidates)
    for link in range(NEAR, FARTHEST + 1):
        for count in (split,) if split else range(2, STAGES_MAX + 1):
            found: dict[frozenset[NodeId], list[_Way]] = {}
            for first, *rest in permutations(candidates, count):
                near = frozenset(
                    one.node
                    for one in candidates
                    if distances.between(first.node, one.node) <= link and one.rpc == first.rpc
                )
                if first.heads and first.rpc and near.issuperset(one.node for one in rest):
                    found.setdefault(near, []).extend(ways(candidates, first, rest))
            best = [min(of) for of in found.values() if of]
            if best:
                return min(best, key=lambda one: (one[:3], [s.node for s in one[-1]], one[4:]))[-1]
    return None


def ways(candidates: list[Candidate], first: Candidate, rest: list[Candidate]) -> Iterator[_Way]:
    shape = first.heads
    assert shape is not None
    layers = len(shape.layer_bytes)
    alike = [one for one in candidates if one.rpc == first.rpc]
    speed = {one.node: one.memory_mib_per_s or MEMORY_MIB_PER_S for one in alike}
    alike.sort(key=lambda one: (-one.budget_bytes, -speed[one.node], not one.holds, one.node))
    row = [first, *rest]
    for cuts in combinations(range(1, layers), len(rest)):
        ends = [*cuts, layers]
        stages = [
            (one, begin, end - 1) for one, begin, end in zip(row, [0, *cuts], ends, strict=True)
        ]
        needs = [shape.need(begin, end) for _, begin, end in stages]
        if any(need > one.room_bytes for need, one in zip(needs, row, strict=True)):
            continue
        cost_ns = sum(
            shape.layer_reads[layer] * NS_PER_S // (speed[one.node] * MIB)
            for one, begin, end in stages
            for layer in range(begin, end + 1)
        )
        yield (
            cost_ns,
            sum(not one.holds for one in row),
            sum(need**2 // one.budget_bytes for need, one in zip(needs, row, strict=True)),
            [alike.index(one) for one in row],
            ends,
            tuple(
                Stage(one.node, begin, end, need)
                for (one, begin, end), need in zip(stages, needs, strict=True)
            ),
        )


def random_case(rng: Random) -> tuple[list[Candidate], int]:
    """A few nodes of one build, of which some may head, and a model of a few uneven layers."""
    layers = rng.randint(2, 6)
    sizes = tuple(rng.choice((1, 2, 3)) * MIB for _ in range(layers))
    shape = Shape(
        sizes,
        tuple(size // rng.choice((1, 2)) for size in sizes),
        head_bytes=rng.randint(0, 4) * MIB,
        stage_bytes=rng.randint(0, 2) * MIB,
        hop_bytes=4096,
    )
    candidates: list[Candidate] = []
    far = rng.choice((0, 0, 0.5))
    for number in range(rng.randint(2, 6)):
        budget = rng.randint(3, 20) * MIB
        holds = rng.random() < 0.6
        candidates.append(
            Candidate(
                node=node(rng.random().hex()),
                budget_bytes=budget,
                room_bytes=rng.choice((budget, budget, rng.randint(0, budget))),
                rpc="7.0.0",
                memory_mib_per_s=rng.choice((0, 0, 10_000, 20_000, 80_000)),
                holds=holds,
                heads=shape if holds and (number == 0 or rng.random() < 0.6) else None,
                far=tuple(
                    (other.node, rng.choice((1, 2))) for other in candidates if rng.random() < far
                ),
            )
        )
    return candidates, rng.choice((0, 0, 2, 3, 4))


def test_the_choice_is_the_best_of_all_there_are() -> None:
    found = 0
    for seed in range(600):
        candidates, split = random_case(Random(seed))
        expected = brute(candidates, split)
        assert choose(candidates, split=split) == expected, seed
        found += expected is not None
    assert 250 < found < 500


def test_the_order_of_the_candidates_means_nothing() -> None:
    for seed in range(100):
        candidates, split = random_case(Random(seed))
        found = choose(candidates, split=split)
        for _ in range(3):
            Random(seed).shuffle(candidates)
            assert choose(candidates, split=split) == found


def test_of_several_builds_the_best_class_is_taken() -> None:
    slow = [head("a", 9 * GIB, memory_mib_per_s=10_000), one("b", 9 * GIB)]
    fast = [head("c", 9 * GIB, rpc="8.0.0"), one("d", 9 * GIB, rpc="8.0.0")]
    assert nodes(choose([*slow, *fast])) == [C, D]


def test_each_head_is_judged_by_its_own_card() -> None:
    liar = EVEN._replace(layer_bytes=(1,) * 8, layer_reads=(1,) * 8, head_bytes=1, stage_bytes=1)
    found = choose([head("a", 9 * GIB), head("b", 9 * GIB, heads=liar)])
    assert nodes(found) == [B, A]
    assert sum(stage.need_bytes for stage in found or ()) == 8 + 2

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import UNMEASURED, Shard, ShardKind, ShardQuality
from p2pmesh.placement.experts import (
    SHARDS_MAX,
    Host,
    extended,
    good_enough,
    new_set,
    shard_bytes,
    shards_of,
)
from p2pmesh.sharing import DIVERGENCE_MAX
from tests.placement.placement_strategies import GIB, node
from tests.placement.sharded import EXPERTS, GOOD, MOE, NEED, PLACES, A, B, D


def host(name: str, room: int, running: Shard | None = None, *, ready: bool = True) -> Host:
    return Host(node(name), room * GIB, NEED, EXPERTS, running, ready)


def sizes(shards: dict[NodeId, Shard]) -> dict[NodeId, int]:
    return {node: shard.size for node, shard in shards.items()}


def union(shards: dict[NodeId, Shard]) -> int:
    kept = 0
    for shard in shards.values():
        kept |= shard.kept
    return kept


rooms = st.lists(st.integers(0, 24), min_size=1, max_size=10)
qualities = st.builds(lambda critical: GOOD._replace(critical=critical), st.integers(1, PLACES - 1))


# A new set.


def test_each_has_the_critical_experts_and_a_share_of_the_others() -> None:
    shards = shards_of(GOOD, [host("a", 16), host("b", 16), host("c", 16)])
    assert sorted(sizes(shards).values()) == [10, 11, 11]
    assert union(shards) == 0xFFFF
    assert all(shard.kept & 0xFF == 0xFF for shard in shards.values())
    others = [shard.kept >> 8 for shard in shards.values()]
    assert sum(others) == 0xFF, "none of them twice"


def test_shares_follow_the_memory_of_the_nodes() -> None:
    shards = shards_of(GOOD, [host("a", 14), host("b", 18)])  # room for 10 and 14
    assert sizes(shards) == {node("a"): 10, node("b"): 14}


def test_a_node_with_room_for_the_critical_experts_alone_takes_part() -> None:
    shards = shards_of(GOOD, [host("a", 12), host("b", 20)])
    assert sizes(shards) == {A: 8, B: 16}
    assert shards_of(GOOD, [host("a", 12), host("b", 12)]) == {}, "others would live nowhere"


def test_there_is_no_set_where_experts_would_live_nowhere() -> None:
    assert shards_of(GOOD, [host("a", 15), host("b", 16)]) == {}  # 3 + 4 of 8 places
    assert shards_of(GOOD, [host("a", 30)]) == {}, "one node"
    assert shards_of(GOOD, []) == {}
    assert shards_of(GOOD, [Host(A, 9 * GIB, NEED, 0), Host(B, 9 * GIB, NEED, 3)]) == {}


@given(quality=qualities, rooms=rooms)
def test_a_set_fits_and_is_whole(quality: ShardQuality, rooms: list[int]) -> None:
    hosts = [host(f"{number}", room) for number, room in enumerate(rooms)]
    shards = shards_of(quality, hosts)
    assert not shards or union(shards) == 0xFFFF
    assert len(shards) <= SHARDS_MAX
    for one in hosts:
        if shard := shards.get(one.node):
            assert shard_bytes(NEED, EXPERTS, shard) <= one.room_bytes
            assert shard.kept & ((1 << quality.critical) - 1) == (1 << quality.critical) - 1


@given(quality=qualities, rooms=rooms, more=st.integers(0, 24))
def test_a_further_node_makes_no_shard_bigger(
    quality: ShardQuality, rooms: list[int], more: int
) -> None:
    hosts = [host(f"{number}", room) for number, room in enumerate(rooms)]
    before = sizes(shards_of(quality, hosts))
    after = sizes(shards_of(quality, [*hosts, host("new", more)]))
    assert all(after.get(one, 0) <= size for one, size in before.items())


# One that runs.


def running_set(*names: str, room: int = 16) -> dict[NodeId, Shard]:
    return shards_of(GOOD, [host(name, room) for name in names])


def test_a_node_that_joins_gets_its_share_and_moves_nothing() -> None:
    old = running_set("a", "b", "c")
    hosts = [host(name, 16, old[node(name)]) for name in "abc"]
    new = extended(GOOD, [*hosts, host("d", 16)])
    assert {one: shard for one, shard in new.items() if one != D} == old
    assert new[D].size == GOOD.critical + 2, "its share of eight others among four"


def test_of_those_that_stay_one_after_the_other_takes_what_is_lost() -> None:
    old = running_set("a", "b", "c")
    left = {name: old[node(name)] for name in "ab"}
    first = extended(GOOD, [host(name, 16, one) for name, one in left.items()])
    changed = [name for name in "ab" if first[node(name)] != left[name]]
    assert len(changed) == 1
    loading = [host(name, 16, first[node(name)], ready=name not in changed) for name in "ab"]
    assert extended(GOOD, loading) == first, "the other one waits"
    done = first
    for _ in range(2):
        done = extended(GOOD, [host(name, 16, done[node(name)]) for name in "ab"])
    assert union(done) == 0xFFFF
    assert extended(GOOD, [host(name, 16, done[node(name)]) for name in "ab"]) == done


def test_while_one_stops_for_its_larger_shard_the_others_stay() -> None:
    old = running_set("a", "b", "c")
    left = {name: old[node(name)] for name in "ab"}
    first = extended(GOOD, [host(name, 16, one) for name, one in left.items()])
    [changing] = [name for name in "ab" if first[node(name)] != left[name]]
    now = {**left, changing: None}
    assert extended(GOOD, [host(name, 16, one) for name, one in now.items()]) == first


def test_one_that_stays_takes_what_is_lost_when_one_that_joins_answers() -> None:
    stays = running_set("a", "b", "c")[A]
    joining = extended(GOOD, [host("a", 16, stays), host("b", 16)])
    assert joining[A] == stays
    assert extended(GOOD, [host("a", 16, stays), host("b", 16, joining[B], ready=False)]) == joining
    both = extended(GOOD, [host("a", 16, stays), host("b", 16, joining[B])])
    assert both[A] != stays
    assert union(both) == 0xFFFF


def test_a_node_that_joins_takes_what_is_lost() -> None:
    old = running_set("a", "b", "c")
    new = extended(GOOD, [*(host(name, 16, old[node(name)]) for name in "ab"), host("d", 16)])
    assert union(new) == 0xFFFF
    assert all(new[node(name)] == old[node(name)] for name in "ab")


def test_what_runs_goes_on_where_no_whole_set_fits_any_more() -> None:
    old = running_set("a", "b", "c", room=15)
    left = [host("a", 15, old[A])]
    assert extended(GOOD, left) == {A: old[A]}


@given(
    quality=qualities,
    rooms=rooms,
    started=st.sets(st.integers(0, 9)),
)
def test_any_part_of_a_set_that_runs_leads_to_the_same_set(
    quality: ShardQuality, rooms: list[int], started: set[int]
) -> None:
    hosts = [host(f"{number}", room) for number, room in enumerate(rooms)]
    shards = shards_of(quality, hosts)
    some = [
        one._replace(running=shards.get(one.node)) if number in started else one
        for number, one in enumerate(hosts)
    ]
    if any(one.running for one in some):
        assert extended(quality, some) == shards


# Thin shards.

THIN = GOOD._replace(kind=ShardKind.THIN, critical=10)


def test_every_node_with_room_for_a_thin_shard_runs_the_same() -> None:
    shards = shards_of(THIN, [host("a", 14), host("b", 30), host("c", 13)])
    assert sizes(shards) == {A: 10, B: 10}
    assert {shard.kept for shard in shards.values()} == {0x3FF}
    assert sizes(shards_of(THIN, [host("a", 14)])) == {A: 10}, "one is enough"
    running = host("a", 14, shards[A])
    assert extended(THIN, [running, host("b", 20)]) == shards, "a node that joins runs it too"
    assert extended(THIN, [running]) == {A: shards[A]}


def test_the_kinds_compete_by_the_size_that_is_good_enough() -> None:
    hosts = [host("a", 16), host("b", 16), host("c", 16)]
    for critical, kind in ((10, ShardKind.THIN), (12, ShardKind.EXPERTS)):
        found = new_set(MOE, [GOOD, THIN._replace(critical=critical)], hosts)
        assert found is not None
        assert found.quality.kind is kind, "whole experts take 11 places"


# Which quality.


def test_the_smallest_shards_that_are_good_enough_come_first() -> None:
    bad = GOOD._replace(critical=4, divergence=170_000)
    large = GOOD._replace(critical=12, divergence=10_000)
    guessed = GOOD._replace(critical=6, divergence=UNMEASURED)
    poor = GOOD._replace(critical=2, divergence=UNMEASURED, coverage=700_000)
    known = [large, bad, GOOD, guessed, poor]
    assert good_enough(known, DIVERGENCE_MAX) == [GOOD, large]
    assert good_enough(known, 200_000) == [bad, GOOD, large]
    assert good_enough([guessed, poor], DIVERGENCE_MAX, measured=False) == [guessed]
    assert good_enough(known, DIVERGENCE_MAX, measured=False) == [], "one was measured"
    assert good_enough([GOOD._replace(coverage=390_000)], DIVERGENCE_MAX) == [], "that is a lie"

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gossip.overlay import FULL_MESH_MAX, RINGS, Overlay
from p2pmesh.identity.keys import NodeId

Members = list[tuple[NodeId, bool]]


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(16, "big"))


def random_members(count: int, *, seed: int, undialable: float = 0) -> Members:
    random = Random(seed)
    return [(NodeId(random.randbytes(16)), random.random() >= undialable) for _ in range(count)]


MEMBERS = st.dictionaries(st.integers(0, 60).map(node), st.booleans(), max_size=40).map(
    lambda members: list(members.items())
)
SKIPS = st.frozensets(st.integers(0, 60).map(node), max_size=40)


def reached(start: NodeId, step: Callable[[NodeId], Iterable[NodeId]]) -> dict[NodeId, int]:
    """Everybody that is reached, and after how many steps."""
    hops, edge = {start: 0}, [start]
    while edge:
        following = []
        for one in edge:
            for other in step(one):
                if other not in hops:
                    hops[other] = hops[one] + 1
                    following.append(other)
        edge = following
    return hops


# Observers and subjects


@given(MEMBERS, SKIPS)
def test_subjects_are_the_exact_inverse_of_observers(
    members: Members, skip: frozenset[NodeId]
) -> None:
    overlay = Overlay(members)
    for me, _ in members:
        expected = {subject for subject, _ in members if me in overlay.observers(subject, skip)}
        assert overlay.subjects(me, skip) == expected


@given(MEMBERS, MEMBERS)
def test_made_by_the_like_of_another_it_is_the_same(before: Members, members: Members) -> None:
    anew, made = Overlay(members), Overlay(members, Overlay(before))
    assert made.rings == anew.rings
    assert made.dialable == anew.dialable
    assert len(made) == len(anew)
    for me, _ in members:
        assert made.neighbours(me) == anew.neighbours(me)


@given(MEMBERS, SKIPS)
def test_observers_are_as_many_as_can_be_and_never_the_subject(
    members: Members, skip: frozenset[NodeId]
) -> None:
    overlay = Overlay(members)
    for subject, dialable in members:
        observers = overlay.observers(subject, skip)
        able = {
            other
            for other, other_dialable in members
            if other != subject and other not in skip and (dialable or other_dialable)
        }
        assert len(set(observers)) == len(observers) == min(RINGS, len(able))
        assert able.issuperset(observers)


def beside(members: Members, ring: int, start: NodeId, step: int) -> list[NodeId]:
    """Everybody else in the order of a ring as PROTOCOL.md has it, backwards for a step of -1."""
    order = sorted(
        (one for one, _ in members),
        key=lambda one: (hashlib.blake2b(bytes([ring]) + one, digest_size=8).digest(), one),
    )
    at = order.index(start)
    return [order[(at + step * n) % len(order)] for n in range(1, len(order))]


@given(MEMBERS, SKIPS)
def test_observers_and_neighbours_are_those_of_the_protocol(
    members: Members, skip: frozenset[NodeId]
) -> None:
    overlay, dialable = Overlay(members), dict(members)
    for subject, _ in members:
        chosen: list[NodeId] = []
        near: set[NodeId] = set()
        for ring in range(RINGS):
            before = beside(members, ring, subject, -1)
            able = [one for one in before if dialable[one] or dialable[subject]]
            chosen += [one for one in able if one not in skip and one not in chosen][:1]
            after = beside(members, ring, subject, 1)
            near.update(*([one for one in way if dialable[one]][:1] for way in (before, after)))
        assert overlay.observers(subject, skip) == tuple(chosen)
        if not dialable[subject]:
            assert near <= overlay.neighbours(subject)


@pytest.mark.parametrize("undialable", [0, 0.3, 0.95])
def test_subjects_are_the_inverse_in_a_large_mesh(undialable: float) -> None:
    members = random_members(400, seed=3, undialable=undialable)
    overlay = Overlay(members)
    random = Random(7)
    skip = frozenset(one for one, _ in members if random.random() < 0.5)
    for skipped in (frozenset[NodeId](), skip):
        watched = {(o, s) for s, _ in members for o in overlay.observers(s, skipped)}
        assert {(me, s) for me, _ in members for s in overlay.subjects(me, skipped)} == watched


@given(MEMBERS, SKIPS, st.randoms(use_true_random=False))
def test_the_order_of_arrival_says_nothing(
    members: Members, skip: frozenset[NodeId], random: Random
) -> None:
    shuffled = list(members)
    random.shuffle(shuffled)
    one, other = Overlay(members), Overlay(shuffled)
    for me, _ in members:
        assert one.observers(me, skip) == other.observers(me, skip)
        assert one.neighbours(me) == other.neighbours(me)


def test_a_crash_changes_the_observers_only_of_those_that_the_node_observed() -> None:
    members = random_members(200, seed=1)
    gone = members[50][0]
    before, after = Overlay(members), Overlay(m for m in members if m[0] != gone)
    changed = {
        one for one, _ in members if one != gone and before.observers(one) != after.observers(one)
    }
    assert changed == before.subjects(gone)
    for one, _ in members:
        if one != gone:
            assert set(after.observers(one)) == set(before.observers(one, frozenset({gone})))


# Neighbours


@given(MEMBERS)
def test_links_are_mutual_and_possible(members: Members) -> None:
    overlay, dialable = Overlay(members), dict(members)
    for me, me_dialable in members:
        assert overlay.eager(me) <= overlay.neighbours(me)
        for other in overlay.neighbours(me):
            assert other != me
            assert me_dialable or dialable[other]
            assert me in overlay.neighbours(other)
            assert (me in overlay.eager(other)) == (other in overlay.eager(me))


@given(MEMBERS)
def test_nobody_is_observed_without_a_link(members: Members) -> None:
    overlay = Overlay(members)
    for me, _ in members:
        assert overlay.neighbours(me).issuperset(overlay.observers(me))


@pytest.mark.parametrize("count", [1, 2, FULL_MESH_MAX])
def test_a_small_mesh_is_full(count: int) -> None:
    members = random_members(count, seed=count)
    overlay, everybody = Overlay(members), frozenset(one for one, _ in members)
    for me in everybody:
        assert overlay.neighbours(me) == overlay.eager(me) == everybody - {me}
    beyond = Overlay(random_members(FULL_MESH_MAX + 1, seed=count))
    assert len(beyond) == FULL_MESH_MAX + 1
    assert any(
        len(beyond.eager(me)) < FULL_MESH_MAX
        for me, _ in random_members(FULL_MESH_MAX + 1, seed=count)
    )


# The hops that each record needs at most; simulated ones take 30 ms in the mean.
@pytest.mark.parametrize(
    ("count", "undialable", "hops_all_max", "hops_eager_max"),
    [(12, 0, 2, 3), (100, 0, 3, 5), (100, 0.5, 3, 4), (1000, 0, 5, 6), (1000, 0.9, 4, 5)],
)
def test_everybody_is_reached(
    count: int, undialable: float, hops_all_max: int, hops_eager_max: int
) -> None:
    members = random_members(count, seed=5, undialable=undialable)
    overlay = Overlay(members)
    for start, _ in members[:: max(1, count // 20)]:
        over_all, eager = reached(start, overlay.neighbours), reached(start, overlay.eager)
        assert len(over_all) == len(eager) == count
        assert max(over_all.values()) <= hops_all_max
        assert max(eager.values()) <= hops_eager_max


@pytest.mark.parametrize("seed", range(5))
def test_forwarding_survives_a_fifth_of_crashes_almost_whole(seed: int) -> None:
    """Without any repair of the rings; what is missed then is what repair is for."""
    members = random_members(1000, seed=seed)
    overlay, random = Overlay(members), Random(seed)
    crashed = {one for one, _ in members if random.random() < 0.2}
    start = next(one for one, _ in members if one not in crashed)
    got = reached(start, lambda one: overlay.eager(one) - crashed)
    assert len(got) >= 0.995 * (len(members) - len(crashed))


def test_nothing_is_said_of_strangers() -> None:
    overlay, stranger = Overlay(random_members(20, seed=2)), node(1)
    assert overlay.neighbours(stranger) == overlay.eager(stranger) == frozenset()
    assert overlay.observers(stranger) == ()
    assert overlay.subjects(stranger) == frozenset()
    assert len(Overlay([])) == 0
    assert Overlay([]).neighbours(stranger) == frozenset()


@pytest.mark.parametrize("undialable", [0, 0.5, 0.998])
def test_a_thousand_members_take_little_time(undialable: float) -> None:
    """A guard against the wrong order of growth, ten times above what is measured."""
    members = random_members(1000, seed=4, undialable=undialable)
    Overlay(members)
    began_at = time.perf_counter()
    overlay = Overlay(members)
    assert time.perf_counter() - began_at < 0.02
    began_at = time.perf_counter()
    for me, _ in members[:100]:
        overlay.neighbours(me)
        overlay.subjects(me)
    assert (time.perf_counter() - began_at) / 100 < 0.003

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gossip.clock import OFFSET_S_MAX, SAMPLES_MAX, SLEW, MeshClock
from p2pmesh.identity.keys import NodeId

LOCAL = 1_800_000_000.0
OFFSETS = st.floats(-1e6, 1e6)


def peer(number: int) -> NodeId:
    return NodeId(number.to_bytes(16, "big"))


def settled(offsets: list[float], *, at: float = LOCAL) -> MeshClock:
    """A clock that has had the time to follow these."""
    clock = MeshClock()
    clock.now(at)
    for number, offset_s in enumerate(offsets):
        clock.observe(peer(number), offset_s)
    clock.now(at + 2 * OFFSET_S_MAX / SLEW)
    return clock


def test_a_node_alone_has_its_own_time() -> None:
    clock = MeshClock()
    assert clock.now(LOCAL) == LOCAL
    assert clock.now(LOCAL + 5) == LOCAL + 5
    assert clock.offset_s == 0


def test_it_is_the_median_with_its_own_clock_as_one() -> None:
    assert settled([4.0]).offset_s == 2.0
    assert settled([4.0, 6.0]).offset_s == 4.0
    assert settled([-4.0, -6.0, 5.0]).offset_s == -2.0
    assert settled([1000.0, 2000.0]).offset_s == OFFSET_S_MAX


def test_two_nodes_meet_half_way() -> None:
    assert LOCAL + settled([8.0]).offset_s == (LOCAL + 8) + settled([-8.0]).offset_s


def test_the_first_estimate_of_several_may_leap_forward() -> None:
    clock = MeshClock()
    clock.now(LOCAL)
    clock.observe(peer(1), 10.0)
    clock.observe(peer(2), 12.0)
    assert clock.now(LOCAL) == LOCAL + 10
    clock.observe(peer(1), 30.0)
    clock.observe(peer(2), 30.0)
    assert clock.now(LOCAL + 1) == pytest.approx(LOCAL + 1 + 10 + SLEW)


def test_a_single_peer_cannot_make_it_leap() -> None:
    clock = MeshClock()
    clock.now(LOCAL)
    clock.observe(peer(1), 60.0)
    assert clock.now(LOCAL) == LOCAL
    assert clock.now(LOCAL + 1) == pytest.approx(LOCAL + 1 + SLEW)


def test_what_is_ahead_goes_slower_and_never_back() -> None:
    clock = MeshClock()
    clock.now(LOCAL)
    for number in range(3):
        clock.observe(peer(number), -10.0)
    assert clock.now(LOCAL) == LOCAL
    assert clock.now(LOCAL + 10) == pytest.approx(LOCAL + 10 - 10 * SLEW)
    assert clock.now(LOCAL + 1000) == LOCAL + 1000 - 10


def test_who_is_gone_has_no_vote() -> None:
    clock = settled([9.0, 9.0])
    clock.forget(peer(0))
    clock.forget(peer(1))
    clock.forget(peer(2))
    clock.now(LOCAL + 1e6)
    assert clock.offset_s == 0


def test_votes_are_bounded() -> None:
    clock = settled([-1.0] * SAMPLES_MAX + [1.0] * 2 * SAMPLES_MAX)
    assert clock.offset_s == -1.0


EVENTS = st.lists(
    st.tuples(st.integers(0, 5), OFFSETS, st.booleans(), st.floats(-5, 500)), max_size=40
)


@given(EVENTS)
def test_it_never_goes_back_nor_too_far(events: list[tuple[int, float, bool, float]]) -> None:
    clock, local = MeshClock(), LOCAL
    said, latest = clock.now(local), local
    for number, offset_s, forget, elapsed_s in events:
        if forget:
            clock.forget(peer(number))
        else:
            clock.observe(peer(number), offset_s)
        local += elapsed_s  # a clock that goes back is a fault of the system below, but it happens
        latest = max(latest, local)
        now = clock.now(local)
        assert now >= said
        assert latest - OFFSET_S_MAX <= now <= latest + OFFSET_S_MAX
        said = now


@given(st.data())
def test_a_minority_of_liars_moves_it_only_among_the_honest(data: st.DataObject) -> None:
    honest = data.draw(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
    lies = data.draw(st.lists(OFFSETS, max_size=len(honest)))  # this node's own clock is honest too
    offsets = data.draw(st.permutations([*honest, *lies]))
    assert min(0, *honest) <= settled(offsets).offset_s <= max(0, *honest)

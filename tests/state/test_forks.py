from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.state import forks as module
from p2pmesh.state.forks import FORKS_MAX, HOLD_S, HOLD_S_MAX, Forks
from p2pmesh.state.outcome import MergeOutcome
from p2pmesh.wire.evidence import Fork
from tests.state.builders import NODES, NOW, fork

SOME = [
    fork(owner, epoch=NOW + epoch, seq=seq, issued_at=NOW + seq)
    for owner in (0, 1)
    for epoch in (0, 1)
    for seq in range(5)
]


def all_of(*some: Fork) -> Forks:
    forks = Forks()
    for one in some:
        if forks.judge(one) is MergeOutcome.NEWS:
            forks.add(one)
    return forks


@given(st.permutations(range(len(SOME))))
def test_the_newest_stand_whatever_the_order(order: list[int]) -> None:
    other = [SOME[number] for number in order]
    forks = all_of(*SOME)
    assert {f.id for f in forks} == {f.id for f in all_of(*other, *other)}
    for owner in NODES[:2]:
        own = [f for f in SOME if f.owner == owner]
        newest = sorted(own, key=lambda f: (f.epoch, f.seq))[-FORKS_MAX:]
        assert list(forks.of(owner)) == newest
    assert forks.held(NOW) == all_of(*other).held(NOW) == {NODES[0], NODES[1]}


def test_what_makes_way_is_told() -> None:
    forks = Forks()
    some = [fork(seq=seq) for seq in range(1, FORKS_MAX + 2)]
    assert [forks.add(one) for one in some[:-1]] == [()] * FORKS_MAX
    assert forks.judge(some[0]) is MergeOutcome.STALE
    assert forks.add(some[-1]) == (some[0],)
    assert forks.judge(some[0]) is MergeOutcome.STALE  # older than all
    assert forks.of(NODES[0]) == tuple(some[1:])


def test_each_fork_doubles_the_hold() -> None:
    for count in range(1, FORKS_MAX + 1):
        forks = all_of(*(fork(seq=seq, issued_at=NOW + seq) for seq in range(count)))
        until = NOW + count - 1 + min(HOLD_S * 2 ** (count - 1), HOLD_S_MAX)
        assert forks.held(until - 1) == {NODES[0]}
        assert forks.held(until) == frozenset()
    assert HOLD_S << (FORKS_MAX - 2) < HOLD_S_MAX <= HOLD_S << (FORKS_MAX - 1)


def test_a_fork_is_remembered_as_long_as_a_hold_can_be() -> None:
    early, late = fork(seq=1), fork(seq=2, issued_at=NOW + 100)
    forks = all_of(early, late)
    assert forks.expire(NOW + HOLD_S_MAX - 1) == []
    assert forks.expire(NOW + HOLD_S_MAX) == [early]
    assert forks.of(NODES[0]) == (late,)
    assert forks.expire(NOW + HOLD_S_MAX + 100) == [late]
    assert not list(forks)
    assert forks.held(NOW) == frozenset()


def test_only_so_many_owners_have_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORKED_OWNERS_MAX", 1)
    forks = all_of(fork())
    assert forks.judge(fork(1)) is MergeOutcome.REFUSED
    assert forks.add(fork(seq=2)) == ()

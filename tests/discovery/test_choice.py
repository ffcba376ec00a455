from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.discovery.choice import (
    FOLLOW_FOR_S,
    LISTEN_S,
    YIELD_S,
    HeardMesh,
    choose,
    founding_delay_s,
    should_follow,
)
from p2pmesh.identity.keys import MeshId, NodeId

NOW = 1_800_000_000


def mesh(name: str, founded_at: int, *, is_open: bool = True) -> HeardMesh:
    return HeardMesh(MeshId(name.encode().ljust(16, b"_")), name, founded_at, is_open, 2)


def follow(mine: HeardMesh, *heard: HeardMesh, age_s: float = 5, pristine: bool = True) -> str:
    found = should_follow(mine, heard, joined_at=NOW - age_s, now=NOW, pristine=pristine)
    return found.name if found else ""


def test_the_oldest_open_mesh_is_chosen() -> None:
    old, young = mesh("b", NOW - 60), mesh("a", NOW - 30)
    assert choose([young, old]) is old
    assert choose([young, mesh("older", NOW - 90, is_open=False)]) is young
    assert choose([mesh("private", NOW, is_open=False)]) is None
    assert choose([]) is None


def test_of_two_equally_old_the_smaller_id_is_chosen() -> None:
    one, two = mesh("a", NOW), mesh("b", NOW)
    assert choose([two, one]) is choose([one, two]) is one


def test_a_young_mesh_follows_an_older_one() -> None:
    assert follow(mesh("mine", NOW), mesh("old", NOW - 50), mesh("older", NOW - 70)) == "older"
    assert follow(mesh("b", NOW), mesh("a", NOW)) == "a"


def test_a_mesh_stays() -> None:
    mine = mesh("mine", NOW - 5)
    assert follow(mine, mesh("younger", NOW)) == ""
    assert follow(mine, mesh("private", NOW - 90, is_open=False)) == ""
    assert follow(mine, mesh("old", NOW - 90), pristine=False) == ""
    assert follow(mine, mesh("old", NOW - 90), age_s=FOLLOW_FOR_S) == ""
    assert follow(mine, mesh("old", NOW - 90), age_s=FOLLOW_FOR_S - 1) == "old"
    assert follow(mine) == ""


def test_a_lie_about_this_nodes_own_mesh_moves_nobody() -> None:
    assert follow(mesh("mine", NOW - 5), mesh("mine", NOW - 500)) == ""


def test_a_mesh_from_the_future_gains_nothing() -> None:
    """A founder whose clock is ahead loses, on every node alike and whatever their clocks say."""
    future = mesh("aaa", NOW + 3600)
    assert choose([future, mesh("zzz", NOW)]).name == "zzz"  # type: ignore[union-attr]
    assert follow(mesh("zzz", NOW), future) == ""
    assert follow(future, mesh("zzz", NOW)) == "zzz"


MESHES = st.lists(
    st.tuples(st.text("abc", min_size=1, max_size=3), st.integers(NOW - 9, NOW + 9)),
    min_size=1,
    max_size=6,
    unique_by=lambda item: item[0],
)


@given(MESHES)
def test_nodes_that_hear_each_other_end_in_one_mesh(items: list[tuple[str, int]]) -> None:
    meshes = [mesh(name, founded_at) for name, founded_at in items]
    where = list(meshes)  # each node begins in a mesh of its own
    for _ in meshes:
        where = [
            should_follow(mine, where, joined_at=NOW, now=NOW, pristine=True) or mine
            for mine in where
        ]
    assert set(where) == {choose(meshes)}


def test_of_several_newcomers_the_smallest_founds_and_the_others_listen_on() -> None:
    a, b, c = (NodeId(bytes([n]) * 16) for n in (1, 2, 3))
    assert founding_delay_s(a, [b, c]) == LISTEN_S
    assert founding_delay_s(a, [a, b]) == LISTEN_S, "its own query came back"
    assert founding_delay_s(b, []) == LISTEN_S
    assert founding_delay_s(b, [a, c]) == founding_delay_s(c, [a, b]) == LISTEN_S + YIELD_S


def test_made_up_newcomers_delay_a_founding_by_one_period_only() -> None:
    fakes = [NodeId(n.to_bytes(16, "big")) for n in range(10_000)]
    assert founding_delay_s(NodeId(b"\xff" * 16), fakes) == LISTEN_S + YIELD_S

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.state.item_index import IDLE_S, ItemIndex
from tests.state.builders import NODES


def ident(number: int) -> bytes:
    return number.to_bytes(16, "big")


@given(st.lists(st.tuples(st.integers(0, 99), st.booleans())), st.integers(0, 100))
def test_ids_are_all_there_and_in_order(steps: list[tuple[int, bool]], before: int) -> None:
    index, standing = ItemIndex(), set(range(before))
    for number in standing:
        index.add(ident(number), NODES[0])
    for number, asks in steps:
        if number in standing:
            standing.discard(number)
            index.drop(ident(number))
        else:
            standing.add(number)
            index.add(ident(number), NODES[1])
        if asks:
            expected = [ident(one) for one in sorted(standing)]
            assert index.ids(lambda: {ident(one) for one in standing}) == expected
    assert [n for n in range(100) if index.home(ident(n)) is not None] == sorted(standing)


def test_a_list_that_was_given_out_never_changes() -> None:
    index = ItemIndex()
    for number in range(100):
        index.add(ident(number), NODES[0])
    given_out = index.ids(lambda: map(ident, range(100)))
    assert index.ids(list) is given_out
    index.drop(ident(7))
    assert len(index.ids(list)) == 99
    assert len(given_out) == 100


def test_what_nobody_asks_for_is_not_kept() -> None:
    index = ItemIndex()
    index.add(ident(1), NODES[0])
    assert index.ids(lambda: [ident(1)]) == [ident(1)]
    index.rest(0.0)
    index.rest(IDLE_S - 1)
    assert index.ids(list) == [ident(1)]  # kept
    index.rest(IDLE_S)
    index.rest(2 * IDLE_S)
    assert index.ids(list) == []  # asked anew


def test_shared_homes_outlive_an_item() -> None:
    homes = {ident(1): NODES[1]}
    one, other = ItemIndex(homes), ItemIndex(homes)
    one.add(ident(2), NODES[0])
    other.add(ident(2), NODES[0])
    one.drop(ident(2))
    assert other.home(ident(2)) == one.home(ident(2)) == NODES[0]
    assert one.home(ident(1)) == NODES[1]

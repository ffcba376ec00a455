from __future__ import annotations

from p2pmesh.gossip.catch_up import AGREEING, ALONE_AFTER_S, CUTOFF_COUNTS_AFTER_S, CatchUp
from p2pmesh.identity.keys import NodeId

NODES = [NodeId(bytes([number]) * 16) for number in range(6)]
LINKS = frozenset(NODES)
NOBODY = frozenset[NodeId]()


def catch_up() -> CatchUp:
    one = CatchUp(done=False)
    one.begin(0.0)
    return one


def test_who_has_nobody_to_learn_from_is_up_to_date() -> None:
    assert CatchUp(done=True).done
    assert not catch_up().done


def test_it_takes_so_many_neighbours_that_know_the_same() -> None:
    one = catch_up()
    for node in NODES[: AGREEING - 1]:
        one.agreed(node, complete=True, now=1.0)
        one.agreed(node, complete=True, now=1.1)
    one.review(LINKS, NOBODY, 1.2)
    assert not one.done
    one.agreed(NODES[AGREEING], complete=True, now=1.3)
    one.review(LINKS, NOBODY, 1.4)
    assert one.done


def test_with_fewer_neighbours_all_of_them_are_enough() -> None:
    one = catch_up()
    one.agreed(NODES[0], complete=True, now=1.0)
    one.review(frozenset(NODES[:2]), NOBODY, 1.0)
    assert not one.done
    one.review(frozenset(NODES[:1]), NOBODY, 1.0)
    assert one.done


def test_who_differs_but_has_nothing_to_tell_counts_as_well() -> None:
    one = catch_up()
    one.agreed(NODES[0], complete=True, now=1.0)
    one.review(LINKS, {NODES[0], NODES[1]}, 1.0)
    assert not one.done, "one of them twice, and too few"
    one.review(LINKS - {NODES[2]}, set(NODES[1:3]), 1.0)
    assert not one.done, "not linked any more"
    one.review(LINKS, set(NODES[1:3]), 1.0)
    assert one.done


def test_who_is_not_linked_any_more_does_not_count() -> None:
    one = catch_up()
    for node in NODES[:AGREEING]:
        one.agreed(node, complete=True, now=1.0)
    one.review(LINKS - {NODES[0]}, NOBODY, 1.0)
    assert not one.done


def test_agreeing_up_to_a_cutoff_counts_once_that_says_something() -> None:
    one = catch_up()
    one.agreed(NODES[0], complete=False, now=CUTOFF_COUNTS_AFTER_S - 0.1)
    one.review(frozenset(NODES[:1]), NOBODY, CUTOFF_COUNTS_AFTER_S)
    assert not one.done
    one.agreed(NODES[0], complete=False, now=CUTOFF_COUNTS_AFTER_S)
    one.review(frozenset(NODES[:1]), NOBODY, CUTOFF_COUNTS_AFTER_S)
    assert one.done


def test_whom_nobody_answers_has_nobody_to_learn_from() -> None:
    one = catch_up()
    one.review(frozenset(), NOBODY, ALONE_AFTER_S - 0.1)
    assert not one.done
    one.review(frozenset(), NOBODY, ALONE_AFTER_S)
    assert one.done


def test_after_a_sleep_it_begins_anew_and_what_was_agreed_before_is_void() -> None:
    one = catch_up()
    one.agreed(NODES[0], complete=True, now=1.0)
    one.review(frozenset(NODES[:1]), NOBODY, 1.0)
    one.again(500.0)
    one.review(frozenset(NODES[:1]), NOBODY, 500.0 + ALONE_AFTER_S)
    assert not one.done
    one.agreed(NODES[0], complete=True, now=520.0)
    one.review(frozenset(NODES[:1]), NOBODY, 520.0)
    assert one.done


def test_once_done_it_stays_so() -> None:
    one = CatchUp(done=True)
    one.review(LINKS, NOBODY, 1.0)
    one.review(frozenset(), NOBODY, 1.0)
    assert one.done


def test_everything_is_compared_until_it_is_up_to_date_and_a_cutoff_says_something() -> None:
    one = catch_up()
    one.agreed(NODES[0], complete=True, now=1.0)
    one.review(frozenset(NODES[:1]), NOBODY, 1.0)
    assert one.done
    assert one.compares_all(CUTOFF_COUNTS_AFTER_S - 0.1)
    assert not one.compares_all(CUTOFF_COUNTS_AFTER_S)
    one.again(100.0)
    assert one.compares_all(100.0 + 2 * CUTOFF_COUNTS_AFTER_S)

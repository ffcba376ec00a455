from __future__ import annotations

from itertools import permutations

from p2pmesh.sharing import Sharing


def test_the_strictest_way_of_sharing_is_the_one_that_answers_in_full() -> None:
    for order in permutations(Sharing):
        assert Sharing.strictest(order) is Sharing.LAYERS
    assert Sharing.strictest([Sharing.AUTO, Sharing.EXPERTS]) is Sharing.EXPERTS
    assert Sharing.strictest([]) is Sharing.AUTO

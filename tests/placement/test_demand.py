from __future__ import annotations

import pytest

from p2pmesh.placement.demand import Demand
from p2pmesh.placement.facts import ModelFacts
from p2pmesh.sharing import Sharing
from tests.placement.placement_strategies import model, node

A = node("a")


@pytest.mark.parametrize("asked", list(Sharing))
def test_a_way_to_share_experts_counts_for_models_that_have_any(asked: Sharing) -> None:
    dense = ModelFacts(digest=model("m"), need_bytes=2, holders=(A,))
    moe = ModelFacts(digest=model("m"), need_bytes=2, holders=(A,), expert_bytes=((A, 1),))
    assert Demand(model=moe, copies=1, priority=0, moe=asked).sharing is asked
    assert Demand(model=dense, copies=1, priority=0, moe=asked).sharing is Sharing.AUTO

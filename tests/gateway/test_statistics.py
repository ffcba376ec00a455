from __future__ import annotations

from p2pmesh.gateway.statistics import Counters
from tests.gateway.fake import ALPHA, BETA


def test_a_snapshot_does_not_change_with_the_counters() -> None:
    counters = Counters(requests=2)
    counters.in_flight[ALPHA] += 1
    counters.in_flight[BETA] += 0
    counters.responses[200] += 1
    frozen = counters.freeze(connections=3, queued=1)
    counters.in_flight[ALPHA] -= 1
    counters.responses[200] += 1
    counters.requests += 1
    assert (frozen.requests, frozen.connections, frozen.queued) == (2, 3, 1)
    assert frozen.in_flight == {ALPHA: 1}
    assert frozen.responses == {200: 1}

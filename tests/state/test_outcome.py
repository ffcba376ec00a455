from __future__ import annotations

from typing import Any

import pytest

from p2pmesh.identity.keys import MeshId
from p2pmesh.state.outcome import AHEAD_S_MAX, EPOCH_AHEAD_S_MAX, MergeOutcome, is_credible, judge
from p2pmesh.state.owner_records import EXPIRY_GRACE_S, NOTHING, OWNER_BYTES_MAX, hold
from tests.state.builders import MESH, NOW, certificate, fork, record

STANDING = hold({"member": record(register="member", seq=5)})


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, MergeOutcome.STALE),
        ({"seq": 4}, MergeOutcome.STALE),
        ({"seq": 9, "epoch": NOW - 1}, MergeOutcome.STALE),
        ({"seq": 6}, MergeOutcome.NEWS),
        ({"seq": 1, "epoch": NOW + 1}, MergeOutcome.NEWS),
        ({"body": {"value": 2}}, MergeOutcome.EQUIVOCATION),
        ({"register": "caps", "epoch": NOW - 1}, MergeOutcome.STALE),
        ({"register": "wants", "epoch": NOW - 1}, MergeOutcome.NEWS),
        ({"seq": 6, "mesh": MeshId(b"n" * 16)}, MergeOutcome.VOID),
        ({"seq": 6, "issued_at": NOW - 10 - EXPIRY_GRACE_S, "ttl_s": 10}, MergeOutcome.VOID),
        ({"seq": 6, "issued_at": NOW - 9 - EXPIRY_GRACE_S, "ttl_s": 10}, MergeOutcome.NEWS),
        ({"seq": 6, "issued_at": NOW + AHEAD_S_MAX + 1}, MergeOutcome.VOID),
        ({"seq": 6, "issued_at": NOW + AHEAD_S_MAX}, MergeOutcome.NEWS),
        ({"seq": 6, "epoch": NOW + EPOCH_AHEAD_S_MAX + 1}, MergeOutcome.VOID),
    ],
)
def test_the_version_and_the_time_decide(changes: dict[str, Any], outcome: MergeOutcome) -> None:
    arriving = record(**{"register": "member", "seq": 5, **changes})
    assert judge(arriving, STANDING, MESH, NOW) is outcome


def test_what_goes_beyond_the_bounds_is_refused() -> None:
    full = hold({f"a/{n}": record(register=f"a/{n}", body={"x": b"y" * 16_000}) for n in range(16)})
    assert full.size_bytes < OWNER_BYTES_MAX
    big = record(register="b", body={"x": b"y" * 16_000})
    assert judge(big, full, MESH, NOW) is MergeOutcome.REFUSED
    assert judge(big, NOTHING, MESH, NOW) is MergeOutcome.NEWS


def test_certificates_and_forks_may_be_incredible_too() -> None:
    facts: list[Any] = [certificate(), fork()]
    assert all(is_credible(fact, MESH, NOW) for fact in facts)
    assert not any(is_credible(fact, MeshId(b"n" * 16), NOW) for fact in facts)
    assert not any(is_credible(fact, MESH, NOW - AHEAD_S_MAX - 1) for fact in facts)

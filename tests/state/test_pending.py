from __future__ import annotations

from p2pmesh.state.outcome import MergeOutcome
from p2pmesh.state.pending import PENDING_BYTES_MAX, PENDING_S, Pending
from tests.state.builders import NODES, NOW, record


def test_what_waits_is_taken_once() -> None:
    pending = Pending()
    caps, load, other = record(), record(register="load"), record(1)
    for early in (caps, load, caps, other):
        pending.add(early, NOW)
    assert pending.size_bytes == len(caps.raw) + len(load.raw) + len(other.raw)
    assert pending.judge(caps) is MergeOutcome.STALE
    assert pending.judge(record(seq=2)) is MergeOutcome.PENDING
    assert pending.take(NODES[0]) == (caps, load)
    assert pending.take(NODES[0]) == ()
    assert pending.judge(caps) is MergeOutcome.PENDING
    assert pending.size_bytes == len(other.raw)


def test_nothing_waits_for_ever() -> None:
    pending = Pending()
    for owner in (0, 1):
        pending.add(record(owner), NOW + owner)
    pending.lapse(NOW + PENDING_S - 1)
    pending.lapse(NOW + PENDING_S)
    assert pending.take(NODES[0]) == ()
    assert pending.take(NODES[1]) == (record(1),)
    assert pending.size_bytes == 0


def test_there_is_only_so_much_room() -> None:
    pending, seq = Pending(), 0
    early = record(body={"x": "y" * 16_000})
    while pending.judge(early) is MergeOutcome.PENDING:
        pending.add(early, NOW)
        seq += 1
        early = record(seq=1 + seq, body={"x": "y" * 16_000})
    assert pending.judge(early) is MergeOutcome.VOID
    pending.add(early, NOW)
    assert PENDING_BYTES_MAX - 16_384 < pending.size_bytes <= PENDING_BYTES_MAX
    assert len(pending.take(NODES[0])) == seq
    assert pending.size_bytes == 0

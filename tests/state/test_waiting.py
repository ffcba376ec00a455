from __future__ import annotations

from p2pmesh.state.verdict import Verdict
from p2pmesh.state.waiting import WAITING_BYTES_MAX, WAITING_S, Waiting
from tests.state.make import NODES, NOW, record


def test_what_waits_is_taken_once() -> None:
    waiting = Waiting()
    caps, load, other = record(), record(register="load"), record(1)
    for early in (caps, load, caps, other):
        waiting.add(early, NOW)
    assert waiting.size_bytes == len(caps.raw) + len(load.raw) + len(other.raw)
    assert waiting.judge(caps) is Verdict.STALE
    assert waiting.judge(record(seq=2)) is Verdict.PENDING
    assert waiting.take(NODES[0]) == (caps, load)
    assert waiting.take(NODES[0]) == ()
    assert waiting.judge(caps) is Verdict.PENDING
    assert waiting.size_bytes == len(other.raw)


def test_nothing_waits_for_ever() -> None:
    waiting = Waiting()
    for owner in (0, 1):
        waiting.add(record(owner), NOW + owner)
    waiting.lapse(NOW + WAITING_S - 1)
    waiting.lapse(NOW + WAITING_S)
    assert waiting.take(NODES[0]) == ()
    assert waiting.take(NODES[1]) == (record(1),)
    assert waiting.size_bytes == 0


def test_there_is_only_so_much_room() -> None:
    waiting, seq = Waiting(), 0
    early = record(body={"x": "y" * 16_000})
    while waiting.judge(early) is Verdict.PENDING:
        waiting.add(early, NOW)
        seq += 1
        early = record(seq=1 + seq, body={"x": "y" * 16_000})
    assert waiting.judge(early) is Verdict.VOID
    waiting.add(early, NOW)
    assert WAITING_BYTES_MAX - 16_384 < waiting.size_bytes <= WAITING_BYTES_MAX
    assert len(waiting.take(NODES[0])) == seq
    assert waiting.size_bytes == 0

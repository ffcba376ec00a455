from __future__ import annotations

from itertools import count

from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.state.outcome import MergeOutcome
from p2pmesh.state.owner_records import OWNER_BYTES_MAX
from p2pmesh.state.pending import PENDING_BYTES_MAX, PENDING_S, Pending
from p2pmesh.wire.records import Record
from tests.state.builders import KEYS, NODES, NOW, record, sealed


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


def early(key: SigningKey, seq: int) -> Record:
    return sealed(key, "caps", seq=seq, body={"x": "y" * 16_000})


def test_there_is_only_so_much_room() -> None:
    pending = Pending()
    owners = [SigningKey(number.to_bytes(32)) for number in range(1, 64)]
    records = (early(key, seq) for key in owners for seq in range(10))
    last = next(one for one in records if not waits(pending, one))
    assert pending.judge(last) is MergeOutcome.VOID
    assert PENDING_BYTES_MAX - 16_384 < pending.size_bytes <= PENDING_BYTES_MAX
    assert len(pending.take(NodeId(owners[0].id))) == 10
    assert pending.judge(last) is MergeOutcome.PENDING


def test_no_owner_takes_the_room_of_the_others() -> None:
    pending = Pending()
    last = next(one for seq in count() if not waits(pending, one := early(KEYS[0], seq)))
    assert OWNER_BYTES_MAX - 16_384 < pending.size_bytes <= OWNER_BYTES_MAX
    assert pending.judge(last) is MergeOutcome.VOID
    assert pending.judge(record(1)) is MergeOutcome.PENDING


def waits(pending: Pending, one: Record) -> bool:
    before = pending.size_bytes
    pending.add(one, NOW)
    return pending.size_bytes > before

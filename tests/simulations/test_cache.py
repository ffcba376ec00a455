from __future__ import annotations

from p2pmesh.gossip.overlay import Overlay
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.owner_records import hold
from p2pmesh.wire.records import Record, seal
from simulations import cache
from simulations.cache import Memory, Remembered
from simulations.world import MESH, key_of


def record(seq: int = 1) -> Record:
    return seal(
        key_of(0, 0),
        mesh=MESH,
        register="caps",
        epoch=1,
        seq=seq,
        instance=1,
        issued_at=1,
        ttl_s=60,
        body={},
    )


def test_equal_questions_have_one_answer() -> None:
    check, raw = Memory().shared.check, record().raw
    assert check.parse(raw) is check.parse(bytes(bytearray(raw)))
    assert check.verify(check.parse(raw))
    assert check.peek(raw) == check.peek(raw) is not None
    assert check.digest(raw) == record().digest


def test_what_is_forged_stays_forged() -> None:
    check, good = Memory().shared.check, record()
    forged = check.parse(bytes(64) + good.raw[64:])
    assert forged.digest == good.digest
    assert (check.verify(forged), check.verify(good), check.verify(forged)) == (False, True, False)


def test_equal_parts_of_documents_are_one() -> None:
    share = Memory().shared.held
    assert share is not None
    one, other = hold({"caps": record()}), hold({"caps": record()})
    assert share(one) is one is share(other)
    assert share(hold({"caps": record(2)})) is not one


def test_what_stands_beside_a_record_is_worked_out_once() -> None:
    shared, before = Memory().shared, hold({"caps": record()})
    after = shared.grown(before, record(2))
    assert after == before.with_record(record(2))
    assert shared.grown(hold({"caps": record()}), record(2)) is after
    assert shared.grown(after, record(3)) is not after


def test_each_set_of_members_has_one_overlay() -> None:
    overlay = Memory().shared.overlay
    some = frozenset((NodeId(bytes([n]) * 16), True) for n in range(3))
    first = overlay(some, None)
    assert isinstance(first, Overlay)
    assert overlay(frozenset(some), None) is first
    for number in range(cache.OVERLAYS):
        overlay(frozenset({(NodeId(number.to_bytes(16, "big")), True)}), None)
    assert overlay(some, None) is not first


def test_too_many_answers_are_forgotten() -> None:
    asked: list[int] = []

    def negative(one: int) -> int:
        asked.append(one)
        return -one

    remembered = Remembered(negative, most=2)
    assert [remembered[one] for one in (1, 2, 1, 3, 1)] == [-1, -2, -1, -3, -1]
    assert asked == [1, 2, 3, 1]

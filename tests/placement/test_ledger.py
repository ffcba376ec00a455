from __future__ import annotations

from p2pmesh.models.parts import Shard, ShardKind, ShardQuality
from p2pmesh.placement.layout import Experts, PlacedShard
from p2pmesh.placement.ledger import Ledger
from p2pmesh.placement.pipeline import Stage
from tests.placement.placement_strategies import model, node

A, B = node("a"), node("b")
ONE, TWO, THREE = model("one"), model("two"), model("three")
QUALITY = ShardQuality(ShardKind.EXPERTS, "ab" * 32, 4, 2, 0, 0)
SHARDS = Experts(
    digest=TWO,
    quality=QUALITY,
    shards=(
        PlacedShard(A, Shard(*QUALITY[:4], 0b0111), 7),
        PlacedShard(B, Shard(*QUALITY[:4], 0b1011), 8),
    ),
)


def full() -> Ledger:
    ledger = Ledger({A: 100, B: 100})
    ledger.give_stages(ONE, (Stage(A, 0, 1, 10), Stage(B, 2, 3, 20)))
    ledger.give_shards(SHARDS)
    ledger.give_copy(THREE, A, 30)
    return ledger


def test_what_is_given_is_taken_from_the_room() -> None:
    ledger = full()
    assert ledger.room == {A: 53, B: 72}
    assert ledger.places(THREE) == {A: 30}
    assert ledger.taken_by_stages() == {A: 10, B: 20}
    assert ledger.held(ONE) == [(A, 10), (B, 20)]
    assert ledger.held(TWO) == [(A, 7), (B, 8)]
    assert ledger.held(THREE) == []


def test_what_is_taken_back_is_room_again() -> None:
    ledger = full()
    ledger.take_back(ONE)
    ledger.take_back(TWO)
    ledger.take_back(THREE)
    assert ledger.room == {A: 70, B: 100}, "copies stay"
    assert not ledger.pipelines
    assert not ledger.shards


def test_a_stand_in_is_taken_back_with_the_last_model_that_it_serves() -> None:
    ledger = full()
    ledger.stand_ins = {ONE: THREE, TWO: THREE}
    assert ledger.held(ONE) == [(A, 10), (B, 20)]
    ledger.take_back(ONE)
    assert ledger.places(THREE) == {A: 30}
    assert ledger.held(TWO) == [(A, 7), (B, 8), (A, 30)]
    ledger.take_back(TWO)
    assert ledger.places(THREE) == {}
    assert ledger.room == {A: 100, B: 100}


def test_a_copy_is_independent() -> None:
    ledger = full()
    other = ledger.copy()
    other.take_back(ONE)
    other.give_copy(THREE, B, 1)
    other.stand_ins[ONE] = TWO
    assert ledger.room == full().room
    assert ledger.places(THREE) == {A: 30}
    assert ledger.held(ONE) == [(A, 10), (B, 20)]
    assert not ledger.stand_ins

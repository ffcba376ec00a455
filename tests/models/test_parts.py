from __future__ import annotations

from typing import Any

import pytest

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import (
    STAGES_MAX,
    WHOLE,
    PartId,
    Shard,
    ShardKind,
    StageName,
    StageRange,
    is_full,
    is_known,
    is_shard,
    parse_part,
    parse_stage,
    shard_name,
    takes_requests,
    unit_id,
)

UNIT = "0011223344aabbcc"
DIGEST = ModelDigest("a" * 64)
A, B = NodeId(b"a" * 16), NodeId(b"b" * 16)


def test_a_part_is_the_whole_model_unless_it_says_otherwise() -> None:
    assert PartId(ModelDigest("a" * 64)) == (ModelDigest("a" * 64), WHOLE)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Whole",
        "whole-1",
        "stage-0011aabb-0",
        f"stage-{UNIT}-{STAGES_MAX}",
        f"stage-{UNIT}-00",
        f"stage-{UNIT.upper()}-0",
        f"stage-{UNIT}-0\n",
        "shard-0011aabb-2",
    ],
)
def test_other_parts_are_not_known(name: str) -> None:
    assert not is_known(name)
    assert not takes_requests(name)
    assert parse_stage(name) is None


def test_stages_are_known_by_their_unit_and_number() -> None:
    assert is_known(WHOLE)
    assert parse_stage(WHOLE) is None
    for number in range(STAGES_MAX):
        stage = StageName(UNIT, number)
        assert is_known(str(stage))
        assert parse_stage(str(stage)) == stage


def test_a_shard_is_named_by_all_that_it_holds() -> None:
    shard = Shard(ShardKind.EXPERTS, "ab" * 32, 10, 2, 0b1000000011)
    name = shard_name(DIGEST, shard)
    assert is_known(name)
    assert is_shard(name)
    assert takes_requests(name)
    assert not is_full(name)
    assert parse_stage(name) is None
    changes: list[dict[str, Any]] = [
        {"kind": ShardKind.THIN},
        {"ranking": "cd" * 32},
        {"places": 11},
        {"critical": 1},
        {"kept": 7},
    ]
    others = [
        shard_name(ModelDigest("b" * 64), shard),
        *(shard_name(DIGEST, shard._replace(**change)) for change in changes),
    ]
    assert len({name, *others}) == 7
    assert (shard.size, shard.kept_bytes) == (3, b"\x03\x02")


def test_only_whole_models_and_heads_answer_in_full() -> None:
    names = [WHOLE, str(StageName(UNIT, 0)), str(StageName(UNIT, 1))]
    assert [is_full(name) for name in names] == [True, True, False]


def test_requests_go_to_whole_models_and_heads() -> None:
    assert takes_requests(WHOLE)
    assert [takes_requests(str(StageName(UNIT, number))) for number in range(3)] == [
        True,
        False,
        False,
    ]


def test_a_unit_is_its_model_its_nodes_in_order_and_its_exact_ranges() -> None:
    stages = (StageRange(A, 0, 3), StageRange(B, 4, 7))
    others = [
        (DIGEST, stages[::-1]),
        (ModelDigest("b" * 64), stages),
        (DIGEST, (StageRange(A, 0, 2), StageRange(B, 3, 7))),
        (DIGEST, stages[:1]),
    ]
    assert unit_id(DIGEST, stages) == "2b7f40c883223f1d"
    assert len({unit_id(DIGEST, stages), *(unit_id(*other) for other in others)}) == 5


def test_a_part_is_read_as_it_is_written() -> None:
    for name in (WHOLE, str(StageName(UNIT, 1))):
        part = PartId(DIGEST, name)
        assert str(part) == f"{DIGEST}/{name}"
        assert parse_part(str(part)) == part
    for text in ("", "a" * 64, "a/", "a/shard-0011aabb-2", "a/whole/", "/whole/whole"):
        assert parse_part(text) is None

from __future__ import annotations

import pytest

from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import WHOLE, PartId, is_known, parse_part


def test_a_part_is_the_whole_model_unless_it_says_otherwise() -> None:
    assert PartId(ModelDigest("a" * 64)) == (ModelDigest("a" * 64), WHOLE)


@pytest.mark.parametrize("name", ["", "Whole", "whole-1", "stage-0011aabb-0", "shard-0011aabb-2"])
def test_only_whole_models_are_known(name: str) -> None:
    assert is_known(WHOLE)
    assert not is_known(name)


def test_a_part_is_read_as_it_is_written() -> None:
    part = PartId(ModelDigest("a" * 64))
    assert str(part) == "a" * 64 + "/whole"
    assert parse_part(str(part)) == part
    for text in ("", "a" * 64, "a/", "a/shard-0011aabb-2", "a/whole/", "/whole/whole"):
        assert parse_part(text) is None

from __future__ import annotations

from typing import Any

import pytest

from p2pmesh.errors import PeerError
from p2pmesh.wire.fields import as_map, take, take_bytes, take_exactly, take_list


def test_fields_of_the_right_type_come_out() -> None:
    fields = as_map({"n": 3, "t": "x", "l": [b"1", b"2"], "later": None}, "it")
    assert take(fields, "n", int) == 3
    assert take(fields, "t", str) == "x"
    assert take_list(fields, "l", bytes, size_max=2) == (b"1", b"2")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({}, "not of type"), ({"n": True}, "not of type"), ({"n": -1}, "negative")],
)
def test_a_number_that_is_none_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PeerError, match=sentence):
        take(fields, "n", int)


def test_bounds_hold() -> None:
    with pytest.raises(PeerError, match="longer than 2"):
        take({"t": "abc"}, "t", str, size_max=2)
    with pytest.raises(PeerError, match="holds something"):
        take_list({"l": [1, "a"]}, "l", int, size_max=2)
    with pytest.raises(PeerError, match="not a map"):
        as_map([1], "it")


def test_the_length_of_bytes_is_checked_wherever_they_stand() -> None:
    assert take_exactly({"b": b"12"}, "b", 2) == b"12"
    assert take_bytes({"l": [b"12", b""]}, "l", count_max=2, size_max=2) == (b"12", b"")
    for length in (1, 3):
        with pytest.raises(PeerError, match=r"long|wrong"):
            take_exactly({"b": bytes(length)}, "b", 2)
        with pytest.raises(PeerError, match="wrong length"):
            take_bytes({"l": [bytes(length)]}, "l", count_max=2, size_max=2, size_min=2)
    with pytest.raises(PeerError, match="longer than 1"):
        take_bytes({"l": [b"", b""]}, "l", count_max=1, size_max=2)

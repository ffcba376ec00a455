from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.wire.codec import CONTAINERS_MAX, DEPTH_MAX, ITEMS_MAX, decode, encode

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.binary(max_size=40)
    | st.text(max_size=40)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)


@given(values)
def test_a_value_survives(value: Any) -> None:
    assert decode(encode(value), bytes_max=1 << 20) == value


@given(st.dictionaries(st.text(max_size=8), scalars))
def test_the_order_of_a_map_does_not_matter(value: dict[str, Any]) -> None:
    assert encode(dict(reversed(value.items()))) == encode(value)


@given(st.binary(max_size=300))
def test_junk_is_refused_or_canonical(junk: bytes) -> None:
    try:
        value = decode(junk, bytes_max=300)
    except PeerError:
        return
    assert encode(value) == junk


@pytest.mark.parametrize(
    "data",
    [
        b"\xcd\x00\x05",  # 5, in three bytes
        b"\x82\xa1a\x01\xa1a\x02",  # one key twice
        b"\x82\xa1b\x01\xa1a\x02",  # keys out of order
        b"\x81\x01\x02",  # a key that is not text
        msgpack.packb(1.5),
        msgpack.packb(msgpack.Timestamp(1)),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        b"\x91" * 5000 + b"\x01",  # nested past any sense
        b"\xdd\xff\xff\xff\xff",  # four thousand million items announced, none there
        b"\xdf\xff\xff\xff\xff",  # as many pairs
        b"\xc6\xff\xff\xff\xff",  # as many bytes
        b"\xdc\x10\x00" * 1000,  # lists that announce much within each other
        b"\x81\xc4\x01a\x02",  # a key that is bytes
        b"\x82\xa1a\x01\xc4\x01b\x02",
        b"\x91\xca\x00\x00\x00\x00",  # a float further in
        b"\x81\xa1a\xd6\xff\x00\x00\x00\x01",  # a time in msgpack's own form
        b"\xa2\xff\xff",  # text that is not UTF-8
        b"",
        b"\x01\x01",
    ],
)
def test_a_second_spelling_or_foreign_type_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        decode(data, bytes_max=1 << 20)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("most", "excess"),
    [
        (nested(DEPTH_MAX), nested(DEPTH_MAX + 1)),
        ([1] * ITEMS_MAX, [1] * (ITEMS_MAX + 1)),
        (
            [[{}] * 2046] * 4,
            [[{}] * (CONTAINERS_MAX // 4)] * 4,
        ),
    ],
)
def test_how_deep_wide_and_many_is_bounded(most: Any, excess: Any) -> None:
    assert decode(encode(most), bytes_max=1 << 20) == most
    with pytest.raises(PeerError, match="cannot be decoded"):
        decode(encode(excess), bytes_max=1 << 20)


@given(st.lists(st.sampled_from([0x80, 0x81, 0x91, 0x92, 0xDC, 0xDD, 0xDE, 0xDF, 0xC4, 0x01])))
def test_announcements_are_not_believed(announced: list[int]) -> None:
    try:
        value = decode(bytes(announced), bytes_max=1 << 20)
    except PeerError:
        return
    assert encode(value) == bytes(announced)


def test_long_input_is_refused_unread() -> None:
    with pytest.raises(PeerError, match="at most 10"):
        decode(b"\x01" * 11, bytes_max=10)


@pytest.mark.parametrize("value", [1.0, {1: 2}, object(), {"a": {3}}, bytearray(b"x")])
def test_what_the_wire_has_no_form_for_is_our_bug(value: Any) -> None:
    with pytest.raises(TypeError):
        encode(value)


def test_too_large_an_integer_is_our_bug() -> None:
    with pytest.raises(OverflowError):
        encode([2**64])

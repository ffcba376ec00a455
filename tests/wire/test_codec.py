from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.wire.codec import decode, encode

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
        b"\xa2\xff\xff",  # text that is not UTF-8
        b"",
        b"\x01\x01",
    ],
)
def test_a_second_spelling_or_foreign_type_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        decode(data, bytes_max=1 << 20)


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

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import ConfigError
from p2pmesh.identity.keys import ID_BYTES, SigningKey, key_id, parse_id, show_id, verify

# RFC 8032, section 7.1, test 2.
RFC_SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
RFC_PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")


def test_keys_are_the_standard_ones() -> None:
    key = SigningKey(RFC_SEED)
    assert key.public == RFC_PUBLIC
    assert key.sign(b"\x72").hex().startswith("92a009a9f0d4cab8720e820b5f642540")
    assert key.id == key_id(RFC_PUBLIC)
    assert len(key.id) == ID_BYTES


def test_a_signature_holds_for_its_message_and_key_only() -> None:
    key, other = SigningKey(bytes(32)), SigningKey(b"\1" * 32)
    signature = key.sign(b"message")
    assert verify(key.public, signature, b"message")
    assert not verify(key.public, signature, b"messagE")
    assert not verify(other.public, signature, b"message")


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_junk_is_no_signature_and_no_error(public: bytes, signature: bytes) -> None:
    assert not verify(public, signature, b"message")


@given(st.binary(min_size=ID_BYTES, max_size=ID_BYTES))
def test_an_id_survives_being_shown(value: bytes) -> None:
    assert parse_id(show_id(value)) == value
    assert len(show_id(value)) == 26


@pytest.mark.parametrize("text", ["", "abc", "a" * 25, "a" * 27, "1" * 26, "é" * 26, "b" * 26])
def test_what_is_not_an_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an id"):
        parse_id(text)

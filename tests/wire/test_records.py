from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.identity.keys import MeshId, SigningKey
from p2pmesh.wire.codec import encode
from p2pmesh.wire.records import (
    RECORD_BYTES_MAX,
    TAG,
    Record,
    RecordCheck,
    digest_of,
    parse,
    peek,
    seal,
    verify_record,
)

KEY = SigningKey(b"k" * 32)
MESH = MeshId(b"m" * 16)


def sealed(**changes: Any) -> Record:
    arguments: dict[str, Any] = {
        "mesh": MESH,
        "register": "caps",
        "epoch": 5,
        "seq": 1,
        "instance": 7,
        "issued_at": 1000,
        "ttl_s": 60,
        "body": {"budget": 1 << 33, "name": "kitchen"},
    }
    return seal(KEY, **{**arguments, **changes})


def test_a_record_survives_the_wire() -> None:
    record = sealed()
    again = parse(record.raw)
    assert again == record
    assert verify_record(again)
    assert again.owner == KEY.id
    assert again.key == (KEY.id, "caps")
    assert again.expires_at == 1060
    assert again.body == {"budget": 1 << 33, "name": "kitchen"}


def test_the_bytes_are_these() -> None:
    # A test vector: what other implementations must produce too.
    record = sealed()
    assert record.digest.hex() == "d498af042a2a2879dd05c455cf85be49"
    assert record.raw[96:].hex().startswith("9ab07032706d657368207265636f72642031c410")


@given(st.integers(0, 400), st.integers(1, 255))
def test_no_bit_can_be_changed(position: int, change: int) -> None:
    raw = bytearray(sealed().raw)
    raw[position % len(raw)] ^= change
    try:
        record = parse(bytes(raw))
    except PeerError:
        return
    assert not verify_record(record)


numbers = st.integers(0, 2**64 - 1)


@given(st.sampled_from(["member", "a" * 16 + "/99", "x/0"]), numbers, numbers)
def test_a_peek_sees_what_parsing_reads(register: str, epoch: int, seq: int) -> None:
    record = sealed(register=register, epoch=epoch, seq=seq)
    assert peek(record.raw) == (record.owner, register, epoch, seq)
    assert digest_of(record.raw) == record.digest


@given(st.integers(0, 260), st.integers(0, 150), st.integers(0, 255))
def test_a_peek_at_anything_else_is_harmless(length: int, place: int, byte: int) -> None:
    raw = bytearray(sealed().raw[:length])
    raw[96 + place : 97 + place] = bytes([byte])
    head = peek(bytes(raw))
    assert head is None or (len(head.owner) == 16 and min(head.epoch, head.seq) >= 0)


@given(st.binary(max_size=400))
def test_a_peek_at_junk_says_nothing(junk: bytes) -> None:
    assert peek(junk) is None


def test_reading_can_be_remembered() -> None:
    check, raw = RecordCheck(), sealed().raw
    record = check.parse(raw)
    assert check.verify(record)
    assert check.digest(raw) == record.digest
    assert check.peek(raw) == (record.owner, record.register, record.epoch, record.seq)


@given(st.binary(max_size=400))
def test_junk_is_a_peers_fault_and_nothing_else(junk: bytes) -> None:
    with pytest.raises(PeerError):
        parse(junk)


def test_versions_are_ordered_by_epoch_then_seq_then_digest() -> None:
    old, new, newer = sealed(epoch=4, seq=9), sealed(), sealed(seq=2)
    assert old.version < new.version < newer.version
    twin = sealed(body={"budget": 2})
    assert (twin.version < new.version) != (new.version < twin.version)


@pytest.mark.parametrize(
    "changes",
    [
        {"register": "Caps"},
        {"register": "models/100"},
        {"register": "models/01"},
        {"register": ""},
        {"ttl_s": 10**9},
        {"epoch": -1},
        {"body": {"x": "y" * RECORD_BYTES_MAX}},
    ],
)
def test_our_own_record_out_of_bounds_is_our_bug(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="register"):
        sealed(**changes)


def test_a_record_signed_for_somebody_else_is_refused() -> None:
    signed = encode([TAG, MESH, b"o" * 16, "caps", 1, 1, 1, 1, 1, {}])
    with pytest.raises(PeerError, match="not its owner's"):
        parse(KEY.sign(signed) + KEY.public + signed)


@pytest.mark.parametrize("epoch", [True, "1", None, []])
def test_a_field_of_another_type_is_refused(epoch: Any) -> None:
    signed = encode([TAG, MESH, KEY.id, "caps", epoch, 1, 1, 1, 1, {}])
    with pytest.raises(PeerError, match="unknown form"):
        parse(KEY.sign(signed) + KEY.public + signed)

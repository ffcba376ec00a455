from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.codec import encode
from p2pmesh.wire.messages import (
    RECORDS_BYTES_MAX,
    Answer,
    Message,
    Probe,
    Records,
    Summary,
    Unknown,
    Version,
    decode_message,
    encode_message,
    in_messages,
)

numbers = st.integers(0, 2**63 - 1)
digests = st.binary(min_size=16, max_size=16)
versions = st.builds(
    Version,
    owner=digests.map(NodeId),
    register=st.sampled_from(["member", "caps", "models/0"]),
    epoch=numbers,
    seq=numbers,
    digest=digests,
)


def probes(kind: type[Probe | Answer]) -> st.SearchStrategy[Message]:
    return st.builds(kind, token=numbers, fingerprint=digests, plan=digests, sent_at_ms=numbers)


messages = st.one_of(
    st.builds(Records, records=st.lists(st.binary(max_size=64), max_size=5).map(tuple)),
    st.builds(Summary, versions=st.lists(versions, max_size=5).map(tuple), answer=st.booleans()),
    probes(Probe),
    probes(Answer),
)


@given(messages)
def test_a_message_survives_the_wire(message: Message) -> None:
    assert decode_message(encode_message(message)) == message


def test_a_kind_from_the_future_is_skipped() -> None:
    assert decode_message(encode({"t": "dance", "x": 1})) == Unknown(kind="dance")
    with pytest.raises(TypeError):
        encode_message(Unknown(kind="dance"))


@given(st.binary(max_size=200))
def test_junk_is_a_peers_fault_and_nothing_else(junk: bytes) -> None:
    with pytest.raises(PeerError):
        decode_message(junk)


@pytest.mark.parametrize(
    "fields",
    [
        {"t": "records"},
        {"t": "records", "r": ["text"]},
        {"t": "records", "r": [bytes(20_000)]},
        {"t": "summary", "v": [[b"x", "caps", 1, 1, bytes(16)]], "a": True},
        {"t": "summary", "v": [], "a": 1},
        {"t": "probe", "n": 1, "f": bytes(17), "p": b"", "at": 1},
        {"t": 7},
    ],
)
def test_a_message_of_the_wrong_shape_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(PeerError):
        decode_message(encode(fields))


@given(st.lists(st.integers(1, 16_000), max_size=60))
def test_records_are_packed_in_order_and_within_the_bound(sizes: list[int]) -> None:
    records = [bytes(size) for size in sizes]
    packed = list(in_messages(records))
    assert [raw for message in packed for raw in message.records] == records
    assert all(0 < sum(map(len, m.records)) <= RECORDS_BYTES_MAX for m in packed)

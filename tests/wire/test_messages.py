from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.wire.codec import encode
from p2pmesh.wire.evidence import CERTIFICATE_BYTES_MAX, FORK_BYTES_MAX
from p2pmesh.wire.facts import FACT_KINDS
from p2pmesh.wire.messages import (
    CHUNK_BYTES_MAX,
    IDS_MAX,
    MESSAGE_BYTES_MAX,
    PIECES_MAX,
    RANGES_MAX,
    RECENT_MAX,
    RECORDS_BYTES_MAX,
    WANT_MAX,
    Ack,
    FetchRequest,
    Items,
    Message,
    Ping,
    Push,
    Range,
    Ranges,
    Unknown,
    decode_message,
    encode_message,
    in_chunks,
)
from p2pmesh.wire.records import RECORD_BYTES_MAX
from p2pmesh.wire.statements import STATEMENT_BYTES_MAX
from tests.wire import strategies

ID = bytes(range(16))
messages = strategies.messages()


@given(messages)
def test_a_message_survives_the_wire(message: Message) -> None:
    assert decode_message(encode_message(message)) == message


def test_a_probe_is_no_answer() -> None:
    said: dict[str, Any] = {
        "token": 1,
        "at_ms": 2,
        "cutoff": 3,
        "fingerprint": ID,
        "plan": ID,
        "keep": True,
    }
    probe: Message = Ping(**said)
    assert probe != Ack(**said)
    assert not isinstance(Ack(**said), Ping)
    with pytest.raises(AttributeError):
        setattr(Ping(**said), "token", 2)  # noqa: B010 - the type checker sees through the other


def test_a_kind_from_the_future_is_skipped() -> None:
    assert decode_message(encode({"t": "dance", "x": 1})) == Unknown(kind="dance")
    with pytest.raises(TypeError):
        encode_message(Unknown(kind="dance"))


@given(messages.filter(lambda message: not isinstance(message, Unknown)))
def test_a_field_from_the_future_is_ignored(message: Message) -> None:
    data = encode_message(message)
    count = data[0] & 0xF
    assert decode_message(bytes([0x81 + count]) + data[1:] + encode("zz") + b"\x01") == message


@given(st.binary(max_size=200))
def test_junk_is_a_peers_fault_and_nothing_else(junk: bytes) -> None:
    with pytest.raises(PeerError):
        decode_message(junk)


@given(messages, st.integers(0, 10_000), st.none() | st.integers(0, 255))
def test_damage_is_a_peers_fault_or_another_message(
    message: Message, place: int, byte: int | None
) -> None:
    data = encode_message(message)
    place %= len(data)
    damaged = data[:place] + (b"" if byte is None else bytes([byte]) + data[place + 1 :])
    try:
        read = decode_message(damaged)
    except PeerError:
        return
    assert isinstance(read, Unknown) or decode_message(encode_message(read)) == read


SIGN = {"t": "probe", "n": 1, "at": 1, "c": 1, "f": ID, "p": ID, "k": True, "r": []}
FACTS = {"t": "facts", "s": [], "r": [], "c": [], "f": [], "a": False}
ITEMS = {"t": "items", "l": b"", "u": b"", "i": [], "a": True}


@pytest.mark.parametrize("message", [SIGN, {**SIGN, "t": "answer"}, FACTS, ITEMS])
def test_no_field_may_be_missing_or_of_another_type(message: dict[str, Any]) -> None:
    decode_message(encode(message))
    for name in message:
        rest = {key: value for key, value in message.items() if key != name}
        others: list[Any] = [None, -1, {}, [[]], "x" * 33]
        for wrong in (rest, *({**rest, name: other} for other in others)):
            with pytest.raises(PeerError):
                decode_message(encode(wrong))


@pytest.mark.parametrize(
    "fields",
    [
        {**FACTS, "s": [bytes(STATEMENT_BYTES_MAX + 1)]},
        {**FACTS, "r": [bytes(RECORD_BYTES_MAX + 1)]},
        {**FACTS, "c": [bytes(CERTIFICATE_BYTES_MAX + 1)]},
        {**FACTS, "f": [bytes(FORK_BYTES_MAX + 1)]},
        {**FACTS, "r": [b""] * (PIECES_MAX + 1)},
        {**SIGN, "f": bytes(17)},
        {**SIGN, "p": bytes(15)},
        {**SIGN, "r": [ID] * (RECENT_MAX + 1)},
        {**SIGN, "k": 1},
        {**SIGN, "n": True},
        {"t": "ask", "s": b"x", "n": 1},
        {"t": "told", "s": ID, "n": 1, "a": None},
        {"t": "ranges", "r": [[b"", b"", 1, ID]] * (RANGES_MAX + 1)},
        {"t": "ranges", "r": [[b"", b"", True, ID]]},
        {"t": "ranges", "r": [[b"", b"", 1, b""]]},
        {"t": "ranges", "r": [[b"", b"", 1]]},
        {"t": "ranges", "r": [[b"b", b"a", 1, ID]]},
        {"t": "ranges", "r": [[b"a", b"a", 1, ID]]},
        {"t": "ranges", "r": [[bytes(17), b"", 1, ID]]},
        {**ITEMS, "l": bytes(17)},
        {**ITEMS, "l": b"b", "u": b"a"},
        {**ITEMS, "i": [ID] * (IDS_MAX + 1)},
        {**ITEMS, "i": [b"short"]},
        {"t": "want", "i": [ID] * (WANT_MAX + 1)},
        {"t": "want"},
        {"t": 7},
        {"t": "x" * 33},
        {},
    ],
)
def test_a_message_out_of_bounds_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(PeerError):
        decode_message(encode(fields))


def test_the_fullest_messages_fit_the_link() -> None:
    top = 2**64 - 1
    full: list[Message] = [
        *in_chunks(Push(records=(bytes(RECORDS_BYTES_MAX // PIECES_MAX),) * PIECES_MAX)),
        *in_chunks(
            Push(certificates=(bytes(CERTIFICATE_BYTES_MAX),), forks=(bytes(FORK_BYTES_MAX),))
        ),
        Ranges(ranges=(Range(lower=ID, upper=ID[1:], count=top, fingerprint=ID),) * RANGES_MAX),
        Items(lower=ID, upper=ID[1:], ids=(ID,) * IDS_MAX, answer=True),
        FetchRequest(ids=(ID,) * WANT_MAX),
    ]
    assert len(full) == 5
    for message in full:
        assert decode_message(encode_message(message)) == message
        assert len(encode_message(message)) <= MESSAGE_BYTES_MAX // 1.9


pieces = st.lists(st.integers(1, 16_000), max_size=40).map(lambda sizes: [bytes(n) for n in sizes])


@given(pieces, pieces, pieces, pieces, st.sampled_from([CHUNK_BYTES_MAX, RECORDS_BYTES_MAX]))
def test_facts_are_packed_in_order_and_within_the_bound(
    statements: list[bytes],
    records: list[bytes],
    certificates: list[bytes],
    forks: list[bytes],
    bound: int,
) -> None:
    asked = bound == CHUNK_BYTES_MAX
    pieces = {
        "statements": statements,
        "records": records,
        "certificates": certificates,
        "forks": forks,
    }
    facts = Push(**{name: tuple(some) for name, some in pieces.items()}, asked=asked)
    packed = list(in_chunks(facts))
    for kind in FACT_KINDS.values():
        assert [raw for message in packed for raw in message.of(kind)] == pieces[kind.name]
    sizes = [sum(map(len, m.statements + m.records + m.certificates + m.forks)) for m in packed]
    assert all(size <= bound for size in sizes)
    assert all(sizes) or (asked and sizes == [0])
    assert all(message.asked is asked for message in packed)


def test_who_asked_gets_an_answer_even_when_there_is_nothing() -> None:
    assert list(in_chunks(Push(asked=True))) == [Push(asked=True)]
    assert list(in_chunks(Push())) == []


def test_what_is_larger_than_a_chunk_goes_alone() -> None:
    large = bytes(CHUNK_BYTES_MAX + 1)
    facts = Push(records=(b"a",), certificates=(large,), forks=(b"b",), asked=True)
    assert list(in_chunks(facts)) == [
        Push(records=(b"a",), asked=True),
        Push(certificates=(large,), asked=True),
        Push(forks=(b"b",), asked=True),
    ]
    many = Push(records=(b"x",) * (PIECES_MAX + 1))
    assert [len(m.records) for m in in_chunks(many)] == [PIECES_MAX, 1]

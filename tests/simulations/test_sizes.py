from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import (
    RECENT_MAX,
    Answer,
    Ask,
    Facts,
    Items,
    Message,
    Own,
    Probe,
    Range,
    Ranges,
    Told,
    Want,
    encode_message,
)
from simulations import sizes
from simulations.schedule import ViolationError
from simulations.sizes import Scale, check_codec, size_of

NUMBERS = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))
IDS = st.binary(min_size=16, max_size=16)
BOUND = st.binary(max_size=16)
PIECES = st.lists(st.one_of(st.binary(max_size=300), st.just(bytes(70_000))), max_size=20).map(
    tuple
)
SIGN = {
    "token": NUMBERS,
    "at_ms": NUMBERS,
    "cutoff": NUMBERS,
    "fingerprint": IDS,
    "plan": IDS,
    "keep": st.booleans(),
    "recent": st.lists(IDS, max_size=RECENT_MAX).map(tuple),
}
RANGE = st.builds(Range, lower=BOUND, upper=BOUND, count=NUMBERS, fingerprint=IDS)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Probe, **SIGN),
    st.builds(Answer, **SIGN),
    st.builds(Facts, records=PIECES, certificates=PIECES, forks=PIECES, asked=st.booleans()),
    st.builds(Ranges, ranges=st.lists(RANGE, max_size=20).map(tuple)),
    st.builds(
        Items,
        lower=BOUND,
        upper=BOUND,
        ids=st.lists(IDS, max_size=40).map(tuple),
        answer=st.booleans(),
    ),
    st.builds(Want, ids=st.lists(IDS, max_size=40).map(tuple)),
    st.builds(Ask, subject=IDS.map(NodeId), token=NUMBERS),
    st.builds(Told, subject=IDS.map(NodeId), token=NUMBERS, alive=st.booleans()),
    st.just(Own()),
)


@given(MESSAGES)
def test_the_size_is_that_of_the_bytes(message: Message) -> None:
    assert size_of(message) == len(encode_message(message))


def test_some_messages_go_through_the_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Message] = []
    monkeypatch.setattr(sizes, "check_codec", seen.append)
    scale = Scale(Random(1))
    for _ in range(2000):
        assert scale.size(Own()) == len(encode_message(Own()))
    assert 5 < len(seen) < 50
    assert scale.size(b"junk") == 4


def test_what_does_not_come_back_as_it_was_is_a_violation() -> None:
    check_codec(Want(ids=(bytes(16),)))
    with pytest.raises(ViolationError, match="does not survive"):
        check_codec(Want(ids=[bytes(16)]))  # type: ignore[arg-type]

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.wire.messages import FetchRequest, Message, Own, encode_message
from simulations import sizes
from simulations.schedule import ViolationError
from simulations.sizes import Scale, check_codec, size_of
from tests.wire.strategies import NUMBERS, PAIRS, many, messages

PIECES = many(st.one_of(st.binary(max_size=300), st.just(bytes(70_000))), 20)
MESSAGES = messages(numbers=st.integers(0, 300) | NUMBERS, pieces=PIECES, bounds=PAIRS)


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
    check_codec(FetchRequest(ids=(bytes(16),)))
    with pytest.raises(ViolationError, match="does not survive"):
        check_codec(FetchRequest(ids=[bytes(16)]))  # type: ignore[arg-type]

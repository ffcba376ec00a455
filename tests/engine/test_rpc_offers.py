"""Frames of a head before they travel, and the frames of offers."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.engine.rpc_builds import Command
from p2pmesh.engine.rpc_offers import (
    SMALL_BYTES,
    AnswerReader,
    HeadFrames,
    HeadPiece,
    OfferAnswer,
    TensorHead,
    tensor_head,
)
from p2pmesh.errors import PeerError
from tests.engine.rpc_frames import (
    BUILD,
    answer,
    chunks,
    number,
    offer,
    payload_of,
    request,
    session,
    set_tensor,
    tensor,
)

QUESTION = request(Command.SET_TENSOR_HASH, payload_of(Command.SET_TENSOR_HASH))


def joined(pieces: Iterable[HeadPiece]) -> bytes:
    """The bytes that the pieces stand for."""
    out = bytearray()
    for piece in pieces:
        match piece:
            case TensorHead():
                out += piece.frame()
            case Command():
                out += QUESTION
            case _:
                out += piece
    return bytes(out)


@given(st.lists(st.integers(0, 1 << 18), max_size=8), st.sampled_from([0, 1, SMALL_BYTES, 99_999]))
def test_chunks_never_matter(cuts: list[int], size: int) -> None:
    names: list[str] = []
    frames = HeadFrames(BUILD, names.append)
    data = bytes(range(251)) * (size // 251 + 1)
    said = b"".join(frame for frame, _ in session()) + set_tensor(data[:size]) + request(3)
    pieces = [piece for chunk in chunks(said, cuts) for piece in frames.feed(chunk)]
    assert joined(pieces) == said
    heads = [piece for piece in pieces if isinstance(piece, TensorHead)]
    assert [(head.name, head.offset, head.size) for head in heads] == (
        [("t", 0, size)] if size >= SMALL_BYTES else []
    )
    assert pieces.count(Command.SET_TENSOR_HASH) == 1
    assert names[-1] == "t", "small ones are named too"


def test_small_frames_come_out_whole() -> None:
    """llama.cpp writes command, length and payload one by one."""
    frame, frames = set_tensor(b"activations"), HeadFrames(BUILD)
    pieces = [frames.feed(piece) for piece in (frame[:1], frame[1:9], frame[9:])]
    assert pieces == [[], [], [frame]]


def test_large_frames_come_out_as_they_come() -> None:
    frames, data = HeadFrames(BUILD), bytes(SMALL_BYTES)
    frame = request(Command.GRAPH_COMPUTE, data + b"x")
    assert frames.feed(frame[:9]) == [frame[:9]]
    [piece] = frames.feed(data)
    assert isinstance(piece, memoryview)
    assert piece.obj is data
    assert frames.feed(b"x") == [b"x"]


def test_an_offer_is_a_set_tensor_with_a_digest_in_place_of_the_data() -> None:
    place = tensor(name=b"blk.0.ffn_up.weight") + b"\x01" + number(0)
    head = tensor_head(BUILD, place, 70_000)
    assert head.name == "blk.0.ffn_up.weight"
    assert head.frame() + bytes(70_000) == request(Command.SET_TENSOR, place + bytes(70_000))
    made = head.offer(bytes(range(32)))
    assert made == offer(70_000, bytes(range(32)), description=tensor(name=head.name.encode()))
    assert len(made) == 9 + 296 + 1 + 8 + 8 + 32
    assert made[:9] == b"\xf0" + number(345)


@pytest.mark.parametrize("said", OfferAnswer)
def test_an_answer_may_come_in_pieces(said: OfferAnswer) -> None:
    reader = AnswerReader()
    assert said.frame() == answer(bytes((said,)))
    assert [reader.feed(bytes((byte,))) for byte in said.frame()] == [None] * 8 + [said]


@pytest.mark.parametrize(
    "said",
    [answer(b"\x03"), answer(b"\x01") + b"\0", answer(bytes(2)), answer(b"") + b"\1", bytes(9)],
)
def test_another_answer_is_refused(said: bytes) -> None:
    with pytest.raises(PeerError, match="answer to an offer is invalid"):
        AnswerReader().feed(said)

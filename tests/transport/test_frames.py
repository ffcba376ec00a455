from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.transport.frames import CONTROL_BURST, CONTROL_PER_S, Frames

SHAKEN = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
PING, PONG, CLOSE = b"\x89\x00", b"\x8a\x80abcd", b"\x88\x02\x03\xe8"
PIECE, MORE = b"\x02\x01x", b"\x80\x01y"


def message(size: int, *, masked: bool = False) -> bytes:
    """A frame that holds a whole message, full of what might be taken for pings."""
    mask = 0x80 if masked else 0
    if size < 126:
        head = bytes([0x82, mask | size])
    elif size < 65536:
        head = bytes([0x82, mask | 126]) + size.to_bytes(2)
    else:
        head = bytes([0x82, mask | 127]) + size.to_bytes(8)
    return head + (b"abcd" if masked else b"") + (PING * (size // 2 + 1))[:size]


def read(data: bytes, *, step: int = 4096) -> int:
    frames = Frames()
    return sum(frames.read(data[start : start + step], 0.0) for start in range(0, len(data), step))


MESSAGES = st.lists(
    st.tuples(st.sampled_from([0, 1, 125, 126, 127, 500, 65535, 65536]), st.booleans()),
    max_size=5,
)


@given(MESSAGES, st.integers(1, 5000))
def test_whole_messages_pass_however_they_are_cut(
    messages: list[tuple[int, bool]], step: int
) -> None:
    said = b"".join(message(size, masked=masked) for size, masked in messages)
    assert read(SHAKEN + said + CLOSE, step=step) == len(messages)
    with pytest.raises(PeerError, match="in pieces"):
        read(SHAKEN + said + PIECE, step=step)


@pytest.mark.parametrize("frames", [PIECE + MORE, MORE, b"\x02\x00", b"\x01\x01x"])
def test_a_message_in_pieces_is_a_breach(frames: bytes) -> None:
    with pytest.raises(PeerError, match="in pieces"):
        read(SHAKEN + frames)


@pytest.mark.parametrize("control", [PING, PONG])
def test_some_pings_are_borne_and_a_flood_is_a_breach(control: bytes) -> None:
    read(SHAKEN + CONTROL_BURST * control)
    with pytest.raises(PeerError, match="more pings"):
        read(SHAKEN + (CONTROL_BURST + 1) * control)


def test_pings_at_their_rate_go_on_for_ever() -> None:
    frames = Frames()
    frames.read(SHAKEN, 0.0)
    for number in range(1000):
        assert frames.read(PING, number / CONTROL_PER_S) == 0


@pytest.mark.parametrize("step", [1, 2, 3, 5, 1000])
def test_nothing_of_the_handshake_is_taken_for_a_frame(step: int) -> None:
    read(b"GET /gossip HTTP/1.1\r\nX: " + PIECE + 100 * PING, step=step)
    with pytest.raises(PeerError, match="in pieces"):
        read(b"GET / HTTP/1.1\r\n\r\n" + PIECE, step=step)

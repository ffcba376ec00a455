"""The websocket frames of a link, looked at before the library sees them. Pure.

The library answers each ping and gathers pieces without end, both at a hundred times the price of
sending them. No node of ours sends either: a message is one frame, and probes say who is alive.
"""

from __future__ import annotations

from p2pmesh.errors import PeerError
from p2pmesh.transport.pace import Pace

# Pings and pongs. Whatever stands between two nodes may keep a connection alive with some.
CONTROL_PER_S, CONTROL_BURST = 1.0, 16

_END_OF_HANDSHAKE = b"\r\n\r\n"
_CONTINUATION, _CONTROL, _CLOSE = 0x0, 0x8, 0x8
_LENGTH_BYTES = {126: 2, 127: 8}  # of the length that follows a first length of that value
_MASK_BYTES = 4


class Frames:
    """The receiving side of a link, from the first byte of its handshake on."""

    def __init__(self) -> None:
        self._shaken = False
        self._head = bytearray()
        self._payload_left = 0
        self._controls = Pace(CONTROL_PER_S, CONTROL_BURST)

    def read(self, data: bytes | bytearray, now: float) -> int:
        """Follow the frames in the bytes that came next; returns how many messages begin there.

        Args:
            data: Some of them, cut anywhere.
            now: In seconds.

        Raises:
            PeerError: A message comes in pieces, or too many pings or pongs come.
        """
        if not self._shaken:
            self._head += data
            handshake, end, data = self._head.partition(_END_OF_HANDSHAKE)
            self._shaken = bool(end)
            self._head = bytearray() if end else handshake[1 - len(_END_OF_HANDSHAKE) :]
        at = begun = 0
        while at < len(data):
            if self._payload_left:
                step = min(self._payload_left, len(data) - at)
                self._payload_left -= step
                at += step
                continue
            self._head.append(data[at])
            at += 1
            if len(self._head) == self._head_bytes():
                begun += self._begin(now)
        return begun

    def _head_bytes(self) -> int:
        """How long the head of the next frame is, as far as its first two bytes tell."""
        if len(self._head) < 2:
            return 2
        masked, length = self._head[1] & 0x80, self._head[1] & 0x7F
        return 2 + _LENGTH_BYTES.get(length, 0) + (_MASK_BYTES if masked else 0)

    def _begin(self, now: float) -> bool:
        """A frame's head is complete; returns whether the frame is a message."""
        final, opcode = self._head[0] & 0x80, self._head[0] & 0x0F
        length = self._head[1] & 0x7F
        if length in _LENGTH_BYTES:
            length = int.from_bytes(self._head[2 : 2 + _LENGTH_BYTES[length]])
        self._payload_left = length
        self._head.clear()
        if opcode & _CONTROL:
            if opcode != _CLOSE and self._controls.take(now) > now:
                raise PeerError("more pings than any link needs")
        elif opcode == _CONTINUATION or not final:
            raise PeerError("a message in pieces")
        return not opcode & _CONTROL

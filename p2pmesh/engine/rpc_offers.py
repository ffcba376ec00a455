"""Offers: weights that a stage may have on its own disk, named instead of sent.

Pure: bytes in, values out. Most of what a head sends while it loads are tensors of a file that the
stage may have too. For those the head's end sends an offer in place of SET_TENSOR, and waits for
its answer before it sends anything more:

    head -> stage     0xF0, length (8 bytes), SET_TENSOR's payload without the data,
                      size of the data (8 bytes), SHA-256 of the data (32 bytes)
    stage -> head     length 1 (8 bytes), 0: send them, 1: the stage has these bytes,
                      2: send them, the stage has no file of this model

An offer stands for a SET_TENSOR, which the stage's end writes itself after an answer of 1, and the
head sends after any other; after 2 it offers nothing more on this connection. SHA-256 because a
member that makes two tensors of equal digest could have a pipeline compute with other weights than
its head has, and because CPUs compute it faster than any other digest of that strength.

No engine sees an offer. An engine owes no answer at that time, so the answers need no mark.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from p2pmesh.engine.rpc_builds import (
    FLAG_AND_OFFSET_BYTES,
    NUMBER,
    REQUEST,
    Command,
    RpcBuild,
    request_bytes,
)
from p2pmesh.errors import PeerError

SMALL_BYTES = 64 * 1024  # the activations of some tokens; weights that take time are larger
PROOF = struct.Struct("<Q32s")  # size and SHA-256 of the data
NOT_CACHED = NUMBER.pack(1) + b"\0"  # the answer to SET_TENSOR_HASH


class OfferAnswer(IntEnum):
    """What a stage says to an offer."""

    SEND = 0
    HAVE = 1
    NO_FILE = 2

    def frame(self) -> bytes:
        """Return the frame that says it."""
        return NUMBER.pack(1) + bytes((self,))


_ANSWERS = {answer.frame(): answer for answer in OfferAnswer}
_ANSWER_BYTES = NUMBER.size + 1


class TensorHead(NamedTuple):
    """A SET_TENSOR without its data.

    Attributes:
        place: The tensor's description (the build's `tensor_bytes`), cache flag and offset.
        name: The tensor's; what is not UTF-8 is replaced.
        offset: Where in the tensor the data begins, in bytes.
        size: Of the data, in bytes.
    """

    place: bytes
    name: str
    offset: int
    size: int

    def frame(self) -> bytes:
        """Return the beginning of the SET_TENSOR frame, which the data follows."""
        return REQUEST.pack(Command.SET_TENSOR, len(self.place) + self.size) + self.place

    def offer(self, digest: bytes) -> bytes:
        """Return the frame that offers the data by its SHA-256."""
        proof = PROOF.pack(self.size, digest)
        return REQUEST.pack(Command.OFFER, len(self.place) + len(proof)) + self.place + proof


class Offer(NamedTuple):
    """An offer that a stage has to answer."""

    tensor: TensorHead
    digest: bytes


def tensor_head(build: RpcBuild, place: bytes, size: int) -> TensorHead:
    """Return what the beginning of a SET_TENSOR payload says, with `size` bytes of data."""
    name = place[build.tensor_name].partition(b"\0")[0].decode("utf-8", "replace")
    (offset,) = NUMBER.unpack_from(place, build.tensor_bytes + 1)
    return TensorHead(place, name, offset, size)


class AnswerReader:
    """Reads the answer to one offer, which may come in pieces."""

    def __init__(self) -> None:
        self._kept = b""

    def feed(self, data: bytes | bytearray) -> OfferAnswer | None:
        """Return the answer; None while it is not complete.

        Raises:
            PeerError: This is no answer to an offer.
        """
        self._kept += data
        if len(self._kept) < _ANSWER_BYTES:
            return None
        if self._kept not in _ANSWERS:
            raise PeerError("the stage's answer to an offer is invalid")
        return _ANSWERS[self._kept]


HeadPiece: TypeAlias = TensorHead | Command | bytes | memoryview
"""A piece of what a head's engine says: see `HeadFrames.feed`."""


class HeadFrames:
    """The frames of a head's engine before they travel; nothing is checked.

    llama.cpp hands a frame to the system in two or three pieces. Small frames come out whole, as
    each piece would cost a record of TLS and two wake-ups; large ones come out as they come in.
    """

    def __init__(self, build: RpcBuild, seen: Callable[[str], None] = lambda _: None) -> None:
        """Nothing was said yet.

        Args:
            build: How the engine talks.
            seen: Told the name of each tensor that is set.
        """
        self._build = build
        self._seen = seen
        self._head_bytes = build.tensor_bytes + FLAG_AND_OFFSET_BYTES
        self._question_bytes = request_bytes(build)[Command.SET_TENSOR_HASH]
        self._kept = bytearray()
        self._left = 0  # of the payload of a large frame

    def feed(self, data: bytes | bytearray) -> list[HeadPiece]:
        """Return the pieces that are complete now that the engine said this.

        A `TensorHead` stands for the beginning of a large SET_TENSOR, whose data follows in
        `memoryview` pieces of `data`; `Command.SET_TENSOR_HASH` for that whole frame. The rest is
        to be passed on.
        """
        pieces: list[HeadPiece] = []
        view = memoryview(data)
        while view:
            if self._left:
                taken = view[: self._left]
                self._left -= len(taken)
                pieces.append(taken)
            else:
                taken = view[: self._beginning() - len(self._kept)]
                self._kept += taken
                if len(self._kept) == self._beginning():
                    pieces.append(self._begun())
            view = view[len(taken) :]
        return pieces

    def _beginning(self) -> int:
        """Return how many bytes of the frame are kept until they go on together."""
        if len(self._kept) < REQUEST.size:
            return REQUEST.size
        command, length = REQUEST.unpack_from(self._kept)
        if length <= SMALL_BYTES:
            return REQUEST.size + int(length)
        return REQUEST.size + (self._head_bytes if command == Command.SET_TENSOR else 0)

    def _begun(self) -> HeadPiece:
        kept = bytes(self._kept)
        self._kept.clear()
        command, length = REQUEST.unpack_from(kept)
        self._left = length - (len(kept) - REQUEST.size)
        if command == Command.SET_TENSOR and length >= self._head_bytes:
            place = kept[REQUEST.size : REQUEST.size + self._head_bytes]
            head = tensor_head(self._build, place, length - self._head_bytes)
            self._seen(head.name)
            return head if self._left else kept
        if command == Command.SET_TENSOR_HASH and length == self._question_bytes:
            return Command.SET_TENSOR_HASH
        return kept

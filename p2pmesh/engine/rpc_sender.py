"""The head's side of offers: what its engine says, with weights that may stay where they are.

While a tensor comes from the engine, it is compared with the file that the engine has it from, and
nothing is passed on. A tensor that equals the file's is offered, and goes on from the file if the
stage does not have it. A tensor that differs goes on as it comes, behind what was equal so far.

The engine does not wait for an offer's answer: the stage hashes one tensor while the next is
compared. Invariant: at most one offer is open, and nothing is sent while it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from p2pmesh.engine.rpc_builds import Command, RpcBuild
from p2pmesh.engine.rpc_offers import (
    NOT_CACHED,
    SMALL_BYTES,
    AnswerReader,
    HeadFrames,
    OfferAnswer,
    TensorHead,
)
from p2pmesh.engine.rpc_weights import Place, TensorReader, Weights
from p2pmesh.errors import LocalError, ModelError

Bytes = bytes | bytearray | memoryview
Send = Callable[[Bytes], Awaitable[None]]


@dataclass(slots=True)
class _Tensor:
    """A tensor that the head's file has too, as far as was compared."""

    head: TensorHead
    place: Place
    reader: TensorReader


@dataclass(slots=True)
class _OpenOffer:
    """An offer without an answer yet."""

    tensor: _Tensor
    reader: AnswerReader
    answered: trio.Event
    answer: OfferAnswer = OfferAnswer.SEND


class WeightsSender:
    """One connection of a head's engine to a stage."""

    def __init__(
        self,
        build: RpcBuild,
        weights: Weights,
        *,
        send: Send,
        reply: Send,
        seen: Callable[[str], None],
        spared: Callable[[int], None],
    ) -> None:
        """Nothing was said yet.

        Args:
            build: How both sides talk.
            weights: Of the model that the engine loads.
            send: Sends to the stage.
            reply: Answers the engine.
            seen: Told the name of each tensor that the stage gets.
            spared: Told the bytes of each tensor that the stage takes from its own file.
        """
        self._weights, self._send, self._reply = weights, send, reply
        self._spared = spared
        self._frames = HeadFrames(build, seen)
        self._tensor: _Tensor | None = None  # is being compared
        self._offer: _OpenOffer | None = None
        self._may_offer = True
        self._out: list[Bytes] = []

    async def from_engine(self, data: bytes | bytearray) -> None:
        """Send what the stage is to get, now that the head's engine said this.

        Raises:
            LocalError: The file cannot be read any more.
            ModelError: The file changed while it was sent.
        """
        for piece in self._frames.feed(data):
            match piece:
                case TensorHead():
                    await self._begin(piece)
                case Command():
                    # No stage keeps a cache, so that the question need not travel.
                    await self._reply(NOT_CACHED)
                case memoryview() if self._tensor is not None:
                    await self._compare(self._tensor, piece)
                case _:
                    self._out.append(piece)
        await self._flush()

    def from_stage(self, data: bytes | bytearray) -> bytes | bytearray:
        """Return what the head's engine is to get, now that the stage said this.

        Raises:
            PeerError: The stage did not answer an offer as it must.
        """
        offer = self._offer
        if offer is None or offer.answered.is_set():
            return data
        answer = offer.reader.feed(data)
        if answer is not None:
            self._may_offer = answer is not OfferAnswer.NO_FILE
            offer.answer = answer
            offer.answered.set()
        return b""

    async def _begin(self, head: TensorHead) -> None:
        place = None
        if self._may_offer and head.offset == 0 and head.size >= SMALL_BYTES:
            place = await self._weights.find(head.name, head.size)
        if place is None:
            self._out.append(head.frame())
        else:
            self._tensor = _Tensor(head, place, TensorReader(place))

    async def _compare(self, tensor: _Tensor, data: memoryview) -> None:
        if not (self._may_offer and await _equals(tensor.reader, data)):
            self._tensor = None
            await self._send_own(tensor)
            self._out.append(data)
        elif not tensor.reader.left:
            self._tensor = None
            await self._finish(tensor)

    async def _finish(self, tensor: _Tensor) -> None:
        """Offer a tensor that equals the file's."""
        await self._flush()
        await self._settle()
        if self._may_offer:
            self._offer = _OpenOffer(tensor, AnswerReader(), trio.Event())
            await self._send(tensor.head.offer(tensor.reader.digest()))
        else:
            await self._send_own(tensor)

    async def _flush(self) -> None:
        out, self._out = self._out, []
        if out:
            await self._settle()
            await self._send(out[0] if len(out) == 1 else b"".join(out))

    async def _settle(self) -> None:
        """Wait for the answer to the open offer, and do what it asks for."""
        if self._offer is None:
            return
        offer = self._offer
        await offer.answered.wait()
        self._offer = None
        if offer.answer is OfferAnswer.HAVE:
            self._spared(offer.tensor.head.size)
        else:
            await self._send_own(offer.tensor)

    async def _send_own(self, tensor: _Tensor) -> None:
        """Send a tensor from the file, up to where it was compared."""
        self._out.append(tensor.head.frame())
        await self._flush()
        reader = TensorReader(tensor.place)
        while left := tensor.reader.at - reader.at:
            await self._send(await reader.read(left))
        if reader.digest() != tensor.reader.digest():
            raise ModelError(f"{tensor.place.path} changed while its model was loaded")


async def _equals(reader: TensorReader, data: memoryview) -> bool:
    try:
        return await reader.equals(data)
    except LocalError:
        if reader.at:
            raise  # what was equal so far is in the file only
        return False

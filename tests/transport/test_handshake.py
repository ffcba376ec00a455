"""The hello on a byte stream: every way of arriving, and every way of not arriving."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MemoryReceiveStream, MemorySendStream, MockClock, memory_stream_pair

from p2pmesh.errors import LinkError, PeerError
from p2pmesh.identity.hello import (
    ANYBODY,
    GOSSIP,
    HELLO_BYTES_MAX,
    HTTP,
    ClientHello,
    Peer,
    RefusedError,
    refusal,
)
from p2pmesh.identity.keys import MeshId, NodeId
from p2pmesh.transport.handshake import client_handshake, server_handshake
from p2pmesh.wire.codec import encode
from tests.transport.networks import someone

ANNA, BERT = someone(1), someone(2)
CERTIFICATE = b"certificate"
NOW = 1_800_000_000.0

Stream = trio.StapledStream[MemorySendStream, MemoryReceiveStream]
Side = Callable[[trio.abc.Stream], Awaitable[Peer]]


def frame(message: bytes) -> bytes:
    return struct.pack(">I", len(message)) + message


async def read_frame(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    while len(data) < 4 or len(data) < 4 + struct.unpack(">I", data[:4])[0]:
        data += await stream.receive_some(1)
    return data[4:]


async def anna(stream: trio.abc.Stream) -> Peer:
    return await client_handshake(
        stream,
        ANNA,
        certificate=CERTIFICATE,
        purpose=HTTP,
        expected=NodeId(BERT.key.id),
        now=NOW,
    )


async def bert(stream: trio.abc.Stream) -> Peer:
    return await server_handshake(
        stream,
        BERT,
        purposes={GOSSIP: ANYBODY, HTTP: ANYBODY},
        certificate=CERTIFICATE,
        now=NOW + 90,
    )


class Conversation:
    """Anna and Bert with somebody between them; what became of each."""

    def __init__(self) -> None:
        self.near, near_far = memory_stream_pair()
        far_near, self.far = memory_stream_pair()
        self.between = (near_far, far_near)
        self.passed = {"anna": 0, "bert": 0}
        self.outcomes: dict[str, Peer | LinkError | PeerError] = {}

    async def run(self, *, size: int, calls: int | None = None, answers: int | None = None) -> None:
        """Let both talk.

        Args:
            size: Bytes in a piece.
            calls: How many of Anna's bytes arrive; None for all.
            answers: How many of Bert's bytes arrive; None for all.
        """
        near, far = self.between
        with trio.fail_after(60):
            async with trio.open_nursery() as passing:
                passing.start_soon(self._pass_on, "anna", near, far, size, calls)
                passing.start_soon(self._pass_on, "bert", far, near, size, answers)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._take_part, "anna", anna, self.near)
                    nursery.start_soon(self._take_part, "bert", bert, self.far)
                passing.cancel_scope.cancel()

    async def _take_part(self, name: str, side: Side, stream: Stream) -> None:
        try:
            self.outcomes[name] = await side(stream)
        except (LinkError, PeerError) as exc:
            self.outcomes[name] = exc
            await trio.aclose_forcefully(stream)

    async def _pass_on(
        self, name: str, source: Stream, sink: Stream, size: int, limit: int | None
    ) -> None:
        """Pass bytes on in pieces, at most `limit` of them, then hang up on both sides."""
        try:
            while limit is None or self.passed[name] < limit:
                left = size if limit is None else min(size, limit - self.passed[name])
                data = await source.receive_some(left)
                if not data:
                    break
                await sink.send_all(data)
                self.passed[name] += len(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await trio.aclose_forcefully(source)
        await trio.aclose_forcefully(sink)


@pytest.mark.parametrize("size", [1, 3, 65536])
async def test_a_hello_may_arrive_in_any_pieces(size: int, autojump_clock: MockClock) -> None:
    conversation = Conversation()
    await conversation.run(size=size)
    answered, caller = conversation.outcomes["anna"], conversation.outcomes["bert"]
    assert isinstance(answered, Peer)
    assert isinstance(caller, Peer)
    assert (answered.node, caller.node) == (BERT.key.id, ANNA.key.id)
    assert (answered.purpose, caller.purpose) == (HTTP, HTTP)
    assert (answered.clock_ahead_s, caller.clock_ahead_s) == (90, -90)


async def test_what_follows_the_hello_is_left_for_the_next_protocol(
    autojump_clock: MockClock,
) -> None:
    near, far = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bert, far)
        await anna(near)
        await near.send_all(b"next")
    assert await far.receive_some(100) == b"next"

    near, far = memory_stream_pair()

    async def answer_and_go_on() -> None:
        await bert(far)
        await far.send_all(b"next")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_and_go_on)
        await anna(near)
        assert await near.receive_some(100) == b"next"


async def test_a_hang_up_at_any_byte_is_a_broken_link(autojump_clock: MockClock) -> None:
    whole = Conversation()
    await whole.run(size=65536)
    sent = whole.passed
    assert min(sent.values()) > 100

    for calls in range(sent["anna"]):
        cut = Conversation()
        await cut.run(size=65536, calls=calls)
        assert isinstance(cut.outcomes["anna"], LinkError)
        assert isinstance(cut.outcomes["bert"], LinkError)
    for answers in range(sent["bert"]):
        cut = Conversation()
        await cut.run(size=65536, answers=answers)
        # Bert is done once Anna proved herself, whether his last word reaches her or not.
        assert isinstance(cut.outcomes["anna"], LinkError)
        assert isinstance(cut.outcomes["bert"], LinkError | Peer)


@pytest.mark.parametrize("size", [HELLO_BYTES_MAX + 1, 2**32 - 1])
async def test_too_long_a_hello_is_refused_before_it_is_read(
    size: int, autojump_clock: MockClock
) -> None:
    for side in (anna, bert):
        near, far = memory_stream_pair()
        with trio.fail_after(1):
            await far.send_all(struct.pack(">I", size))
            with pytest.raises(PeerError, match="what came is no hello"):
                await side(near)


async def test_the_longest_hello_is_read(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    await near.send_all(frame(bytes(HELLO_BYTES_MAX)))
    with pytest.raises(PeerError) as caught:
        await bert(far)
    assert str(caught.value) != "what came is no hello"


@pytest.mark.parametrize("junk", [b"", b"junk", b"\xc0", bytes(300)])
async def test_junk_in_a_frame_is_answered_with_the_reason(
    junk: bytes, autojump_clock: MockClock
) -> None:
    near, far = memory_stream_pair()
    await near.send_all(frame(junk))
    with pytest.raises(PeerError) as caught:
        await bert(far)
    assert await read_frame(near) == refusal(caught.value)


async def test_a_caller_who_cannot_prove_itself_is_told(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    borrowed = ClientHello(
        ANNA, purpose="gossip", expected=None, certificate=CERTIFICATE, nonce=bytes(32), now=0
    )

    async def impostor() -> None:
        await near.send_all(frame(borrowed.start()))
        await read_frame(near)
        await near.send_all(frame(encode({"s": bytes(64)})))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(impostor)
        with pytest.raises(PeerError, match="did not prove its identity") as caught:
            await bert(far)
    assert await read_frame(near) == refusal(caught.value)


async def test_a_man_in_the_middle_is_hung_up_on(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()

    async def relayed() -> None:
        with pytest.raises(LinkError, match="hung up"):
            await server_handshake(
                far,
                BERT,
                purposes={HTTP: ANYBODY},
                certificate=b"that of the man in the middle",
                now=NOW,
            )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(relayed)
        with pytest.raises(PeerError, match="did not prove its identity"):
            await anna(near)
        await near.aclose()


async def test_a_refusal_reaches_the_caller_in_words(autojump_clock: MockClock) -> None:
    stranger = someone(3, mesh=MeshId(b"n" * 16))
    near, far = memory_stream_pair()

    async def refuse() -> None:
        with pytest.raises(RefusedError, match="this node belongs to another mesh"):
            await bert(far)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refuse)
        with pytest.raises(RefusedError, match="this node belongs to another mesh"):
            await client_handshake(
                near,
                stranger,
                certificate=CERTIFICATE,
                purpose="gossip",
                expected=None,
                now=NOW,
            )


async def test_a_refused_caller_who_is_gone_is_a_broken_link(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    await near.send_all(frame(b"junk"))
    await near.aclose()
    with pytest.raises(LinkError, match="the connection broke during the hello"):
        await bert(far)

"""Websocket channels against peers that proved who they are and then misbehave."""

from __future__ import annotations

import pytest
import trio
import trio.testing
import trio_websocket
from trio.testing import MockClock, memory_stream_pair

from p2pmesh.config import Address
from p2pmesh.errors import LinkError, MeshError, PeerError
from p2pmesh.identity.hello import Peer
from p2pmesh.identity.keys import NodeId
from p2pmesh.transport import channel as channel_module
from p2pmesh.transport.base import DIAL_TIMEOUT_S, SEND_TIMEOUT_S
from p2pmesh.transport.channel import (
    CLOSE_TIMEOUT_S,
    PATH,
    READ_BYTES_MAX,
    READS_PER_S,
    open_channel,
)
from p2pmesh.wire.messages import MESSAGE_BYTES_MAX
from tests.transport.networks import MESH

PEER = Peer(
    node=NodeId(b"p" * 16),
    public=b"k" * 32,
    instance=1,
    mesh=MESH,
    mesh_name="home",
    purpose="gossip",
    clock_ahead_s=0,
    version=1,
)
REMOTE = Address("192.168.1.5", 9338)
REQUEST = (
    f"GET {PATH} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
).encode()

# What kills a server that follows trio-websocket's example, or hypercorn.
JUNK_REQUESTS = {
    "nothing but noise": bytes(range(256)),
    "another protocol": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a byte too many": REQUEST + b"\r\nx",
    "a protocol that is no ASCII": REQUEST + b"Sec-WebSocket-Protocol: \xff\xfe\r\n\r\n",
    "an extension that is no ASCII": REQUEST + b"Sec-WebSocket-Extensions: \xff\xfe\r\n\r\n",
    "a connection that is no ASCII": REQUEST.replace(b": Upgrade", b": \xff") + b"\r\n",
    "a header without end": REQUEST + b"X-Long: " + b"x" * 200_000,
    "half a request": REQUEST,
    "nothing": b"",
}


async def serve(stream: trio.abc.Stream) -> None:
    """The accepting side: echoes what comes."""
    async with open_channel(stream, peer=PEER, remote=REMOTE, outgoing=False) as channel:
        while True:
            await channel.send(await channel.receive())


async def drain(stream: trio.abc.ReceiveStream) -> bytes:
    """Everything up to the end."""
    data = b""
    while chunk := await stream.receive_some(65536):
        data += chunk
    return data


def only_mesh_errors(exc: BaseException) -> bool:
    return isinstance(exc, MeshError)


@pytest.mark.parametrize("junk", JUNK_REQUESTS.values(), ids=JUNK_REQUESTS)
async def test_a_junk_handshake_ends_its_own_link_only(
    junk: bytes, autojump_clock: MockClock
) -> None:
    near, far = memory_stream_pair()

    async def misbehave() -> None:
        async with near:
            await near.send_all(junk)
            await near.send_eof()
            await drain(near)

    started = trio.current_time()
    with pytest.RaisesGroup(pytest.RaisesExc(check=only_mesh_errors), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(misbehave)
            await serve(far)
    assert trio.current_time() - started <= DIAL_TIMEOUT_S + CLOSE_TIMEOUT_S


@pytest.mark.parametrize(
    "junk",
    [
        bytes(range(256)),
        b"HTTP/1.1 200 OK\r\n\r\n",
        (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: \xff\xfe\r\nSec-WebSocket-Protocol: \xff\r\n\r\n"
        ),
        b"",
    ],
    ids=["noise", "no upgrade", "no ASCII", "nothing"],
)
async def test_a_junk_answer_ends_the_dialled_link_only(
    junk: bytes, autojump_clock: MockClock
) -> None:
    near, far = memory_stream_pair()

    async def misbehave() -> None:
        async with far:
            await far.receive_some(65536)
            await far.send_all(junk)
            await far.send_eof()
            await drain(far)

    started = trio.current_time()
    with pytest.RaisesGroup(pytest.RaisesExc(check=only_mesh_errors), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(misbehave)
            async with open_channel(near, peer=PEER, remote=REMOTE, outgoing=True):
                raise AssertionError("that was no handshake")
    assert trio.current_time() - started <= DIAL_TIMEOUT_S + CLOSE_TIMEOUT_S


async def test_a_peer_that_never_answers_the_handshake_is_given_up(
    autojump_clock: MockClock,
) -> None:
    for outgoing in (False, True):
        near, _far = memory_stream_pair()
        started = trio.current_time()
        with pytest.RaisesGroup(
            pytest.RaisesExc(LinkError, match="no answer in time"), flatten_subgroups=True
        ):
            async with open_channel(near, peer=PEER, remote=REMOTE, outgoing=outgoing):
                raise AssertionError("nobody answered")
        assert trio.current_time() - started == pytest.approx(DIAL_TIMEOUT_S)


async def test_a_text_message_breaks_the_protocol(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()

    async def write_prose() -> None:
        async with trio.open_nursery() as nursery:
            websocket = await trio_websocket.wrap_client_stream(
                nursery,
                near,  # type: ignore[arg-type]  # any trio stream does; it says sockets only
                "x",
                PATH,
            )
            await websocket.send_message("words")
            with pytest.raises(trio_websocket.ConnectionClosed):
                await websocket.get_message()

    with pytest.RaisesGroup(
        pytest.RaisesExc(PeerError, match="a text message on a gossip link"),
        flatten_subgroups=True,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_prose)
            await serve(far)


async def shake(stream: trio.abc.Stream) -> None:
    """The caller's half of the websocket handshake, by hand."""
    await stream.send_all(REQUEST + b"\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += await stream.receive_some(1)
    assert answer.startswith(b"HTTP/1.1 101 ")


MASK = bytes(4)  # frames of a client are masked; this one changes nothing

FRAMES = {
    "a reserved kind of frame": b"\x83\x81" + MASK + b"x",
    "an unmasked frame": b"\x82\x01x",
    "a reserved bit": b"\xf2\x81" + MASK + b"x",
    "a text that is no UTF-8": b"\x81\x82" + MASK + b"\xff\xfe",
    "a close with half a code": b"\x88\x81" + MASK + b"x",
    "a close whose reason is no UTF-8": b"\x88\x84" + MASK + b"\x03\xe8\xff\xfe",
    "a continuation of nothing": b"\x80\x81" + MASK + b"x",
    "a ping that is too long": b"\x89\xfe\x00\x80" + MASK + bytes(128),
    "a size beyond all bounds": b"\x82\xff\x7f" + b"\xff" * 7 + MASK,
    "half a frame": b"\x82\xfe\x00\x80" + MASK + b"x",
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
async def test_a_broken_frame_ends_its_own_link_only(
    frame: bytes, autojump_clock: MockClock
) -> None:
    near, far = memory_stream_pair()

    async def misbehave() -> None:
        async with near:
            await shake(near)
            await near.send_all(frame)
            await near.send_eof()
            await drain(near)

    started = trio.current_time()
    with pytest.RaisesGroup(pytest.RaisesExc(check=only_mesh_errors), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(misbehave)
            await serve(far)
    assert trio.current_time() - started <= CLOSE_TIMEOUT_S


async def test_the_reason_of_a_close_steers_no_terminal(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    reason = "\x1b[2J\u202eno\nentry".encode()
    frame = bytes([0x88, 0x80 + 2 + len(reason)]) + MASK + b"\x03\xe8" + reason

    async def leave() -> None:
        async with near:
            await shake(near)
            await near.send_all(frame)
            await drain(near)

    with pytest.RaisesGroup(
        pytest.RaisesExc(LinkError, match=r"^the link was closed: \[2J no entry$"),
        flatten_subgroups=True,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
            await serve(far)


PIECES = {
    "two pieces": b"\x02\x82" + MASK + b"on" + b"\x80\x81" + MASK + b"e",
    "empty pieces without end": b"\x02\x80" + MASK + (b"\x00\x80" + MASK) * 1000,
}
PINGS = {
    "pings": (b"\x89\x80" + MASK) * 1000,
    "pongs": (b"\x8a\x80" + MASK) * 1000,
    "long pings": (b"\x89\xfd" + MASK + bytes(125)) * 1000,
}


@pytest.mark.parametrize("outgoing", [False, True])
@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        *((frames, "a message in pieces") for frames in PIECES.values()),
        *((frames, "more pings than any link needs") for frames in PINGS.values()),
    ],
    ids=[*PIECES, *PINGS],
)
async def test_frames_that_cost_more_than_they_say_break_the_protocol(
    frames: bytes, reason: str, *, outgoing: bool, autojump_clock: MockClock
) -> None:
    near, far = memory_stream_pair()

    async def misbehave() -> None:
        async with open_channel(near, peer=PEER, remote=REMOTE, outgoing=not outgoing):
            await near.send_all(frames)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(misbehave)
        with pytest.RaisesGroup(pytest.RaisesExc(PeerError, match=reason), flatten_subgroups=True):
            async with open_channel(far, peer=PEER, remote=REMOTE, outgoing=outgoing) as channel:
                while True:
                    await channel.receive()
        nursery.cancel_scope.cancel()


async def test_a_ping_now_and_then_is_answered(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_quietly, far)
        await shake(near)
        for number in range(100):
            await near.send_all(b"\x89\x81" + MASK + bytes([number]))
            assert await near.receive_some(65536) == b"\x8a\x01" + bytes([number])
            await trio.sleep(1)
        nursery.cancel_scope.cancel()


async def test_a_link_is_read_from_at_a_bounded_rate(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "READS_BURST", 100)
    near, far = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_quietly, far)
        await shake(near)
        started = trio.current_time()
        size = 4 * READ_BYTES_MAX - 8  # with its head as much as is read in four times
        message = b"\x82\xfe" + size.to_bytes(2) + MASK + bytes(size)
        await near.send_all(message * 200)
        answered_bytes = 0
        while answered_bytes < 200 * size:
            chunk = await near.receive_some(65536)
            assert chunk
            answered_bytes += len(chunk)
        assert trio.current_time() - started == pytest.approx(500 / READS_PER_S, rel=0.05)
        nursery.cancel_scope.cancel()


async def run_quietly(stream: trio.abc.Stream) -> None:
    try:
        await serve(stream)
    except* MeshError:
        pass


async def test_a_message_over_the_limit_is_not_gathered(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    said = b""

    async def flood() -> None:
        nonlocal said
        async with near:
            await shake(near)
            size = (2 * MESSAGE_BYTES_MAX).to_bytes(8)
            await near.send_all(b"\x82\xff" + size + MASK + bytes(2 * MESSAGE_BYTES_MAX))
            said = await drain(near)

    with pytest.RaisesGroup(pytest.RaisesExc(check=only_mesh_errors), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await serve(far)
    assert said[2:4] == (1009).to_bytes(2, "big"), "that it is too big"


class Stuck(trio.abc.Stream):
    """A stream whose other end takes nothing any more, once told so."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self.inner = inner
        self.stuck = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.stuck:
            await trio.sleep_forever()
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.inner.aclose()


async def test_a_peer_that_takes_nothing_is_given_up_and_closing_does_not_hang(
    autojump_clock: MockClock,
) -> None:
    near, far = memory_stream_pair()
    stuck = Stuck(near)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_quietly, far)
        async with open_channel(stuck, peer=PEER, remote=REMOTE, outgoing=True) as channel:
            await channel.send(b"one")
            assert await channel.receive() == b"one"
            stuck.stuck = True
            started = trio.current_time()
            with pytest.raises(LinkError, match="no answer in time"):
                await channel.send(b"two")
            assert trio.current_time() - started == pytest.approx(SEND_TIMEOUT_S)
        assert trio.current_time() - started <= SEND_TIMEOUT_S + CLOSE_TIMEOUT_S + 0.001
        nursery.cancel_scope.cancel()


async def test_after_the_end_both_directions_say_so(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_quietly, far)
        async with open_channel(near, peer=PEER, remote=REMOTE, outgoing=True) as channel:
            assert (channel.peer, channel.remote, channel.outgoing) == (PEER, REMOTE, True)
            await trio.aclose_forcefully(far)
            with pytest.raises(LinkError, match=r"the link (was closed|broke)"):
                await channel.receive()
            with pytest.raises(LinkError, match=r"the link (was closed|broke)"):
                await channel.send(b"x")

"""What only the real transport can get wrong: junk instead of TLS, crowds, silence."""

from __future__ import annotations

import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import structlog
import trio
import trio.testing

from p2pmesh.config import Address
from p2pmesh.errors import MeshError, PeerError
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import ANYBODY, HTTP, JOIN, LAN, Needs, Peer, RefusedError
from p2pmesh.identity.keys import MeshId, NodeId
from p2pmesh.transport import banlist, tls
from p2pmesh.transport.base import Channel, Service
from p2pmesh.transport.doorway import Doorway
from p2pmesh.transport.tls import TlsTransport
from p2pmesh.wire.messages import CHUNK_BYTES_MAX
from tests.transport.networks import someone

ANNA, BERT = someone(1), someone(2)


class Greeter:
    """Says hello on every channel, so that a test sees whether the node still lives."""

    async def on_channel(self, channel: Channel) -> None:
        await channel.send(b"hello")
        await trio.sleep_forever()

    async def on_stream(self, peer: Peer, stream: trio.abc.Stream) -> None:
        raise RuntimeError("a bug in a handler ends its own connection only")


@asynccontextmanager
async def bert_listening(**bounds: Any) -> AsyncIterator[TlsTransport]:
    own = await trio.open_tcp_listeners(0, host="127.0.0.1")
    transport = TlsTransport(lambda: BERT, own, **bounds)
    greeter = Greeter()
    async with trio.open_nursery() as nursery:
        await nursery.start(
            transport.serve, greeter.on_channel, {HTTP: Service(greeter.on_stream, Needs(Role.USE))}
        )
        with trio.fail_after(20):
            yield transport
        nursery.cancel_scope.cancel()


async def assert_alive(transport: TlsTransport) -> None:
    async with listeners() as own:
        anna = TlsTransport(lambda: ANNA, own)
        async with anna.dial(transport.address, expected=None) as channel:
            assert await channel.receive() == b"hello"


@asynccontextmanager
async def listeners() -> AsyncIterator[list[trio.SocketListener]]:
    own = await trio.open_tcp_listeners(0, host="127.0.0.1")
    try:
        yield own
    finally:
        for listener in own:
            listener.socket.close()


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        secrets.token_bytes(20_000),
    ],
    ids=["nothing", "http", "forged client hello", "random"],
)
async def test_junk_is_dropped_and_the_node_lives(junk: bytes) -> None:
    async with bert_listening() as bert:
        for _ in range(5):
            stream = await trio.open_tcp_stream(bert.address.host, bert.address.port)
            async with stream:
                await stream.send_all(junk)
        await assert_alive(bert)


async def test_junk_inside_tls_is_dropped_and_the_node_lives() -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with bert_listening() as bert:
        for junk in (b"\xff\xff\xff\xff", b"\0\0\0\x05hello", b"\0\0\0\0" * 50):
            tcp = await trio.open_tcp_stream(bert.address.host, bert.address.port)
            stream = trio.SSLStream(tcp, context, https_compatible=True)
            async with stream:
                await stream.send_all(junk)
                with trio.move_on_after(1):
                    while await stream.receive_some():
                        pass
        await assert_alive(bert)


async def test_the_oldest_of_a_crowd_that_says_nothing_gives_way() -> None:
    async with bert_listening(unauthenticated_max=3) as bert:
        silent = [
            await trio.open_tcp_stream(bert.address.host, bert.address.port) for _ in range(4)
        ]
        assert await silent[0].receive_some() == b""
        await assert_alive(bert)
        assert await silent[1].receive_some() == b""
        for stream in silent:
            await stream.aclose()


def from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections look as if they came from another machine."""
    monkeypatch.setattr(tls, "_remote", lambda _: Address("192.0.2.7", 1))


async def test_a_network_with_too_much_trouble_is_kept_waiting_and_hung_up_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from_elsewhere(monkeypatch)
    monkeypatch.setattr(banlist, "TROUBLE_BURST", 2)
    monkeypatch.setattr(tls, "HOLD_S", 0.2)
    async with bert_listening(holding_max=1) as bert, trio.open_nursery() as nursery:

        async def hang_up_after_s() -> float:
            started = trio.current_time()
            stream = await trio.open_tcp_stream(bert.address.host, bert.address.port)
            async with stream:
                assert await stream.receive_some() == b""
            return trio.current_time() - started

        for _ in range(3):
            bert._doorway.failed("192.0.2.7", trio.current_time())
        nursery.start_soon(hang_up_after_s)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert await hang_up_after_s() < 0.1, "no more are kept than are bounded"
        await trio.sleep(0.2)
        bert._doorway.failed("192.0.2.7", trio.current_time())
        assert await hang_up_after_s() >= 0.2
        bert._doorway = Doorway(4)  # a while later
        await assert_alive(bert)


async def test_a_member_whose_network_is_in_trouble_waits_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from_elsewhere(monkeypatch)
    monkeypatch.setattr(banlist, "TROUBLE_BURST", 2)
    monkeypatch.setattr(tls, "HOLD_S", 0.2)
    async with bert_listening() as bert:
        await assert_alive(bert)
        for _ in range(10):
            bert._doorway.failed("192.0.2.7", trio.current_time())
        started = trio.current_time()
        await assert_alive(bert)
        assert trio.current_time() - started >= 0.2


@pytest.mark.parametrize(("what", "to_blame"), [("junk", False), ("another mesh", True)])
async def test_trouble_is_a_hello_that_comes_to_nothing(
    what: str, monkeypatch: pytest.MonkeyPatch, *, to_blame: bool
) -> None:
    from_elsewhere(monkeypatch)
    monkeypatch.setattr(banlist, "TROUBLE_BURST", 0)
    async with bert_listening() as bert, listeners() as own:
        stranger = TlsTransport(lambda: someone(3, mesh=MeshId(b"n" * 16)), own)
        if what == "junk":
            stream = await trio.open_tcp_stream(bert.address.host, bert.address.port)
            async with stream:
                await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
        else:
            with pytest.raises(MeshError):
                await stranger.introduce(bert.address)
            await trio.testing.wait_all_tasks_blocked(0.05)
        assert bert._doorway.is_unwelcome("192.0.2.7", trio.current_time()) == to_blame


async def test_a_member_proves_its_network_from_either_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from_elsewhere(monkeypatch)
    async with bert_listening() as bert, listeners() as own:
        anna = TlsTransport(lambda: ANNA, own)
        await anna.introduce(bert.address)
        assert not bert._doorway._proved, "nobody shows a credential for a mere hello"
        async with anna.dial(bert.address, expected=None):
            pass
        assert "192.0.2.7" in bert._doorway._proved
        assert "loopback" in anna._doorway._proved


@asynccontextmanager
async def bert_admitting(**bounds: Any) -> AsyncIterator[tuple[TlsTransport, list[str]]]:
    """Bert, who answers newcomers, and a list of what happened in which order."""
    events: list[str] = []

    async def on_newcomer(peer: Peer, stream: trio.abc.Stream) -> None:
        events.append(f"{peer.purpose} from {peer.host}")
        await stream.send_all(b"welcome")

    async with trio.open_nursery() as nursery:
        own = await trio.open_tcp_listeners(0, host="127.0.0.1")
        transport = TlsTransport(lambda: BERT, own, **bounds)
        newcomers = Service(on_newcomer, ANYBODY)
        await nursery.start(
            transport.serve, Greeter().on_channel, {LAN: newcomers, JOIN: newcomers}
        )
        with trio.fail_after(20):
            yield transport, events
        nursery.cancel_scope.cancel()


NEWCOMER = someone(9, mesh=None)


async def ask(there: TlsTransport, purpose: str) -> bytes:
    async with listeners() as own:
        stream, _ = await TlsTransport(lambda: NEWCOMER, own).ask(there.address, purpose, NEWCOMER)
        async with stream:
            return bytes(await stream.receive_some(100))


async def test_nobody_joins_by_network_where_none_is_guarded() -> None:
    async with bert_admitting() as (bert, events):
        with pytest.raises(RefusedError, match="nobody in without an invitation"):
            await ask(bert, LAN)
        assert await ask(bert, JOIN) == b"welcome"
        assert events == ["join from 127.0.0.1"]
        await assert_alive(bert)


async def test_the_challenge_to_who_joins_by_network_is_guarded_and_nothing_else() -> None:
    @asynccontextmanager
    async def guard(tcp: trio.SocketStream) -> AsyncIterator[None]:
        events.append(f"guarding {tcp.socket.getpeername()[0]}")
        yield
        events.append("over")

    async with bert_admitting(only_here=guard) as (bert, events):
        assert await ask(bert, JOIN) == b"welcome"
        assert await ask(bert, LAN) == b"welcome"
        lan = ["guarding 127.0.0.1", "over", "lan from 127.0.0.1"]
        assert events == ["join from 127.0.0.1", *lan]


async def test_who_is_not_here_is_told_so_before_the_challenge() -> None:
    def guard(_tcp: trio.SocketStream) -> AbstractAsyncContextManager[object]:
        raise RefusedError("that address is on no network of this machine")

    async with bert_admitting(only_here=guard) as (bert, events):
        with pytest.raises(RefusedError, match="on no network of this machine"):
            await ask(bert, LAN)
        assert events == []
        await assert_alive(bert)


async def test_dropped_connections_are_logged_once_a_second_with_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tls, "DROPPED_LOG_INTERVAL_S", 0.2)
    async with bert_listening() as bert:
        with structlog.testing.capture_logs() as logs:
            for pause_s in (0, 0, 0.25):
                await trio.sleep(pause_s)
                stream = await trio.open_tcp_stream(bert.address.host, bert.address.port)
                async with stream:
                    await stream.send_all(b"junk")
                    with pytest.raises(trio.BrokenResourceError):
                        await stream.receive_some()
                await trio.testing.wait_all_tasks_blocked(0.01)
    dropped = [log for log in logs if log["event"] == "connection_dropped"]
    assert [log["count"] for log in dropped] == [1, 2]
    assert dropped[0]["reason"] == "what came is no TLS"


async def test_a_server_that_does_not_speak_tls_is_a_peers_fault() -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"220 ready\r\n" * 20)

    async with trio.open_nursery() as nursery, listeners() as own:
        there = await nursery.start(trio.serve_tcp, answer, 0)
        port = there[0].socket.getsockname()[1]
        anna = TlsTransport(lambda: ANNA, own)
        with pytest.raises(PeerError, match="does not speak TLS"):
            async with anna.dial(Address("127.0.0.1", port), expected=None):
                pass
        nursery.cancel_scope.cancel()


async def test_a_failing_handler_ends_its_own_connection_only() -> None:
    async with bert_listening() as bert, listeners() as own:
        anna = TlsTransport(lambda: ANNA, own)
        stream = await anna.open_stream(bert.address, HTTP, expected=NodeId(BERT.key.id))
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            assert await stream.receive_some() != b""
        await trio.aclose_forcefully(stream)
        await assert_alive(bert)


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="the system has no such bound")
async def test_the_kernel_keeps_little_that_a_probe_would_wait_behind() -> None:
    async with bert_listening() as bert, listeners() as own:
        anna = TlsTransport(lambda: ANNA, own)
        stream = await anna.open_stream(bert.address, HTTP, expected=NodeId(BERT.key.id))
        unsent_bytes = stream.transport_stream.socket.getsockopt(
            socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT
        )
        await trio.aclose_forcefully(stream)
    # Without the bound it grows to megabytes on Linux: seconds for a probe behind bulk.
    assert unsent_bytes <= CHUNK_BYTES_MAX


async def test_each_side_says_what_time_it_takes_it_to_be() -> None:
    async with bert_listening() as bert, listeners() as own:
        anna = TlsTransport(lambda: ANNA, own, lambda: time.time() - 7200)
        peer = await anna.introduce(bert.address)
    assert peer.clock_ahead_s == pytest.approx(7200, abs=2)


async def test_the_certificate_is_new_at_each_start() -> None:
    async with listeners() as own:
        one, other = TlsTransport(lambda: ANNA, own), TlsTransport(lambda: ANNA, own)
        assert one._certificate != other._certificate

"""The real transport: TCP, TLS 1.3 with a certificate made afresh per start, then the hello.

TLS gives secrecy and integrity, the hello gives identity, bound to the certificate. Gossip
channels are websockets inside that; forwarded requests are the bare TLS stream.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import structlog
import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pmesh.config import Address
from p2pmesh.errors import MeshError, PeerError
from p2pmesh.identity.hello import GOSSIP, HELLO, LAN, LocalIdentity, Peer, Purpose, RefusedError
from p2pmesh.identity.keys import NodeId
from p2pmesh.transport.base import (
    DIAL_TIMEOUT_S,
    Asked,
    Channel,
    Handlers,
    OnChannel,
    link_errors,
)
from p2pmesh.transport.channel import open_channel
from p2pmesh.transport.dispatch import Services
from p2pmesh.transport.doorway import Doorway
from p2pmesh.transport.handshake import client_handshake, server_handshake

UNAUTHENTICATED_MAX = 64  # connections that have not proved who they are, see `Doorway`
HOLD_S = 1.0  # before a connection from a troublesome network is closed unheard, or listened to
HOLDING_MAX = 64  # such connections; each is a descriptor
DROPPED_LOG_INTERVAL_S = 1.0  # a scanner must not fill the log
TLS_HANDSHAKE = b"\x16"  # the first byte of all TLS

TlsStream = trio.SSLStream[trio.SocketStream]
# Around the challenge on a connection; raises `RefusedError` for one from elsewhere.
OnlyHere = Callable[[trio.SocketStream], contextlib.AbstractAsyncContextManager[object]]

log = structlog.get_logger(__name__)


def nowhere(_tcp: trio.SocketStream) -> contextlib.AbstractAsyncContextManager[object]:
    """Let nobody join from the network around.

    Raises:
        RefusedError: Always.
    """
    raise RefusedError("this node lets nobody in without an invitation")


class _TurnedAwayError(PeerError):
    """A connection that cost next to nothing, and is no reason to keep others from there away."""


class TlsTransport:
    """Listens on TCP and dials others; one per node.

    Args:
        me: Called for each connection: who this node says that it is.
        listeners: Bound TCP listeners, closed when `serve` ends.
        clock: Unix time in seconds as this node takes it to be, for the hello.
        unauthenticated_max: Connections that have not proved who they are.
        holding_max: Connections that are kept waiting before they are closed unheard.
        only_here: Keeps the challenge to a connection for `LAN` on the network of this machine.
    """

    def __init__(
        self,
        me: Callable[[], LocalIdentity],
        listeners: list[trio.SocketListener],
        clock: Callable[[], float] = time.time,
        *,
        unauthenticated_max: int = UNAUTHENTICATED_MAX,
        holding_max: int = HOLDING_MAX,
        only_here: OnlyHere = nowhere,
    ) -> None:
        self._me = me
        self._clock = clock
        self._listeners = listeners
        self._server_context, self._certificate = _server_context()
        self._client_context = _client_context()
        self._doorway: Doorway[trio.CancelScope] = Doorway(unauthenticated_max)
        self._holding, self._holding_max = 0, holding_max
        self._only_here = only_here
        self._open: dict[trio.CancelScope, Peer] = {}
        self._dropped, self._dropped_logged_at = 0, -DROPPED_LOG_INTERVAL_S

    @property
    def address(self) -> Address:
        """Return the address at which this node listens, as bound."""
        host, port = self._listeners[0].socket.getsockname()[:2]
        return Address(host, port)

    async def serve(
        self,
        on_channel: OnChannel,
        handlers: Handlers,
        *,
        task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept until cancelled; see `Transport.serve`."""
        services = Services(on_channel, handlers)

        async def handle(tcp: trio.SocketStream) -> None:
            remote = _remote(tcp)
            if self._doorway.is_unwelcome(remote.host, trio.current_time()):
                await self._hold(tcp)
                return
            try:
                await self._accept(tcp, remote, services)
            except* MeshError as group:
                if group.subgroup(_is_its_fault):
                    self._doorway.failed(remote.host, trio.current_time())
                self._log_dropped(remote, _sentences(group))
            except* Exception:
                log.exception("connection_failed", remote=str(remote))

        await trio.serve_listeners(handle, self._listeners, task_status=task_status)

    async def _accept(self, tcp: trio.SocketStream, remote: Address, services: Services) -> None:
        tls = trio.SSLStream(tcp, self._server_context, server_side=True, https_compatible=True)
        async with _closing(tls):
            with self._place_for(remote.host), _greeting_errors(remote):
                await _expect_tls(tcp)
                if self._doorway.must_wait(remote.host, trio.current_time()):
                    await trio.sleep(HOLD_S)
                await tls.do_handshake()
                peer = await server_handshake(
                    tls,
                    self._me(),
                    purposes=services.purposes,
                    certificate=self._certificate,
                    now=self._clock(),
                    guard=lambda purpose: (
                        self._only_here(tcp) if purpose == LAN else contextlib.nullcontext()
                    ),
                )
            if peer.credential is not None:
                self._doorway.proved(remote.host)
            with trio.CancelScope() as scope:
                self._open[scope] = peer = replace(peer, host=remote.host)
                try:
                    await services.dispatch(peer, tls, remote=remote)
                finally:
                    del self._open[scope]

    def cut_off(self, is_good: Callable[[Peer], bool]) -> None:
        """End connections whose peer is not good any more; see `Transport.cut_off`."""
        for scope, peer in self._open.items():
            if not is_good(peer):
                scope.cancel()

    async def _hold(self, tcp: trio.SocketStream) -> None:
        """Hang up without a word, and not at once: who waits does not dial again meanwhile."""
        async with tcp:
            if self._holding < self._holding_max:
                self._holding += 1
                try:
                    await trio.sleep(HOLD_S)
                finally:
                    self._holding -= 1

    @contextlib.contextmanager
    def _place_for(self, host: str) -> Iterator[None]:
        with trio.CancelScope() as visit:
            if (oldest := self._doorway.enter(host, visit)) is not None:
                oldest.cancel()
            try:
                yield
            finally:
                self._doorway.leave(visit)
        if visit.cancelled_caught:
            raise _TurnedAwayError("it said nothing for longer than all that came after it")

    def _log_dropped(self, remote: Address, reason: str) -> None:
        self._dropped += 1
        now = trio.current_time()
        if now - self._dropped_logged_at >= DROPPED_LOG_INTERVAL_S:
            log.info("connection_dropped", remote=str(remote), reason=reason, count=self._dropped)
            self._dropped, self._dropped_logged_at = 0, now

    @contextlib.asynccontextmanager
    async def dial(self, address: Address, *, expected: NodeId | None) -> AsyncIterator[Channel]:
        """Open a gossip channel for the length of the block; see `Transport.dial`."""
        tls, peer = await self._connect(address, GOSSIP, expected)
        async with open_channel(tls, peer=peer, remote=address, outgoing=True) as channel:
            yield channel

    async def open_stream(
        self, address: Address, purpose: Purpose, *, expected: NodeId
    ) -> TlsStream:
        """Open a byte stream that the caller closes; see `Transport.open_stream`."""
        return (await self._connect(address, purpose, expected))[0]

    async def ask(self, address: Address, purpose: Purpose, me: LocalIdentity) -> Asked:
        """Open a stream as somebody without a mesh; see `Transport.ask`."""
        return Asked(*await self._connect(address, purpose, None, me))

    async def introduce(self, address: Address) -> Peer:
        """Say hello and hang up; see `Transport.introduce`."""
        tls, peer = await self._connect(address, HELLO, None)
        await trio.aclose_forcefully(tls)
        return peer

    async def _connect(
        self,
        address: Address,
        purpose: Purpose,
        expected: NodeId | None,
        me: LocalIdentity | None = None,
    ) -> tuple[TlsStream, Peer]:
        with link_errors(f"nobody answers at {address}"), trio.fail_after(DIAL_TIMEOUT_S):
            tcp = await trio.open_tcp_stream(address.host, address.port)
        tls = trio.SSLStream(tcp, self._client_context, https_compatible=True)
        try:
            with _greeting_errors(address):
                await tls.do_handshake()
                peer = await client_handshake(
                    tls,
                    me or self._me(),
                    certificate=tls.getpeercert(binary_form=True),
                    purpose=purpose,
                    expected=expected,
                    now=self._clock(),
                )
                if peer.credential is not None:
                    self._doorway.proved(address.host)
                return tls, peer
        except BaseException:
            await trio.aclose_forcefully(tls)
            raise


async def _expect_tls(tcp: trio.SocketStream) -> None:
    """Wait for the first byte: what is no TLS is not worth making any for."""
    first = await tcp.socket.recv(1, socket.MSG_PEEK)
    if first and first != TLS_HANDSHAKE:
        raise _TurnedAwayError("what came is no TLS")


@contextlib.contextmanager
def _greeting_errors(remote: Address) -> Iterator[None]:
    """A deadline around TLS and hello; junk instead of TLS is the peer's fault."""
    with link_errors(f"the hello with {remote} failed"), trio.fail_after(DIAL_TIMEOUT_S):
        try:
            yield
        except trio.BrokenResourceError as exc:
            if isinstance(exc.__cause__, ssl.SSLEOFError):
                raise PeerError(f"{remote} hung up in the middle of the TLS handshake") from exc
            if isinstance(exc.__cause__, ssl.SSLError):
                raise PeerError(f"{remote} does not speak TLS 1.3") from exc
            raise


@contextlib.asynccontextmanager
async def _closing(tls: TlsStream) -> AsyncIterator[None]:
    # Closed without a farewell: https_compatible peers expect none, and none may hang here.
    try:
        yield
    finally:
        await trio.aclose_forcefully(tls)


def _server_context() -> tuple[ssl.SSLContext, bytes]:
    """A TLS 1.3 context with a certificate nobody has seen before, and its DER bytes."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "p2pmesh")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=3650))
        .sign(key, None)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no resumption: each connection proves itself
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    with tempfile.TemporaryDirectory() as folder:  # ssl reads keys from files only; mode 0700
        path = Path(folder) / "certificate.pem"
        path.write_bytes(pem)
        context.load_cert_chain(path)
    return context, certificate.public_bytes(serialization.Encoding.DER)


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the hello proves identity, bound to the certificate
    return context


def _remote(tcp: trio.SocketStream) -> Address:
    try:
        host, port = tcp.socket.getpeername()[:2]
    except OSError:  # gone already
        return Address("unknown", 0)
    return Address(host, port)


def _is_its_fault(exc: BaseException) -> bool:
    return isinstance(exc, PeerError) and not isinstance(exc, _TurnedAwayError)


def _sentences(group: BaseExceptionGroup[MeshError]) -> str:
    return "; ".join(
        _sentences(exc) if isinstance(exc, BaseExceptionGroup) else str(exc)
        for exc in group.exceptions
    )

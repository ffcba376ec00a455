"""A network inside one process: the same hello, channels and contract, without sockets.

For tests and simulations of the whole shell.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable

import structlog
import trio
from trio.testing import memory_stream_pair

from p2pmesh.config import Address
from p2pmesh.errors import MeshError
from p2pmesh.identity.hello import GOSSIP, HELLO, LocalIdentity, Peer, Purpose
from p2pmesh.identity.keys import NodeId
from p2pmesh.transport.base import (
    DIAL_TIMEOUT_S,
    Asked,
    Channel,
    Handlers,
    NobodyThereError,
    OnChannel,
    link_errors,
)
from p2pmesh.transport.channel import open_channel
from p2pmesh.transport.dispatch import Services
from p2pmesh.transport.handshake import client_handshake, server_handshake

_CERTIFICATE = b"there is nobody in the middle of a process"

Accept = Callable[[trio.abc.Stream], None]

log = structlog.get_logger(__name__)


class MemoryNetwork:
    """The listeners of a network; `unreachable` addresses swallow what is sent to them."""

    def __init__(self) -> None:
        self.listening: dict[Address, Accept] = {}
        self.unreachable: set[Address] = set()


class MemoryTransport:
    """A `Transport` on a `MemoryNetwork`; arguments as `TlsTransport`'s."""

    def __init__(
        self,
        me: Callable[[], LocalIdentity],
        network: MemoryNetwork,
        address: Address,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._me = me
        self._clock = clock
        self._network = network
        self._address = address
        self._open: dict[trio.CancelScope, Peer] = {}

    @property
    def address(self) -> Address:
        """Return the address at which this node listens."""
        return self._address

    async def serve(
        self,
        on_channel: OnChannel,
        handlers: Handlers,
        *,
        task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept until cancelled; see `Transport.serve`."""
        services = Services(on_channel, handlers)

        async def handle(stream: trio.abc.Stream) -> None:
            try:
                await self._accept(stream, services)
            except* MeshError as group:
                log.info("connection_dropped", reasons=[str(exc) for exc in group.exceptions])

        async with trio.open_nursery() as nursery:
            self._network.listening[self._address] = lambda end: nursery.start_soon(handle, end)
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                del self._network.listening[self._address]

    async def _accept(self, stream: trio.abc.Stream, services: Services) -> None:
        async with stream:
            with link_errors("the hello failed"), trio.fail_after(DIAL_TIMEOUT_S):
                peer = await server_handshake(
                    stream,
                    self._me(),
                    purposes=services.purposes,
                    certificate=_CERTIFICATE,
                    now=self._clock(),
                )
            with trio.CancelScope() as scope:
                self._open[scope] = peer
                try:
                    await services.dispatch(peer, stream, remote=Address("memory", 0))
                finally:
                    del self._open[scope]

    def cut_off(self, is_good: Callable[[Peer], bool]) -> None:
        """End connections whose peer is not good any more; see `Transport.cut_off`."""
        for scope, peer in self._open.items():
            if not is_good(peer):
                scope.cancel()

    @contextlib.asynccontextmanager
    async def dial(self, address: Address, *, expected: NodeId | None) -> AsyncIterator[Channel]:
        """Open a gossip channel for the length of the block; see `Transport.dial`."""
        stream, peer = await self._connect(address, GOSSIP, expected)
        async with open_channel(stream, peer=peer, remote=address, outgoing=True) as channel:
            yield channel

    async def open_stream(
        self, address: Address, purpose: Purpose, *, expected: NodeId
    ) -> trio.abc.Stream:
        """Open a byte stream that the caller closes; see `Transport.open_stream`."""
        return (await self._connect(address, purpose, expected))[0]

    async def ask(self, address: Address, purpose: Purpose, me: LocalIdentity) -> Asked:
        """Open a stream as somebody without a mesh; see `Transport.ask`."""
        return Asked(*await self._connect(address, purpose, None, me))

    async def introduce(self, address: Address) -> Peer:
        """Say hello and hang up; see `Transport.introduce`."""
        stream, peer = await self._connect(address, HELLO, None)
        await trio.aclose_forcefully(stream)
        return peer

    async def _connect(
        self,
        address: Address,
        purpose: Purpose,
        expected: NodeId | None,
        me: LocalIdentity | None = None,
    ) -> tuple[trio.abc.Stream, Peer]:
        accept = self._network.listening.get(address)
        if accept is None:
            raise NobodyThereError(f"nobody answers at {address}: nothing listens there")
        ours, theirs = memory_stream_pair()
        if address not in self._network.unreachable:
            accept(theirs)
        try:
            with (
                link_errors(f"the hello with {address} failed"),
                trio.fail_after(DIAL_TIMEOUT_S),
            ):
                peer = await client_handshake(
                    ours,
                    me or self._me(),
                    certificate=_CERTIFICATE,
                    purpose=purpose,
                    expected=expected,
                    now=self._clock(),
                )
                return ours, peer
        except BaseException:
            await trio.aclose_forcefully(ours)
            raise

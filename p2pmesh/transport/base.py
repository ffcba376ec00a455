"""The interface of transports: authenticated channels and byte streams between nodes.

Two implementations pass the same contract suite: TLS over TCP, and memory for tests. Whoever
comes out of here has proved its identity; nothing above asks again. What is handed over for
sending is soon on the wire: no deep queue of the kernel, in which a probe would wait behind bulk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

import trio

from p2pmesh.config import Address
from p2pmesh.errors import LinkError
from p2pmesh.identity.hello import LocalIdentity, Needs, Peer, Purpose
from p2pmesh.identity.keys import NodeId

DIAL_TIMEOUT_S = 3.0  # connect, TLS and hello together; DESIGN §4
SEND_TIMEOUT_S = 10.0  # a peer that takes nothing for so long is gone or stuck


class NobodyThereError(LinkError):
    """The machine itself says that nothing listens at that port: no need to wait for more."""


@contextlib.contextmanager
def link_errors(sentence: str) -> Iterator[None]:
    """Turn what trio and the system raise about a connection into a `LinkError`.

    Raises:
        NobodyThereError: The connection was refused.
        LinkError: Anything else of the network, a passed deadline included.
    """
    try:
        yield
    except trio.TooSlowError as exc:
        raise LinkError(f"{sentence}: no answer in time") from exc
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        causes = _causes(exc)
        if all(isinstance(cause, ConnectionRefusedError) for cause in causes):
            raise NobodyThereError(f"{sentence}: nothing listens there") from exc
        cause = causes[0]
        said = cause.strerror if isinstance(cause, OSError) else str(cause)
        reason = said or str(cause) or "the connection is closed"
        raise LinkError(f"{sentence}: {reason}") from exc


def _causes(exc: BaseException) -> tuple[BaseException, ...]:
    # trio wraps what the system said, once per address that a name resolved to.
    if isinstance(exc.__cause__, BaseExceptionGroup):
        return exc.__cause__.exceptions
    return (exc if exc.__cause__ is None else exc.__cause__,)


class Channel(Protocol):
    """Whole messages to and from one authenticated node.

    `send` is for one task and must not be cancelled half-way unless the channel is given up:
    a half frame would swallow the next message.
    """

    @property
    def peer(self) -> Peer:
        """The authenticated peer at the other end."""
        ...

    @property
    def outgoing(self) -> bool:
        """Whether this side dialled."""
        ...

    @property
    def remote(self) -> Address | None:
        """The other end's network address, where there is one."""
        ...

    async def send(self, message: bytes) -> None:
        """Send one message.

        Raises:
            LinkError: The channel is broken or closed.
        """
        ...

    async def receive(self) -> bytes:
        """The next message.

        Raises:
            LinkError: The channel is broken or closed, by either side.
            PeerError: The peer broke the framing.
        """
        ...


OnChannel = Callable[[Channel], Awaitable[None]]
Handler = Callable[[Peer, trio.abc.Stream], Awaitable[None]]


class Service(NamedTuple):
    """What a node offers for one purpose.

    Attributes:
        handler: Called with each byte stream and its peer; the stream is closed on return.
        needs: The conditions under which a peer gets there.
    """

    handler: Handler
    needs: Needs


Handlers = Mapping[Purpose, Service]


class Asked(NamedTuple):
    """A stream to a node, and who it is. The caller closes the stream."""

    stream: trio.abc.Stream
    peer: Peer


class Transport(Protocol):
    """One node's access to the others."""

    @property
    def address(self) -> Address:
        """Return the address at which this node listens."""
        ...

    async def serve(
        self,
        on_channel: OnChannel,
        handlers: Handlers,
        *,
        task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept until cancelled. Each connection has its own task and error boundary.

        Args:
            on_channel: Called with each gossip channel; it is closed on return.
            handlers: By purpose. A connection for any other purpose than these, a gossip channel
                or a mere hello is refused in the hello, and so is a peer that may not have it.
            task_status: Told once connections are accepted.
        """
        ...

    def cut_off(self, is_good: Callable[[Peer], bool]) -> None:
        """End the accepted connections whose peer is not good any more."""
        ...

    def dial(
        self, address: Address, *, expected: NodeId | None
    ) -> AbstractAsyncContextManager[Channel]:
        """Open a gossip channel for the length of the block.

        Args:
            address: Where to.
            expected: Who has to answer; None for anybody of this mesh.

        Raises:
            LinkError: Nobody answers there; `NobodyThereError` when the machine says so itself.
            PeerError: Who answers is not whom we want, or breaks the protocol.
        """
        ...

    async def open_stream(
        self, address: Address, purpose: Purpose, *, expected: NodeId
    ) -> trio.abc.Stream:
        """Open a byte stream for `purpose`; the caller closes it. Raises as `dial`."""
        ...

    async def ask(self, address: Address, purpose: Purpose, me: LocalIdentity) -> Asked:
        """Open a byte stream as `me`, who belongs to no mesh yet, to ask for a credential.

        Raises as `dial`.
        """
        ...

    async def introduce(self, address: Address) -> Peer:
        """Say hello and hang up, for a node that has no mesh yet: who answers? Raises as `dial`."""
        ...

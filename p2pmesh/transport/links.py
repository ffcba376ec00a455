"""The gossip links of one node: at most one per peer, each with its reader and its writer task.

The shell around the gossip core. Messages become bytes here and bytes messages. It decides only
what is about connections: which of two links between the same pair stays, when a slow link is
given up, how several addresses are tried, who broke the protocol and has to stay away.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog
import trio

from p2pmesh.config import Address
from p2pmesh.errors import LinkError, MeshError, PeerError
from p2pmesh.identity.hello import OVER, REFUSED_THERE, Peer, RefusedError
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.transport.banlist import Banlist
from p2pmesh.transport.base import Channel, Handlers, NobodyThereError, Transport
from p2pmesh.transport.outbox import Outbox
from p2pmesh.transport.pace import Pace
from p2pmesh.wire.messages import (
    Items,
    Message,
    Push,
    Ranges,
    decode_message,
    encode_message,
)

ENCODED_KEPT = 4  # messages; what goes over several links is sent over all of them in a row
# What a link takes in goes at this rate once it had that much more; the rest waits in the peer. A
# node that starts in a mesh of a thousand is told some thousand news at once, later tens a second.
MESSAGES_RATE_PER_S = 500.0
CORE_SHARE = 0.1  # of a core: what a peer's messages may take for long
MESSAGES_BURST = 8192
CROSSING_S = 10.0  # two ends that dial each other at once are done with both dials by then
DISMISS_S = 0.5  # for a node that was revoked to hear of it; nothing that it says counts meanwhile
ADDRESS_STAGGER_S = 0.25  # between two addresses of one node (RFC 8305 advises the same)

log = structlog.get_logger(__name__)


class LinkEvents(Protocol):
    """The callbacks of the node. None of these may block or raise."""

    def link_up(self, peer: Peer) -> None:
        """A link to `peer` is there; also when it replaces an older one."""
        ...

    def link_down(self, node: NodeId) -> None:
        """The link to `node` is gone and none has replaced it."""
        ...

    def message_received(self, node: NodeId, message: Message) -> None:
        """A message came from `node`."""
        ...

    def dial_failed(self, node: NodeId | None, *, nobody_there: bool) -> None:
        """None of the addresses tried led to `node`."""
        ...

    def refused(self, sentence: str) -> None:
        """A peer does not take this node for a member any more, and says why."""
        ...


class Links:
    """All gossip links of a node.

    Args:
        transport: Where they come from.
        me: This node.
        events: Who hears of them.
    """

    def __init__(self, transport: Transport, me: NodeId, events: LinkEvents) -> None:
        self._transport = transport
        self._me = me
        self._events = events
        self._links: dict[NodeId, _Link] = {}
        self._dialling: set[NodeId | Address] = set()
        self._barred = Banlist()
        self._encoded: deque[tuple[Message, bytes]] = deque(maxlen=ENCODED_KEPT)
        self._nursery: trio.Nursery | None = None

    async def run(
        self,
        handlers: Handlers,
        *,
        task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and dial until cancelled.

        Args:
            handlers: What other nodes may open streams for, see `Transport.serve`.
            task_status: Told once connections are accepted.
        """
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self._transport.serve, self._accept, handlers)
            task_status.started()

    @property
    def linked(self) -> frozenset[NodeId]:
        """The nodes with a link."""
        return frozenset(self._links)

    def send(self, node: NodeId, message: Message) -> None:
        """Queue a message; without a link it is dropped, with a full queue the link is closed."""
        if link := self._links.get(node):
            link.send_nowait(self._bytes_of(message), bulk=is_bulk(message))

    def close(self, node: NodeId) -> None:
        """Close the link to `node`, if there is one."""
        if link := self._links.get(node):
            link.close()

    def of(self, is_meant: Callable[[Peer], bool]) -> list[NodeId]:
        """Return the linked nodes of which `is_meant` is true."""
        return [node for node, link in self._links.items() if is_meant(link.peer)]

    def dismiss(self, node: NodeId) -> None:
        """Close the link to `node` once what is queued for it is sent, and soon in any case."""
        if (link := self._links.get(node)) and self._nursery is not None:
            link.finish()
            self._nursery.start_soon(link.close_after, DISMISS_S)

    def cut_off(self, node: NodeId, reason: str) -> None:
        """Close the link to `node` and have none with it for a while: it breaks the protocol."""
        now = trio.current_time()
        if not self._barred.is_barred(node, now):
            pause_s = self._barred.bar(node, now)
            log.warning("peer_cut_off", node=show_id(node), reason=reason, pause_s=pause_s)
        if link := self._links.get(node):
            link.close(fault=reason)

    def dial(self, node: NodeId | None, addresses: Sequence[Address]) -> None:
        """Try to get a link to `node` (None: to whoever answers) at one of `addresses`.

        Does nothing while an attempt for the same is under way.
        """
        assert self._nursery is not None, "dial comes after run"
        key = node if node is not None else addresses[0]
        if key not in self._dialling:
            self._dialling.add(key)
            self._nursery.start_soon(self._dial, key, node, tuple(addresses))

    async def finish(self, deadline_s: float) -> None:
        """Send what is queued, then close all links; returns when they are gone."""
        for link in self._links.values():
            link.finish()
        with trio.move_on_after(deadline_s):
            for link in list(self._links.values()):
                await link.gone.wait()

    async def _dial(
        self, key: NodeId | Address, node: NodeId | None, addresses: tuple[Address, ...]
    ) -> None:
        attempt = _Attempt(addresses)
        try:
            async with trio.open_nursery() as nursery:
                for position, address in enumerate(addresses):
                    nursery.start_soon(self._try, attempt, node, address, position)
        finally:
            self._dialling.discard(key)
        if not attempt.connected:
            self._events.dial_failed(node, nobody_there=attempt.nobody_there)

    async def _try(
        self, attempt: _Attempt, node: NodeId | None, address: Address, position: int
    ) -> None:
        with attempt.scopes[position]:
            await trio.sleep(position * ADDRESS_STAGGER_S)
            try:
                if node is not None:
                    self._refuse_barred(node)
                async with self._transport.dial(address, expected=node) as channel:
                    self._refuse_barred(channel.peer.node)
                    attempt.won(position)
                    self._dialling.discard(node if node is not None else address)
                    await self._serve(channel)
            except* NobodyThereError:
                log.debug("dial_refused", address=str(address))
            except* MeshError as group:
                attempt.nobody_there = False
                reasons = [str(exc) for exc in group.exceptions]
                log.info("dial_failed", address=str(address), reasons=reasons)
                for exc in group.exceptions:
                    # Of a peer that is out itself this node says the same.
                    if isinstance(exc, RefusedError) and exc.by_peer and exc.why in OVER:
                        self._events.refused(str(exc).removeprefix(REFUSED_THERE))
            except* Exception:
                # Whatever it was, it came from talking to this one peer and ends with it.
                attempt.nobody_there = False
                log.exception("dial_failed", address=str(address))

    async def _accept(self, channel: Channel) -> None:
        self._refuse_barred(channel.peer.node)
        await self._serve(channel)

    def _refuse_barred(self, node: NodeId) -> None:
        if self._barred.is_barred(node, trio.current_time()):
            raise PeerError(f"{show_id(node)} broke the protocol a moment ago")

    async def _serve(self, channel: Channel) -> None:
        peer = channel.peer
        link = _Link(channel)
        older = self._links.get(peer.node)
        if older is not None:
            if not self._replaces(link, older):
                return
            older.close()
        self._links[peer.node] = link
        log.info("link_opened", node=show_id(peer.node), remote=str(channel.remote))
        self._events.link_up(peer)
        try:
            await link.run(lambda message: self._events.message_received(peer.node, message))
        except PeerError as exc:
            self.cut_off(peer.node, str(exc))
            raise  # the transport keeps count of such connections too
        finally:
            log.info("link_closed", node=show_id(peer.node), reason=link.reason)
            if self._links.get(peer.node) is link:
                del self._links[peer.node]
                self._events.link_down(peer.node)

    def _replaces(self, newer: _Link, older: _Link) -> bool:
        """Both ends keep the link that the smaller id dialled, so that exactly one remains.

        That is for two that cross. Nobody dials whom it is linked with: a peer that does so later
        has restarted, or lost its end of the older link on its way to another network.
        """
        aged = trio.current_time() - older.since >= CROSSING_S
        if aged or newer.peer.instance != older.peer.instance:
            return True
        mine = self._me < newer.peer.node
        return newer.outgoing == mine or older.outgoing != mine

    def _bytes_of(self, message: Message) -> bytes:
        """Its bytes: now, as queues are bounded in them, and once for all links it goes over."""
        for known, encoded in self._encoded:
            if known is message:
                return encoded
        encoded = encode_message(message)
        self._encoded.append((message, encoded))
        return encoded


def is_bulk(message: Message) -> bool:
    """Whether everything else goes before it: it was asked for, and nobody measures its time."""
    match message:
        case Push(asked=asked):
            return asked
        case Ranges() | Items():
            return True
        case _:
            return False


class _Attempt:
    """Several addresses of one node, tried at once; the first that leads there stays."""

    def __init__(self, addresses: tuple[Address, ...]) -> None:
        self.scopes = [trio.CancelScope() for _ in addresses]
        self.connected = False
        self.nobody_there = True

    def won(self, position: int) -> None:
        self.connected = True
        for other, scope in enumerate(self.scopes):
            if other != position:
                scope.cancel()


class _Link:
    """One channel with its two tasks.

    Only the writer sends, and nothing cancels a send but the end of the link: a half frame would
    swallow the next message.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._outbox = Outbox()
        self._scope = trio.CancelScope()
        self._pace = Pace(MESSAGES_RATE_PER_S, MESSAGES_BURST)
        self.since = trio.current_time()
        self.reason = "closed"
        self._fault = ""
        self.gone = trio.Event()

    @property
    def peer(self) -> Peer:
        return self._channel.peer

    @property
    def outgoing(self) -> bool:
        return self._channel.outgoing

    def send_nowait(self, message: bytes, *, bulk: bool) -> None:
        if not self._outbox.put(message, bulk=bulk):
            self.reason = "the peer takes messages too slowly"
            self.close()

    def close(self, fault: str = "") -> None:
        self._fault = self._fault or fault
        self._outbox.close()
        self._scope.cancel()

    async def close_after(self, wait_s: float) -> None:
        with trio.move_on_after(wait_s):
            await self.gone.wait()
        self.close()

    def finish(self) -> None:
        self._outbox.close()

    async def run(self, on_message: Callable[[Message], None]) -> None:
        """Read and write until the end.

        Raises:
            PeerError: It came to that because the peer broke the protocol.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    while True:
                        raw = await self._channel.receive()
                        begun_s = time.thread_time()
                        on_message(decode_message(raw))
                        await self._keep_pace(time.thread_time() - begun_s)
        except* (LinkError, PeerError) as group:
            self.reason = "; ".join(str(exc) for exc in group.exceptions)
            if group.subgroup(PeerError):
                self._fault = self.reason
        finally:
            self._outbox.close()
            self.gone.set()
        if self._fault:
            self.reason = self._fault
            raise PeerError(self._fault)

    async def _keep_pace(self, busy_s: float) -> None:
        """Wait if the peer has said more, or given more work, than anybody has to for long."""
        now = trio.current_time()
        until = self._pace.take(now, max(1.0, busy_s / CORE_SHARE * MESSAGES_RATE_PER_S))
        if until > now:
            await trio.sleep_until(until)

    async def _write(self) -> None:
        while (message := await self._outbox.take()) is not None:
            await self._channel.send(message)
        self.reason = "finished"
        self.close()

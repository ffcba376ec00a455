"""The services of a node to its peers: one handler for each purpose of a connection.

Both transports hand over what they accept here, once the hello has proved who the peer is.
"""

from __future__ import annotations

import trio

from p2pmesh.config import Address
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import ANYBODY, GOSSIP, HELLO, Needs, Peer
from p2pmesh.transport.base import Handlers, OnChannel
from p2pmesh.transport.channel import open_channel


class Services:
    """The handlers of one listening node; arguments as `Transport.serve`'s.

    Attributes:
        purposes: Everything that the hello of this node lets in, and whom.
    """

    def __init__(self, on_channel: OnChannel, handlers: Handlers) -> None:
        assert not {GOSSIP, HELLO} & handlers.keys(), "these are served here"
        self._on_channel = on_channel
        self._handlers = dict(handlers)
        self.purposes = {
            GOSSIP: Needs(Role.SERVE),
            HELLO: ANYBODY,
            **{purpose: service.needs for purpose, service in handlers.items()},
        }

    async def dispatch(self, peer: Peer, stream: trio.abc.Stream, *, remote: Address) -> None:
        """Give a connection to the handler of its purpose, which is one of `purposes`."""
        if peer.purpose == HELLO:
            return
        if peer.purpose == GOSSIP:
            async with open_channel(stream, peer=peer, remote=remote, outgoing=False) as channel:
                await self._on_channel(channel)
            return
        await self._handlers[peer.purpose].handler(peer, stream)

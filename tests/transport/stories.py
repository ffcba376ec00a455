"""Links of nodes on a memory network, and what each node was told of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from p2pmesh.config import Address
from p2pmesh.identity.hello import LocalIdentity, Peer
from p2pmesh.identity.keys import NodeId
from p2pmesh.transport.links import Links
from p2pmesh.transport.memory import MemoryNetwork, MemoryTransport
from p2pmesh.wire.messages import Message, ProbeReport
from tests.transport.networks import someone

ANNA, BERT = sorted((someone(1), someone(2)), key=lambda me: me.key.id)
SOMEBODY = NodeId(b"s" * 16)


def word(number: int) -> Message:
    """One of many messages that can be told apart."""
    return ProbeReport(subject=SOMEBODY, token=number, alive=True)


class Story:
    """Links of one node, and what they told it."""

    def __init__(self, me: LocalIdentity, network: MemoryNetwork, port: int) -> None:
        self.id = NodeId(me.key.id)
        self.address = Address("memory", port)
        transport = MemoryTransport(lambda: me, network, self.address)
        self.links = Links(transport, self.id, self)
        self.told: list[tuple[object, ...]] = []

    def link_up(self, peer: Peer) -> None:
        self.told.append(("up", peer.node))

    def link_down(self, node: NodeId) -> None:
        self.told.append(("down", node))

    def message_received(self, node: NodeId, message: Message) -> None:
        self.told.append(("message", node, message))

    def dial_failed(self, node: NodeId | None, *, nobody_there: bool) -> None:
        self.told.append(("failed", node, nobody_there))

    def refused(self, sentence: str) -> None:
        self.told.append(("refused", sentence))


@asynccontextmanager
async def running(*makers: Callable[[MemoryNetwork], Story]) -> AsyncIterator[list[Story]]:
    network = MemoryNetwork()
    stories = [make(network) for make in makers]
    async with trio.open_nursery() as nursery:
        for story in stories:
            await nursery.start(story.links.run, {})
        with trio.fail_after(60):
            yield stories
        nursery.cancel_scope.cancel()


def anna(network: MemoryNetwork) -> Story:
    return Story(ANNA, network, 1)


def bert(network: MemoryNetwork) -> Story:
    return Story(BERT, network, 2)

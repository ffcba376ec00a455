"""Which handler a connection gets; the contract of transports runs it over real connections."""

from __future__ import annotations

import pytest
import trio
from trio.testing import memory_stream_pair

from p2pmesh.config import Address
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import ANYBODY, GOSSIP, HELLO, HTTP, Needs, Peer
from p2pmesh.identity.keys import NodeId
from p2pmesh.transport.base import Channel, Service
from p2pmesh.transport.channel import open_channel
from p2pmesh.transport.dispatch import Services
from tests.transport.networks import MESH

REMOTE = Address("192.168.1.5", 9338)


def peer(purpose: str) -> Peer:
    return Peer(
        node=NodeId(b"p" * 16),
        public=b"k" * 32,
        instance=1,
        mesh=MESH,
        mesh_name="home",
        purpose=purpose,
        version=2,
        clock_ahead_s=0,
    )


HTTP_NEEDS, FILES_NEEDS = Needs(Role.USE), Needs(Role.SERVE, stage=True)


class Calls:
    """Handlers of a node, and which of them were called with whom."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Peer, Address | None]] = []
        self.services = Services(
            self._channel,
            {HTTP: Service(self._http, HTTP_NEEDS), "files": Service(self._files, FILES_NEEDS)},
        )

    async def _channel(self, channel: Channel) -> None:
        self.seen.append(("channel", channel.peer, channel.remote))

    async def _http(self, peer: Peer, stream: trio.abc.Stream) -> None:
        self.seen.append(("http", peer, None))

    async def _files(self, peer: Peer, stream: trio.abc.Stream) -> None:
        self.seen.append(("files", peer, None))


def test_the_hello_lets_in_what_has_a_handler() -> None:
    assert Calls().services.purposes == {
        GOSSIP: Needs(Role.SERVE),
        HELLO: ANYBODY,
        HTTP: HTTP_NEEDS,
        "files": FILES_NEEDS,
    }


@pytest.mark.parametrize("purpose", [HTTP, "files"])
async def test_a_stream_goes_to_the_handler_of_its_purpose(purpose: str) -> None:
    calls = Calls()
    await calls.services.dispatch(peer(purpose), memory_stream_pair()[0], remote=REMOTE)
    assert calls.seen == [(purpose, peer(purpose), None)]


async def test_a_mere_hello_reaches_nobody() -> None:
    calls = Calls()
    await calls.services.dispatch(peer(HELLO), memory_stream_pair()[0], remote=REMOTE)
    assert calls.seen == []


async def test_gossip_becomes_a_channel() -> None:
    calls = Calls()
    near, far = memory_stream_pair()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await calls.services.dispatch(peer(GOSSIP), far, remote=REMOTE)

        nursery.start_soon(serve)
        async with open_channel(near, peer=peer(GOSSIP), remote=REMOTE, outgoing=True):
            pass
    assert calls.seen == [("channel", peer(GOSSIP), REMOTE)]

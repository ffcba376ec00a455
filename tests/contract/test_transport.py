"""What every transport promises, run on each of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from p2pmesh.errors import LinkError, MeshError, PeerError
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import (
    ANYBODY,
    HTTP,
    JOIN,
    ROLE,
    STRANGER,
    LocalIdentity,
    Needs,
    Peer,
    RefusedError,
)
from p2pmesh.identity.keys import MeshId, NodeId
from p2pmesh.transport.base import Channel, NobodyThereError, Service, Transport
from p2pmesh.wire.messages import MESSAGE_BYTES_MAX
from tests.transport.networks import MemoryNodes, Nodes, TlsNodes, someone

ANNA, BERT = someone(1), someone(2)


@pytest.fixture(params=[MemoryNodes, TlsNodes], ids=["memory", "tls"])
async def nodes(request: pytest.FixtureRequest) -> AsyncIterator[Nodes]:
    made: Nodes = request.param()
    yield made
    await made.aclose()


class Host:
    """A listening node that keeps what reaches it."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._channels, self.channels = trio.open_memory_channel[Channel](8)
        self._streams, self.streams = trio.open_memory_channel[tuple[Peer, trio.abc.Stream]](8)
        self.files: list[Peer] = []
        self.newcomers: list[Peer] = []

    async def on_channel(self, channel: Channel) -> None:
        await self._channels.send(channel)
        await trio.sleep_forever()

    async def on_stream(self, peer: Peer, stream: trio.abc.Stream) -> None:
        await self._streams.send((peer, stream))
        await trio.sleep_forever()

    async def on_files(self, peer: Peer, stream: trio.abc.Stream) -> None:
        self.files.append(peer)
        await stream.send_all(b"files")

    async def on_newcomer(self, peer: Peer, stream: trio.abc.Stream) -> None:
        self.newcomers.append(peer)
        await stream.send_all(b"welcome")


@asynccontextmanager
async def hosting(nodes: Nodes, me: LocalIdentity) -> AsyncIterator[Host]:
    host = Host(await nodes.add(me))
    async with trio.open_nursery() as nursery:
        handlers = {
            HTTP: Service(host.on_stream, Needs(Role.USE)),
            "files": Service(host.on_files, Needs(Role.SERVE)),
            "stages": Service(host.on_files, Needs(Role.SERVE, stage=True)),
            JOIN: Service(host.on_newcomer, ANYBODY),
        }
        await nursery.start(host.transport.serve, host.on_channel, handlers)
        with trio.fail_after(10):
            yield host
        nursery.cancel_scope.cancel()


async def test_messages_pass_both_ways_whole_and_in_order(nodes: Nodes) -> None:
    async with hosting(nodes, BERT) as bert:
        anna = await nodes.add(ANNA)
        async with anna.dial(bert.transport.address, expected=NodeId(BERT.key.id)) as near:
            far = await bert.channels.receive()
            assert (near.peer.node, near.outgoing) == (BERT.key.id, True)
            assert (far.peer.node, far.outgoing) == (ANNA.key.id, False)
            for message in (b"", b"one", bytes(MESSAGE_BYTES_MAX // 2)):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(near.send, message)
                    assert await far.receive() == message
            await far.send(b"back")
            assert await near.receive() == b"back"


async def test_the_end_of_a_channel_reaches_the_other_side(nodes: Nodes) -> None:
    async with hosting(nodes, BERT) as bert:
        anna = await nodes.add(ANNA)
        async with anna.dial(bert.transport.address, expected=None):
            far = await bert.channels.receive()
        with pytest.raises(LinkError):
            await far.receive()


async def test_streams_carry_bytes_and_their_end(nodes: Nodes) -> None:
    async with hosting(nodes, BERT) as bert:
        anna = await nodes.add(ANNA)
        near = await anna.open_stream(bert.transport.address, HTTP, expected=NodeId(BERT.key.id))
        peer, far = await bert.streams.receive()
        assert (peer.node, peer.purpose) == (ANNA.key.id, HTTP)
        await near.send_all(b"request")
        assert await far.receive_some(100) == b"request"
        await far.send_all(b"response")
        assert await near.receive_some(100) == b"response"
        await near.aclose()
        assert await far.receive_some(100) == b""


async def test_each_purpose_has_its_own_handler(nodes: Nodes) -> None:
    async with hosting(nodes, BERT) as bert:
        anna = await nodes.add(ANNA)
        where, expected = bert.transport.address, NodeId(BERT.key.id)
        async with await anna.open_stream(where, "files", expected=expected) as near:
            assert await near.receive_some(100) == b"files"
            assert await near.receive_some(100) == b"", "closed when the handler returns"
        assert [(peer.node, peer.purpose) for peer in bert.files] == [(ANNA.key.id, "files")]
        with pytest.raises(trio.WouldBlock):
            bert.streams.receive_nowait()


@pytest.mark.parametrize("purpose", ["rpc", "stream", ""])
async def test_a_purpose_without_a_handler_is_refused_by_name(nodes: Nodes, purpose: str) -> None:
    async with hosting(nodes, BERT) as bert:
        anna = await nodes.add(ANNA)
        where, expected = bert.transport.address, NodeId(BERT.key.id)
        with pytest.raises(RefusedError, match=f"this node does not offer '{purpose}'"):
            await anna.open_stream(where, purpose, expected=expected)
        near = await anna.open_stream(where, HTTP, expected=expected)
        assert (await bert.streams.receive())[0].node == ANNA.key.id, "others are still served"
        await near.aclose()


async def test_another_node_than_expected_is_refused(nodes: Nodes) -> None:
    async with hosting(nodes, BERT) as bert:
        anna = await nodes.add(ANNA)
        with pytest.raises(RefusedError, match="another node"):
            await anna.open_stream(bert.transport.address, HTTP, expected=NodeId(b"x" * 16))


async def test_a_node_of_another_mesh_is_told_so(nodes: Nodes) -> None:
    async with hosting(nodes, BERT) as bert:
        stranger = await nodes.add(someone(3, mesh=MeshId(b"n" * 16)))
        with pytest.raises(RefusedError, match="another mesh"):
            async with stranger.dial(bert.transport.address, expected=None):
                pass


async def test_a_newcomer_without_a_mesh_learns_which_it_is(nodes: Nodes) -> None:
    async with hosting(nodes, BERT) as bert:
        newcomer = await nodes.add(someone(3, mesh=None))
        stream, peer = await newcomer.ask(bert.transport.address, JOIN, someone(4, mesh=None))
        assert (peer.mesh, peer.mesh_name) == (BERT.mesh, "home")
        assert (await stream.receive_some(100)) == b"welcome"
        await stream.aclose()
        assert [(peer.node, peer.credential) for peer in bert.newcomers] == [
            (someone(4).key.id, None)
        ]


@pytest.mark.parametrize(
    ("me", "purpose", "why"),
    [
        (someone(3, mesh=None), HTTP, STRANGER),
        (someone(3, mesh=None), "files", STRANGER),
        (someone(3, role=Role.USE), "files", ROLE),
        (someone(3, role=Role.ADMIN), "stages", ROLE),
    ],
)
async def test_a_service_is_for_those_that_may_have_it(
    nodes: Nodes, me: LocalIdentity, purpose: str, why: str
) -> None:
    async with hosting(nodes, BERT) as bert:
        caller = await nodes.add(me)
        with pytest.raises(RefusedError) as refused:
            await caller.open_stream(bert.transport.address, purpose, expected=NodeId(BERT.key.id))
        assert refused.value.why == why
        assert not bert.files


async def test_who_is_not_good_any_more_is_cut_off_and_nobody_else(nodes: Nodes) -> None:
    async with hosting(nodes, BERT) as bert:
        where, expected = bert.transport.address, NodeId(BERT.key.id)
        anna, carl = await nodes.add(ANNA), await nodes.add(someone(3))
        near = await anna.open_stream(where, HTTP, expected=expected)
        await bert.streams.receive()
        others = await carl.open_stream(where, HTTP, expected=expected)
        _, far = await bert.streams.receive()
        bert.transport.cut_off(lambda peer: peer.node != ANNA.key.id)
        with contextlib.suppress(trio.BrokenResourceError):
            assert await near.receive_some(100) == b""
        await trio.aclose_forcefully(near)
        await others.send_all(b"still here")
        assert await far.receive_some(100) == b"still here"
        await others.aclose()


async def test_a_mere_hello_tells_who_is_there_and_opens_nothing(nodes: Nodes) -> None:
    async with hosting(nodes, BERT) as bert:
        newcomer = await nodes.add(someone(3, mesh=None))
        peer = await newcomer.introduce(bert.transport.address)
        assert (peer.node, peer.mesh, peer.mesh_name) == (BERT.key.id, BERT.mesh, "home")
        await trio.sleep(0.01)
        with pytest.raises(trio.WouldBlock):
            bert.channels.receive_nowait()


async def test_nobody_there_is_told_apart_at_once(nodes: Nodes) -> None:
    async with hosting(nodes, BERT) as bert:
        address = bert.transport.address
    anna = await nodes.add(ANNA)
    with pytest.raises(NobodyThereError):
        async with anna.dial(address, expected=None):
            pass


async def test_a_message_over_the_limit_ends_the_channel(nodes: Nodes) -> None:
    async with hosting(nodes, BERT) as bert:
        anna = await nodes.add(ANNA)
        with pytest.RaisesGroup(MeshError, flatten_subgroups=True):
            async with anna.dial(bert.transport.address, expected=None) as near:
                far = await bert.channels.receive()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(near.send, bytes(MESSAGE_BYTES_MAX + 1))
                    with pytest.raises((LinkError, PeerError)):
                        await far.receive()
                await near.receive()

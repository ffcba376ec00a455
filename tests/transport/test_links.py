from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.config import Address
from p2pmesh.errors import PeerError
from p2pmesh.identity.hello import Peer, Self
from p2pmesh.identity.keys import NodeId
from p2pmesh.transport.links import SEND_QUEUE_MAX, Links
from p2pmesh.transport.memory import MemoryNetwork, MemoryTransport
from tests.transport.networks import someone

ANNA, BERT = sorted((someone(1), someone(2)), key=lambda me: me.key.id)


class Story:
    """Links of one node, and what they told it."""

    def __init__(self, me: Self, network: MemoryNetwork, port: int) -> None:
        self.id = NodeId(me.key.id)
        self.address = Address("memory", port)
        transport = MemoryTransport(lambda: me, network, self.address)
        self.links = Links(transport, self.id, self)
        self.told: list[tuple[object, ...]] = []

    def link_up(self, peer: Peer) -> None:
        self.told.append(("up", peer.node))

    def link_down(self, node: NodeId) -> None:
        self.told.append(("down", node))

    def message_received(self, node: NodeId, message: bytes) -> None:
        if message == b"junk":
            raise PeerError("junk")
        self.told.append(("message", node, message))

    def dial_failed(self, node: NodeId | None, *, nobody_there: bool) -> None:
        self.told.append(("failed", node, nobody_there))

    async def on_stream(self, peer: Peer, stream: trio.abc.Stream) -> None:
        raise AssertionError("no streams here")


@asynccontextmanager
async def running(*makers: Callable[[MemoryNetwork], Story]) -> AsyncIterator[list[Story]]:
    network = MemoryNetwork()
    stories = [make(network) for make in makers]
    async with trio.open_nursery() as nursery:
        for story in stories:
            await nursery.start(story.links.run, story.on_stream)
        with trio.fail_after(60):
            yield stories
        nursery.cancel_scope.cancel()


def anna(network: MemoryNetwork) -> Story:
    return Story(ANNA, network, 1)


def bert(network: MemoryNetwork) -> Story:
    return Story(BERT, network, 2)


async def test_messages_reach_the_other_node(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        a.links.send(b.id, b"one")
        a.links.send(b.id, b"two")
        b.links.send(a.id, b"back")
        await wait_all_tasks_blocked()
        assert b.told == [("up", a.id), ("message", a.id, b"one"), ("message", a.id, b"two")]
        assert a.told == [("up", b.id), ("message", b.id, b"back")]


async def test_two_that_dial_each_other_keep_one_link(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        b.links.dial(a.id, [a.address])
        await wait_all_tasks_blocked()
        assert a.links.linked == {b.id}
        assert b.links.linked == {a.id}
        assert ("down", b.id) not in a.told
        assert a.links._links[b.id].outgoing
        assert not b.links._links[a.id].outgoing
        a.links.send(b.id, b"still here")
        await wait_all_tasks_blocked()
        assert b.told[-1] == ("message", a.id, b"still here")


async def test_a_restarted_peer_replaces_its_old_link(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        b.links.dial(a.id, [a.address])
        await wait_all_tasks_blocked()
        reborn = Self(key=BERT.key, instance=2, mesh=BERT.mesh)
        async with trio.open_nursery() as nursery:
            network = MemoryNetwork()
            network.listening = a.links._transport._network.listening  # type: ignore[attr-defined]
            again = Story(reborn, network, 3)
            await nursery.start(again.links.run, again.on_stream)
            again.links.dial(a.id, [a.address])
            await wait_all_tasks_blocked()
            assert a.links._links[b.id].peer.instance == 2
            nursery.cancel_scope.cancel()


async def test_who_is_not_there_is_reported_at_once(autojump_clock: MockClock) -> None:
    async with running(anna) as (a,):
        a.links.dial(NodeId(BERT.key.id), [Address("memory", 9)])
        await wait_all_tasks_blocked()
        assert a.told == [("failed", BERT.key.id, True)]


async def test_the_first_address_that_leads_there_wins(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [Address("memory", 9), a.address, b.address])
        await trio.sleep(5)
        assert a.links.linked == {b.id}
        assert a.told == [("up", b.id)]


async def test_a_silent_address_is_given_up_in_time(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        network: MemoryNetwork = a.links._transport._network  # type: ignore[attr-defined]
        network.unreachable.add(b.address)
        a.links.dial(b.id, [b.address])
        await trio.sleep(4)
        assert a.told == [("failed", b.id, False)]


async def test_a_peer_that_breaks_the_protocol_loses_its_link(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        a.links.send(b.id, b"junk")
        await trio.sleep(5)
        assert b.told == [("up", a.id), ("down", a.id)]
        assert a.told[-1] == ("down", b.id)


async def test_a_peer_that_reads_nothing_loses_its_link(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        link = a.links._links[b.id]
        for _ in range(SEND_QUEUE_MAX + 2):  # no checkpoint: the writer cannot run
            a.links.send(b.id, b"x")
        await trio.sleep(5)
        assert link.reason == "the peer takes messages too slowly"
        assert a.told[-1] == ("down", b.id)


async def test_sending_while_a_link_ends_is_harmless(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        a.links.close(b.id)
        for _ in range(50):
            a.links.send(b.id, b"x")
            await trio.lowlevel.checkpoint()
        assert a.links.linked == frozenset()
        assert a.told[-1] == ("down", b.id)


async def test_finishing_sends_what_is_queued(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        a.links.send(b.id, b"goodbye")
        await a.links.finish(deadline_s=5)
        await wait_all_tasks_blocked()
        assert b.told[-2:] == [("message", a.id, b"goodbye"), ("down", a.id)]
        assert a.links.linked == frozenset()

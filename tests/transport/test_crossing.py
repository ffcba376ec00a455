"""Which of two links between the same nodes stays."""

from __future__ import annotations

import dataclasses

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.transport.links import CROSSING_S
from p2pmesh.transport.memory import MemoryNetwork
from tests.transport.stories import BERT, Story, anna, bert, running, word


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
        a.links.send(b.id, word(1))
        await wait_all_tasks_blocked()
        assert b.told[-1] == ("message", a.id, word(1))


async def test_a_restarted_peer_replaces_its_old_link(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        b.links.dial(a.id, [a.address])
        await wait_all_tasks_blocked()
        reborn = dataclasses.replace(BERT, instance=2)
        async with trio.open_nursery() as nursery:
            network = MemoryNetwork()
            network.listening = a.links._transport._network.listening  # type: ignore[attr-defined]
            again = Story(reborn, network, 3)
            await nursery.start(again.links.run, {})
            again.links.dial(a.id, [a.address])
            await wait_all_tasks_blocked()
            assert a.links._links[b.id].peer.instance == 2
            nursery.cancel_scope.cancel()


async def test_who_dials_again_later_has_lost_its_end_of_the_link(
    autojump_clock: MockClock,
) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        older = a.links._links[b.id]
        b.links.dial(None, [a.address])
        await wait_all_tasks_blocked()
        assert a.links._links[b.id] is older, "it may have been under way before"
        await trio.sleep(CROSSING_S)
        b.links.dial(None, [a.address])
        await wait_all_tasks_blocked()
        assert a.links._links[b.id] is not older
        assert not a.links._links[b.id].outgoing
        b.links.send(a.id, word(1))
        await wait_all_tasks_blocked()
        assert a.told[-1] == ("message", b.id, word(1))

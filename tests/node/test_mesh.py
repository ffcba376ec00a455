from __future__ import annotations

import contextlib

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.config import Address
from p2pmesh.errors import LinkError, PeerError
from p2pmesh.gossip.core import TICK
from p2pmesh.gossip.events import Event, Health, TimerFired
from p2pmesh.gossip.probe import PROBE_INTERVAL_S
from p2pmesh.identity.hello import HTTP
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.node.mesh import CREDENTIALS_INTERVAL_S, Mesh, PlanAgreement
from p2pmesh.state.forks import HOLD_S
from p2pmesh.state.owner_records import EXPIRY_GRACE_S
from p2pmesh.wire.messages import Push
from p2pmesh.wire.registers import CAPS, MEMBER
from tests.identity.builders import credential
from tests.node.meshes import (
    CAPS_BODY,
    SPREAD_S,
    Meshes,
    Started,
    budget,
    clock,
    meshes,
    peer_of,
    until,
)
from tests.state.builders import KEYS, NOW, fork, member, record

AGREED_S = 6.0  # a removal
LEASE_S = 360.0  # by then the lease of a node that does not renew it has run out, grace and all


async def five(world: Meshes) -> list[Started]:
    started = [await world.start(number) for number in range(1, 6)]
    await trio.sleep(SPREAD_S)
    return started


async def freeze(started: Started, world: Meshes, patch: pytest.MonkeyPatch) -> None:
    """SIGSTOP: it takes nothing in and says nothing; new connections hang."""

    def swallow(event: Event) -> None:
        pass

    patch.setattr(started.mesh, "_feed", swallow)
    world.network.unreachable.add(started.address)


# What is said


async def test_five_that_know_one_of_them_are_all_linked(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        everybody = await five(world)
        ids = {one.mesh.me for one in everybody}
        for one in everybody:
            assert one.mesh.linked == ids - {one.mesh.me}
            assert {view.member.name for view in one.mesh.view.nodes.values()} == {
                f"node-{number}" for number in range(1, 6)
            }
            assert {one.mesh.health(node) for node in ids} == {Health.LIVE}
            assert one.mesh.dead == frozenset()


async def test_what_one_publishes_all_see_and_are_told_of(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        _, _, speaker, *_ = everybody = await five(world)
        seen = {one.mesh.me: one.mesh.changes.count for one in everybody}
        speaker.mesh.publish(CAPS, CAPS_BODY)
        await wait_all_tasks_blocked()
        for one in everybody:
            assert budget(one.mesh, speaker.mesh.me) == 4 << 30
            assert one.mesh.changes.count > seen[one.mesh.me]
        speaker.mesh.publish(CAPS, None)
        await wait_all_tasks_blocked()
        assert {budget(one.mesh, speaker.mesh.me) for one in everybody} == {None}


async def test_saying_the_same_again_is_no_news(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        one = await world.start(1)
        one.mesh.publish(CAPS, CAPS_BODY)
        seen = one.mesh.changes.count
        one.mesh.publish(CAPS, dict(CAPS_BODY))
        assert one.mesh.changes.count == seen


async def test_the_view_is_made_once_per_change(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        one = await world.start(1)
        view = one.mesh.view
        assert one.mesh.view is view
        one.mesh.publish(CAPS, CAPS_BODY)
        assert one.mesh.view is not view
        assert view.nodes[one.mesh.me].caps is None


async def test_a_goodbye_arrives_before_the_link_ends(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first, second, *_ = await five(world)
        second.mesh.publish(MEMBER, member("node-2", addresses=(), left=True).to_wire())
        await second.mesh.finish(deadline_s=1)
        await wait_all_tasks_blocked()
        assert second.mesh.me not in first.mesh.view.nodes
        assert second.mesh.linked == frozenset()
        assert second.mesh.me in second.mesh.view.nodes, "it is here until it is gone"


async def test_the_address_book_holds_the_others(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first, second, *_ = everybody = await five(world)
        book = first.mesh.book
        assert set(book) == {one.mesh.me for one in everybody} - {first.mesh.me}
        assert book[second.mesh.me] == (second.address,)
        await world.crash(second)
        await trio.sleep(LEASE_S)
        assert second.mesh.me not in first.mesh.view.nodes
        assert first.mesh.book[second.mesh.me] == (second.address,)


async def test_a_book_leads_back_without_a_seed(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first = await world.start(1)
        book = {first.mesh.me: (Address("memory", 99), first.address)}
        second = await world.start(2, seeds=(), book=book)
        await trio.sleep(SPREAD_S)
        assert second.mesh.linked == {first.mesh.me}


# Who is there


async def test_a_crash_is_seen_at_once_and_soon_agreed_and_so_is_a_restart(
    autojump_clock: MockClock,
) -> None:
    async with meshes() as world:
        *others, last = await five(world)
        watched = {one.mesh.me: one.mesh.suspected(last.mesh.me) for one in others}
        assert not any(event.is_set() for event in watched.values())
        await world.crash(last)
        for one in others:
            assert one.mesh.health(last.mesh.me) is Health.SUSPECT
            assert watched[one.mesh.me].is_set()
            assert one.mesh.suspected(last.mesh.me).is_set()
            assert one.mesh.dead == frozenset(), "routing is quicker than placement"
        await trio.sleep(AGREED_S)
        for one in others:
            assert one.mesh.dead == {last.mesh.me}
            assert one.mesh.health(last.mesh.me) is Health.DEAD
            assert last.mesh.me in one.mesh.view.nodes, "its record lives as long as its lease"
        await world.start(5, instance=50, epoch=NOW + 60)
        await trio.sleep(SPREAD_S)
        for one in others:
            assert one.mesh.dead == frozenset()
            assert one.mesh.health(last.mesh.me) is Health.LIVE
            assert not one.mesh.suspected(last.mesh.me).is_set()
            assert watched[one.mesh.me].is_set(), "who waited with it gave up on that node"


async def test_a_frozen_node_is_suspected_then_dead_then_trusted(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with meshes() as world:
        first, second = await world.start(1), await world.start(2)
        await trio.sleep(SPREAD_S)
        event = first.mesh.suspected(second.mesh.me)
        with monkeypatch.context() as patch:
            await freeze(second, world, patch)
            with trio.fail_after(2):
                await event.wait()
            assert first.mesh.health(second.mesh.me) is Health.SUSPECT
            assert first.mesh.dead == frozenset()
            with trio.fail_after(AGREED_S):
                await until(first.mesh, lambda: first.mesh.dead == {second.mesh.me})
        world.network.unreachable.clear()
        second.mesh._feed(TimerFired(token=TICK))  # it goes on where it stood still
        with trio.fail_after(60):
            await until(first.mesh, lambda: first.mesh.health(second.mesh.me) is Health.LIVE)
        assert first.mesh.dead == frozenset()
        assert not first.mesh.suspected(second.mesh.me).is_set()


async def test_a_long_sleep_takes_nobody_out_for_long(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with meshes() as world:
        *others, sleeper = await five(world)
        with monkeypatch.context() as patch:
            await freeze(sleeper, world, patch)
            await trio.sleep(LEASE_S)
            assert all(sleeper.mesh.me not in one.mesh.view.nodes for one in others)
        world.network.unreachable.clear()
        sleeper.mesh._feed(TimerFired(token=TICK))
        assert sleeper.mesh.catching_up, "it does nothing rash"
        await trio.sleep(60)
        for one in (*others, sleeper):
            assert len(one.mesh.view.nodes) == 5
            assert one.mesh.dead == frozenset()
            assert not one.mesh.catching_up


async def test_a_fork_takes_its_owner_out_and_all_are_told_when_that_ends(
    autojump_clock: MockClock,
) -> None:
    async with meshes() as world:
        first, second = await world.start(1), await world.start(2)
        liar = await world.start(3, key=KEYS[2])
        await trio.sleep(SPREAD_S)
        lie = fork(2, "load", issued_at=int(clock()))
        first.mesh.message_received(second.mesh.me, Push(forks=(lie.raw,)))
        await wait_all_tasks_blocked()
        everybody = (first, second, liar)
        assert [one.mesh.dead for one in everybody] == [{liar.mesh.me}] * 3
        told = [0.0] * 3

        async def hear(number: int, mesh: Mesh) -> None:
            await until(mesh, lambda: not mesh.dead)
            told[number] = clock()

        with trio.fail_after(2 * HOLD_S):
            async with trio.open_nursery() as nursery:
                for number, one in enumerate(everybody):
                    nursery.start_soon(hear, number, one.mesh)
        ended = lie.issued_at + HOLD_S
        assert all(ended <= at <= ended + PROBE_INTERVAL_S for at in told)


async def test_who_was_never_reached_is_suspected(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first = world.make(1)
        assert first.mesh.suspected(NodeId(b"n" * 16)).is_set()
        assert not first.mesh.suspected(first.mesh.me).is_set()


async def test_round_trips_are_measured(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first, second = await world.start(1), await world.start(2)
        assert first.mesh.rtt_s(second.mesh.me) is None
        await trio.sleep(SPREAD_S)
        assert first.mesh.rtt_s(second.mesh.me) == pytest.approx(0, abs=0.01)


async def test_whose_credential_runs_out_is_parted_with(autojump_clock: MockClock) -> None:
    key = SigningKey(b"k" * 32)
    own = credential(key, now=NOW, ttl_s=100)
    async with meshes() as world:
        first, second = await world.start(1), await world.start(2)
        ending = await world.start(3, key=key, own=own)
        await trio.sleep(SPREAD_S)
        stream = await ending.mesh.open_stream(first.mesh.me, HTTP)
        assert first.mesh.linked == {second.mesh.me, ending.mesh.me}
        await trio.sleep_until(100 + EXPIRY_GRACE_S - 1)
        assert ending.mesh.me in first.mesh.linked, "clocks differ a little"
        await trio.sleep(CREDENTIALS_INTERVAL_S + 2)
        assert first.mesh.linked == {second.mesh.me}
        with contextlib.suppress(trio.BrokenResourceError):
            assert await stream.receive_some() == b""
        await stream.aclose()


async def test_junk_costs_the_sender_its_link_only(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first, second, third, *_ = await five(world)
        second.mesh._links._links[first.mesh.me].send_nowait(b"junk", bulk=False)
        await wait_all_tasks_blocked()
        assert second.mesh.me not in first.mesh.linked
        assert third.mesh.me in first.mesh.linked
        await trio.sleep(SPREAD_S)
        assert second.mesh.me in first.mesh.linked, "it came back with better manners"
        assert first.mesh.dead == frozenset()


async def test_a_forged_record_costs_the_sender_its_link_and_changes_nothing(
    autojump_clock: MockClock,
) -> None:
    async with meshes() as world:
        first, second, third, *_ = await five(world)
        before = first.mesh._core.document.fingerprint
        forged = bytearray(record(0, CAPS, epoch=NOW, body=CAPS_BODY).raw)
        forged[0] ^= 1
        second.mesh._links.send(first.mesh.me, Push(records=(bytes(forged),)))
        with structlog.testing.capture_logs() as logs:
            await wait_all_tasks_blocked()
        cut_off = next(entry for entry in logs if entry["event"] == "peer_cut_off")
        assert (cut_off["pause_s"], cut_off["log_level"]) == (1.0, "warning")
        assert second.mesh.me not in first.mesh.linked
        assert first.mesh.linked >= {third.mesh.me}
        assert first.mesh._core.document.fingerprint == before


async def test_a_clock_that_differs_is_logged(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first = await world.start(1)
        other = peer_of(SigningKey(bytes([2]) * 32), clock_ahead_s=-90)
        with structlog.testing.capture_logs() as logs:
            first.mesh.link_up(other)
        assert (logs[0]["event"], logs[0]["ahead_s"]) == ("clock_differs", -90)
        assert first.mesh.linked == {other.node}


# Agreement


async def test_agreement_counts_the_linked(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first, second, third = [await world.start(number) for number in (1, 2, 3)]
        await trio.sleep(SPREAD_S)
        for one in (first, second, third):
            one.mesh.set_plan(b"p" * 16)
        await trio.sleep(2)
        assert first.mesh.agreement == PlanAgreement(same=2, asked=2)
        seen = first.mesh.changes.count
        third.mesh.set_plan(b"q" * 16)
        await trio.sleep(2)
        assert first.mesh.agreement == PlanAgreement(same=1, asked=2)
        assert third.mesh.agreement == PlanAgreement(same=0, asked=2)
        assert first.mesh.changes.count > seen, "who shows it looks again"
        await world.crash(third)
        assert first.mesh.agreement == PlanAgreement(same=1, asked=1)


async def test_a_new_plan_of_its_own_is_a_change(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first = world.make(1)
        seen = first.mesh.changes.count
        first.mesh.set_plan(b"p" * 16)
        assert first.mesh.changes.count == seen + 1
        assert first.mesh.agreement == PlanAgreement(same=0, asked=0)


# Streams


async def test_a_stream_reaches_the_node(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first, second = await world.start(1), await world.start(2)
        await trio.sleep(SPREAD_S)
        async with await first.mesh.open_stream(second.mesh.me, HTTP) as stream:
            await stream.send_all(b"a question")
            assert await stream.receive_some() == b"an answer"
        assert second.streams == [(first.mesh.me, b"a question")]


async def test_a_stream_for_what_the_node_does_not_offer_is_a_peer_error(
    autojump_clock: MockClock,
) -> None:
    async with meshes() as world:
        first, second = await world.start(1), await world.start(2)
        await trio.sleep(SPREAD_S)
        with pytest.raises(PeerError, match="this node does not offer 'rpc'"):
            await first.mesh.open_stream(second.mesh.me, "rpc")
        assert second.streams == []
        assert first.mesh.health(second.mesh.me) is Health.LIVE


async def test_a_stream_takes_the_first_address_that_leads_there(
    autojump_clock: MockClock,
) -> None:
    async with meshes() as world:
        first, second, third = [await world.start(number) for number in (1, 2, 3)]
        ways = (Address("memory", 99), third.address, second.address)
        second.mesh.publish(MEMBER, member("node-2", addresses=ways).to_wire())
        await trio.sleep(SPREAD_S)
        async with await first.mesh.open_stream(second.mesh.me, HTTP) as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"an answer"
        assert third.streams == []
        second.mesh.publish(MEMBER, member("node-2", addresses=ways[:2]).to_wire())
        await wait_all_tasks_blocked()
        with pytest.raises(PeerError):  # the last reason: somebody else answers there
            await first.mesh.open_stream(second.mesh.me, HTTP)


async def test_a_stream_to_nowhere_is_a_link_error(autojump_clock: MockClock) -> None:
    async with meshes() as world:
        first, second = await world.start(1), await world.start(2)
        with pytest.raises(LinkError, match="has no address"):
            await first.mesh.open_stream(NodeId(b"n" * 16), HTTP)
        await trio.sleep(SPREAD_S)
        await world.crash(second)
        with pytest.raises(LinkError, match="nothing listens there"):
            await first.mesh.open_stream(second.mesh.me, HTTP)

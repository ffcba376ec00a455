from __future__ import annotations

import itertools
import time
from dataclasses import replace
from functools import partial

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.config import Address
from p2pmesh.identity.hello import LocalIdentity
from p2pmesh.identity.keys import NodeId
from p2pmesh.transport import links as module
from p2pmesh.transport.banlist import BAR_FIRST_S
from p2pmesh.transport.base import SEND_TIMEOUT_S
from p2pmesh.transport.links import CORE_SHARE, DISMISS_S, MESSAGES_RATE_PER_S, is_bulk
from p2pmesh.transport.memory import MemoryNetwork
from p2pmesh.transport.outbox import MESSAGES_MAX
from p2pmesh.wire.messages import (
    CHUNK_BYTES_MAX,
    Ack,
    FetchRequest,
    Items,
    Message,
    Own,
    Ping,
    ProbeRequest,
    Push,
    Ranges,
    Unknown,
    encode_message,
)
from tests.transport.networks import someone
from tests.transport.stories import ANNA, BERT, SOMEBODY, Story, anna, bert, running, word

NEWS = [Push(records=(b"news %d" % number,)) for number in range(3)]
CHUNK = Push(records=(bytes(CHUNK_BYTES_MAX // 2),) * 2, asked=True)


async def test_messages_reach_the_other_node(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        a.links.send(b.id, word(1))
        a.links.send(b.id, word(2))
        b.links.send(a.id, CHUNK)
        await wait_all_tasks_blocked()
        assert b.told == [("up", a.id), ("message", a.id, word(1)), ("message", a.id, word(2))]
        assert a.told == [("up", b.id), ("message", b.id, CHUNK)]


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


JUNK = {
    "noise": bytes(range(256)),
    "nothing": b"",
    "no map": b"\xc3",
    "nested without end": b"\x91" * 100_000,
    "cut off": encode_message(CHUNK)[:-1],
    "a byte too many": encode_message(word(1)) + b"\0",
    "a field that is missing": b"\x81\xa1t\xa4want",
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
async def test_a_peer_that_breaks_the_protocol_loses_its_link(
    junk: bytes, autojump_clock: MockClock
) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        a.links._links[b.id].send_nowait(junk, bulk=False)
        a.links.send(b.id, word(1))
        await trio.sleep(5)
        assert b.told == [("up", a.id), ("down", a.id)]
        assert a.told == [("up", b.id), ("down", b.id)]


async def test_a_message_of_an_unknown_kind_is_handed_on(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        a.links._links[b.id].send_nowait(b"\x81\xa1t\xa3new", bulk=False)
        a.links.send(b.id, word(1))
        await wait_all_tasks_blocked()
        assert b.told[1:] == [("message", a.id, Unknown(kind="new")), ("message", a.id, word(1))]


async def test_who_broke_the_protocol_is_kept_away_for_a_growing_time(
    autojump_clock: MockClock,
) -> None:
    async with running(anna, bert) as (a, b):
        for pause_s in (BAR_FIRST_S, 2 * BAR_FIRST_S, 4 * BAR_FIRST_S):
            a.links.dial(b.id, [b.address])
            await wait_all_tasks_blocked()
            assert b.links.linked == {a.id}
            b.links.cut_off(a.id, "forged records")
            await trio.sleep(pause_s - 0.3)
            b.told.clear()
            a.links.dial(b.id, [b.address])  # its hello is heard, and then it is hung up on
            b.links.dial(a.id, [a.address])  # nor does the node itself go there
            await trio.sleep(0.2)
            assert b.told == [("failed", a.id, False)]
            assert b.links.linked == a.links.linked == frozenset()
            await trio.sleep(0.2)


async def test_the_transport_hears_of_every_cut_off(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        for way in ("by bytes", "by the core"):
            with structlog.testing.capture_logs() as logs:
                a.links.dial(b.id, [b.address])
                await wait_all_tasks_blocked()
                if way == "by bytes":
                    a.links._links[b.id].send_nowait(b"junk", bulk=False)
                else:
                    b.links.cut_off(a.id, "forged records")
                    b.links.cut_off(a.id, "forged records, a second one")
                    b.links.close(a.id)
                await wait_all_tasks_blocked()
            names = [entry["event"] for entry in logs]
            assert names.count("peer_cut_off") == 1
            assert names.count("connection_dropped") == 1
            await trio.sleep(BAR_FIRST_S)


async def test_who_is_dismissed_hears_what_was_said_before(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        for number in range(3):
            a.links.send(b.id, word(number))
        a.links.dismiss(b.id)
        await wait_all_tasks_blocked()
        assert b.told[1:4] == [("message", a.id, word(number)) for number in range(3)]
        await trio.sleep(DISMISS_S + 0.1)
        assert a.links.linked == b.links.linked == frozenset()
        a.links.dismiss(b.id)  # there is nothing to dismiss
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        assert a.links.linked == {b.id}, "nobody is barred for that"


async def never(_message: bytes) -> None:
    await trio.sleep_forever()


async def test_who_is_dismissed_and_does_not_read_is_cut_off_soon(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        monkeypatch.setattr(a.links._links[b.id]._channel, "send", never)
        a.links.send(b.id, word(1))
        a.links.dismiss(b.id)
        await trio.sleep(DISMISS_S + 0.1)
        assert a.links.linked == b.links.linked == frozenset()


async def test_who_was_only_let_go_may_come_back_at_once(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        for _ in range(2):
            a.links.dial(b.id, [b.address])
            await wait_all_tasks_blocked()
            assert b.links.linked == {a.id}
            b.links.close(a.id)
            await wait_all_tasks_blocked()
            assert b.links.linked == a.links.linked == frozenset()


@pytest.mark.parametrize("message", [word(1), CHUNK], ids=["small messages", "bulk"])
async def test_a_peer_that_reads_nothing_loses_its_link(
    message: Message, autojump_clock: MockClock
) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        link = a.links._links[b.id]
        for _ in range(MESSAGES_MAX + 2):  # no checkpoint: the writer cannot run
            a.links.send(b.id, message)
        await trio.sleep(5)
        assert link.reason == "the peer takes messages too slowly"
        assert a.told[-1] == ("down", b.id)
        a.links.dial(b.id, [b.address])  # slow is not hostile
        await wait_all_tasks_blocked()
        assert a.links.linked == {b.id}


async def test_a_peer_whose_network_takes_nothing_loses_its_link(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(data: bytes) -> None:
        await trio.sleep_forever()

    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        channel = a.links._links[b.id]._channel
        websocket = channel._websocket  # type: ignore[attr-defined]
        monkeypatch.setattr(websocket._stream, "send_all", hang)
        a.links.send(b.id, word(1))
        await trio.sleep(SEND_TIMEOUT_S + 2)
        assert a.told[-1] == ("down", b.id)


async def test_what_is_urgent_overtakes_what_was_asked_for(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        for _ in range(5):
            a.links.send(b.id, CHUNK)
        a.links.send(b.id, word(1))
        await wait_all_tasks_blocked()
        assert b.told[1:] == [("message", a.id, word(1))] + [("message", a.id, CHUNK)] * 5


def test_bulk_is_what_was_asked_for() -> None:
    sign = {"token": 1, "at_ms": 1, "cutoff": 1, "fingerprint": bytes(16), "plan": bytes(16)}
    prompt: list[Message] = [
        Push(records=(b"news",)),
        Ping(**sign, keep=True),  # type: ignore[arg-type]  # of several types
        Ack(**sign, keep=True),  # type: ignore[arg-type]
        ProbeRequest(subject=SOMEBODY, token=1),
        word(1),
        FetchRequest(ids=()),
        Own(),
    ]
    bulk: list[Message] = [
        CHUNK,
        Ranges(ranges=()),
        Items(lower=b"", upper=b"", ids=(), answer=True),
    ]
    assert not any(map(is_bulk, prompt))
    assert all(map(is_bulk, bulk))


async def test_what_goes_to_many_is_encoded_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Message] = []

    def encode(message: Message) -> bytes:
        encoded.append(message)
        return encode_message(message)

    monkeypatch.setattr(module, "encode_message", encode)
    many = [partial(Story, someone(number), port=number) for number in range(3, 10)]
    async with running(anna, *many) as (a, *others):
        for one in others:
            a.links.dial(one.id, [one.address])
        await wait_all_tasks_blocked()
        for one in others:
            for number in (1, 2):  # as a flood of two messages comes out of the core
                a.links.send(one.id, NEWS[number])
        await wait_all_tasks_blocked()
        assert encoded == [NEWS[1], NEWS[2]]
        assert all(one.told[1:] == [("message", a.id, NEWS[n]) for n in (1, 2)] for one in others)
        a.links.send(others[0].id, Push(records=(b"news 1",)))
        assert len(encoded) == 3, "an equal message is another one"


async def test_who_talks_without_end_is_listened_to_at_a_pace(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MESSAGES_BURST", 100)
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await trio.sleep(1)
        for number in range(int(100 + 3 * MESSAGES_RATE_PER_S)):
            a.links.send(b.id, word(number))
        await trio.sleep(1)
        assert len(b.told) == pytest.approx(100 + MESSAGES_RATE_PER_S, abs=5)
        await trio.sleep(3)
        assert len(b.told) == 1 + 100 + 3 * MESSAGES_RATE_PER_S, "late, and none is lost"


async def test_who_gives_much_work_is_listened_to_all_the_slower(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MESSAGES_BURST", 1)
    work_s = itertools.count(0.0, 0.01)  # of a processor, for each message
    monkeypatch.setattr(time, "thread_time", lambda: next(work_s))
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await trio.sleep(1)
        for number in range(100):
            a.links.send(b.id, word(number))
        await trio.sleep(5)
        assert len(b.told) == pytest.approx(5 * CORE_SHARE / 0.01, abs=3)
        await trio.sleep(10)
        assert len(b.told) == 1 + 100, "late, and none is lost"


async def test_sending_while_a_link_ends_is_harmless(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        a.links.close(b.id)
        for _ in range(50):
            a.links.send(b.id, word(1))
            await trio.lowlevel.checkpoint()
        assert a.links.linked == frozenset()
        assert a.told[-1] == ("down", b.id)


@pytest.mark.parametrize("who", ["the peer", "this node"])
async def test_only_what_a_peer_says_is_a_refusal_of_this_node(
    who: str, autojump_clock: MockClock
) -> None:
    def revokes_all(me: LocalIdentity) -> LocalIdentity:
        return replace(me, vouch=lambda _: "revoked by kitchen")

    near, far = (ANNA, revokes_all(BERT)) if who == "the peer" else (revokes_all(ANNA), BERT)
    async with running(
        lambda network: Story(near, network, 1), lambda network: Story(far, network, 2)
    ) as (one, other):
        one.links.dial(other.id, [other.address])
        await wait_all_tasks_blocked()
    told = [("refused", "revoked by kitchen")] if who == "the peer" else []
    assert one.told == [*told, ("failed", other.id, False)]


async def test_finishing_sends_what_is_queued(autojump_clock: MockClock) -> None:
    async with running(anna, bert) as (a, b):
        a.links.dial(b.id, [b.address])
        await wait_all_tasks_blocked()
        a.links.send(b.id, CHUNK)
        a.links.send(b.id, word(1))
        await a.links.finish(deadline_s=5)
        await wait_all_tasks_blocked()
        assert b.told[1:] == [
            ("message", a.id, word(1)),
            ("message", a.id, CHUNK),
            ("down", a.id),
        ]
        assert a.links.linked == frozenset()

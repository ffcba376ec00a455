"""A node that was revoked is out at once, on whatever connection it is, and stays out."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import trio

from p2pmesh.config import parse_address
from p2pmesh.errors import LinkError
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import HTTP, JOIN, REVOKED, RefusedError
from p2pmesh.identity.keys import NodeId, parse_id, show_id
from p2pmesh.transport.tls import TlsTransport
from p2pmesh.wire.messages import Push, decode_message, encode_message
from p2pmesh.wire.registers import MEMBER
from p2pmesh.wire.statements import Revocation, parse_statement
from tests.mesh.hostile import ANSWER, Attacker, answers, ask, identity_in, member
from tests.mesh.nodes import Node, running, wait_until

CUT_WITHIN_S = 1.5  # a link lives on for half a second, so that the revoked node hears why
REQUEST = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def test_a_revoked_node_is_cut_off_everywhere(tmp_path: Path) -> None:
    with running(tmp_path, 1) as [node]:
        attacker = await Attacker.on(node)
        me, there = attacker.me, parse_address(node.me["peer"])
        transport = TlsTransport(lambda: me, [])
        to = NodeId(parse_id(node.me["id"]))
        async with trio.open_nursery() as nursery:
            heard: list[bytes] = []
            linked, cut = trio.Event(), trio.Event()

            async def old_link() -> None:
                try:
                    async with transport.dial(there, expected=to) as channel:
                        mine = attacker.record(MEMBER, member("thief"))
                        await channel.send(encode_message(Push(records=(mine,))))
                        while True:
                            message = decode_message(await channel.receive())
                            linked.set()
                            if isinstance(message, Push):
                                heard.extend(message.statements)
                except* LinkError:
                    cut.set()

            nursery.start_soon(old_link)
            await linked.wait()
            pooled = await transport.open_stream(there, HTTP, expected=to)
            await pooled.send_all(REQUEST)
            assert (await pooled.receive_some()).startswith(b"HTTP/1.1 403")  # as every peer gets
            await trio.to_thread.run_sync(
                lambda: wait_until(lambda: knows(node, "thief"), "it is a member")
            )

            await trio.to_thread.run_sync(lambda: node.order("revoke", target="thief"))
            with trio.fail_after(CUT_WITHIN_S):
                assert await pooled.receive_some() == b""
                await cut.wait()
            await trio.aclose_forcefully(pooled)
        statements = [parse_statement(raw).body for raw in heard]
        assert any(isinstance(one, Revocation) and one.target == me.key.id for one in statements)
        for purpose in (HTTP, JOIN):
            with pytest.raises(RefusedError, match="revoked by node-1") as refused:
                await transport.open_stream(there, purpose, expected=to)
            assert refused.value.why == REVOKED
        assert not knows(node, "thief")
        assert await trio.to_thread.run_sync(lambda: answers(node))


def knows(node: Node, name: str) -> bool:
    return name in {one["name"] for one in node.status()["nodes"]}


@pytest.mark.full
async def test_whom_a_revoked_node_let_in_stays_or_goes_as_it_was_said(tmp_path: Path) -> None:
    with running(tmp_path, 3) as nodes:
        founder, friend, _ = nodes
        founder.order("grant", target="node-2", what="invite")
        wait_until(lambda: may_invite(friend), "the grant is taken up")
        kept = await identity_in(friend, role=Role.SERVE)
        there = parse_address(founder.me["peer"])
        attacker = Attacker(kept, founder)
        transport = TlsTransport(lambda: kept, [])
        async with trio.open_nursery() as nursery:
            cut = trio.Event()

            async def link_of_child() -> None:
                try:
                    async with transport.dial(there, expected=None) as channel:
                        mine = attacker.record(MEMBER, member("child"))
                        await channel.send(encode_message(Push(records=(mine,))))
                        while True:
                            await channel.receive()
                except* LinkError:
                    cut.set()

            nursery.start_soon(link_of_child)
            await trio.to_thread.run_sync(
                lambda: wait_until(lambda: knows(founder, "child"), "the child is a member")
            )
            said = founder.order("revoke", target="node-2")["sentences"]
            assert any("child" in one and "stays" in one for one in said)
            with pytest.raises(RefusedError) as refused:
                later = await identity_in(friend)
                await TlsTransport(lambda: later, []).open_stream(
                    there, HTTP, expected=NodeId(parse_id(founder.me["id"]))
                )
            assert refused.value.why == REVOKED  # a stolen key lets nobody in any more
            assert (await trio.to_thread.run_sync(lambda: friend.process.wait(10))) == 1
            assert "revoked by node-1" in friend.said()
            assert knows(founder, "child")
            assert not cut.is_set()
            founder.order("revoke", target="node-2", below=True)
            with trio.fail_after(CUT_WITHIN_S):
                await cut.wait()
            assert not knows(founder, "child")
        assert await trio.to_thread.run_sync(lambda: ask(founder).text) == ANSWER
        assert show_id(kept.key.id) not in str(founder.status()["nodes"])


def may_invite(node: Node) -> bool:
    try:
        node.invite()
    except urllib.error.HTTPError as exc:
        exc.close()
        return False
    return True

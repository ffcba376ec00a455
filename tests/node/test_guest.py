from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pmesh.config import Address
from p2pmesh.errors import LocalError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Credential, Role
from p2pmesh.identity.hello import ANYBODY, HTTP, JOIN, LocalIdentity, Needs, Peer
from p2pmesh.identity.keys import SigningKey
from p2pmesh.node import guest as module
from p2pmesh.node.guest import CONNECTIONS_MAX, Guest, GuestParts
from p2pmesh.node.joining import Entry
from p2pmesh.node.keystore import MeshInfo, load_book, load_mesh
from p2pmesh.node.status import Addresses
from p2pmesh.transport.base import Channel, Service
from p2pmesh.transport.handshake import receive_frame, send_frame
from p2pmesh.transport.tls import TlsTransport
from p2pmesh.wire.codec import encode
from tests.identity.builders import MESH, credential

GUEST, MEMBER = SigningKey(b"g" * 32), SigningKey(b"h" * 32)
NOWHERE = Address("127.0.0.1", 1)
REQUEST = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
MODELS = b'HTTP/1.1 200 OK\r\n\r\n{"data": [{"id": "m", "p2pmesh": {"state": "ready"}}]}'
DEADLINE_S = 15.0

Handler = Callable[[trio.abc.Stream, bytes], Awaitable[None]]


async def answering(stream: trio.abc.Stream, request: bytes) -> None:
    if request.startswith(b"GET /v1/models"):
        await stream.send_all(MODELS)
        await stream.aclose()
    else:
        await stream.send_all(ANSWER)


async def hanging_up(stream: trio.abc.Stream, _request: bytes) -> None:
    await trio.aclose_forcefully(stream)


@dataclass
class Member:
    """A member that answers guests as it is told."""

    answer: Handler = answering
    gives: Credential = field(default_factory=lambda: credential(GUEST, Role.USE))
    requests: list[bytes] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)

    async def serve_http(self, peer: Peer, stream: trio.abc.Stream) -> None:
        assert peer.credential is not None
        self.roles.append(peer.credential.role)
        with suppress(trio.ClosedResourceError):
            while request := bytes(await stream.receive_some()):
                self.requests.append(request)
                await self.answer(stream, request)

    async def serve_join(self, _peer: Peer, stream: trio.abc.Stream) -> None:
        await receive_frame(stream)
        answer = {"c": self.gives.raw, "p": b"", "a": ["192.0.2.7:9338"]}
        await send_frame(stream, encode(answer))


async def _refuse(_channel: Channel) -> None:
    raise AssertionError("a guest opens no links")


@dataclass
class Running:
    guest: Guest
    api: int
    home: Home

    async def until(self, true: Callable[[], bool]) -> None:
        seen = 0
        while not true():
            seen = await self.guest.wait_changed(seen)

    async def ask(self, request: bytes = REQUEST) -> bytes:
        async with await trio.open_tcp_stream("127.0.0.1", self.api) as client:
            await client.send_all(request)
            said = b""
            while said not in (ANSWER, MODELS) and (chunk := await client.receive_some()):
                said += chunk
            return said


def card(own: Credential) -> MeshInfo:
    return MeshInfo(id=MESH, name="home", founded_at=1, credential=own, joined_at=1)


@asynccontextmanager
async def using(
    folder: Path, member: Member, *more: Address, seeds: tuple[Address, ...] | None = None
) -> AsyncIterator[Running]:
    home = Home.at(folder)
    home.create()
    me = LocalIdentity(key=GUEST, instance=1, mesh=None)
    host = LocalIdentity(
        key=MEMBER, instance=2, mesh=MESH, mesh_name="home", credential=credential(MEMBER).raw
    )
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    theirs = TlsTransport(lambda: host, listeners)
    api = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = int(api[0].socket.getsockname()[1])
    here = Address("127.0.0.1", port)

    async def order(_name: str, _values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {}

    parts = GuestParts(
        home=home,
        name="phone",
        me=me,
        transport=TlsTransport(lambda: me, []),
        addresses=Addresses(api=here, console=here, peer=here),
        token="token",
        stop=lambda: None,
        order=order,
    )
    entry = Entry(
        card=card(credential(GUEST, Role.USE)),
        seeds=(*more, theirs.address) if seeds is None else seeds,
    )
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for listener in api:
            stack.push_async_callback(listener.aclose)
        handlers = {
            HTTP: Service(member.serve_http, Needs(Role.USE)),
            JOIN: Service(member.serve_join, ANYBODY),
        }
        await nursery.start(theirs.serve, _refuse, handlers)
        guest = Guest(entry, parts)
        with trio.fail_after(DEADLINE_S):
            await guest.renew()
            await nursery.start(guest.run, api)
            yield Running(guest, port, home)
        nursery.cancel_scope.cancel()


async def test_requests_and_answers_go_through_byte_by_byte(tmp_path: Path) -> None:
    member = Member()
    async with using(tmp_path, member) as running:
        assert await running.ask() == ANSWER
        assert REQUEST in member.requests
        assert set(member.roles) == {Role.USE}


async def test_a_member_that_is_away_is_passed_by(tmp_path: Path) -> None:
    async with using(tmp_path, Member(), NOWHERE) as running:
        assert await running.ask() == ANSWER


async def test_without_a_member_the_client_is_told(tmp_path: Path) -> None:
    async with using(tmp_path, Member(), seeds=(NOWHERE,)) as running:
        head, _, body = (await running.ask()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After" in head
        error = json.loads(body)["error"]
        assert error["code"] == "mesh_unreachable"
        assert "home" in error["message"]
        await running.until(lambda: bool(running.guest.snapshot()["node"]["warnings"]))


async def test_a_member_that_leaves_without_a_word_is_answered_for(tmp_path: Path) -> None:
    async def leave(stream: trio.abc.Stream, _request: bytes) -> None:
        await stream.aclose()

    async with using(tmp_path, Member(leave)) as running:
        assert (await running.ask()).startswith(b"HTTP/1.1 502 ")


async def test_a_client_that_leaves_ends_the_stream(tmp_path: Path) -> None:
    gone = trio.Event()

    async def wait(stream: trio.abc.Stream, request: bytes) -> None:
        if request.startswith(b"GET"):
            await answering(stream, request)
            return
        with trio.CancelScope():
            assert await stream.receive_some() == b""
        gone.set()

    async with using(tmp_path, Member(wait)) as running:
        async with await trio.open_tcp_stream("127.0.0.1", running.api) as client:
            await client.send_all(REQUEST)
            await trio.sleep(0.1)
        await gone.wait()


async def test_there_are_no_more_connections_than_a_member_takes(tmp_path: Path) -> None:
    async def wait(stream: trio.abc.Stream, request: bytes) -> None:
        if request.startswith(b"GET"):
            await answering(stream, request)
        else:
            await trio.sleep_forever()

    async with using(tmp_path, Member(wait)) as running:
        clients = [socket.create_connection(("127.0.0.1", running.api)) for _ in range(64)]
        assert len(clients) == CONNECTIONS_MAX
        for client in clients:
            client.sendall(REQUEST)
        await trio.sleep(0.5)
        assert (await running.ask()).startswith(b"HTTP/1.1 503 ")
        for client in clients:
            client.close()
        while (await running.ask(b"GET /v1/models")) != MODELS:  # noqa: ASYNC110 - sockets close
            await trio.sleep(0.05)


async def test_models_are_shown_and_addresses_of_members_remembered(tmp_path: Path) -> None:
    async with using(tmp_path, Member()) as running:
        await running.until(lambda: bool(running.guest.snapshot()["models"]))
        [model] = running.guest.snapshot()["models"]
        assert (model["id"], model["state"]) == ("m", "ready")
        [addresses] = load_book(running.home, MESH).values()
        assert Address("192.0.2.7", 9338) in addresses


async def test_without_a_member_no_model_is_shown_as_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_INTERVAL_S", 0.05)
    member = Member()
    async with using(tmp_path, member) as running:
        await running.until(lambda: bool(running.guest.snapshot()["models"]))
        member.answer = hanging_up
        await running.until(lambda: bool(running.guest.snapshot()["node"]["warnings"]))
        [model] = running.guest.snapshot()["models"]
        assert (model["id"], model["state"]) == ("m", "not served")
        assert model["reason"] == "no member can be reached"


async def test_a_longer_credential_is_kept(tmp_path: Path) -> None:
    longer = credential(GUEST, Role.USE, ttl_s=91 * 365 * 86400)
    async with using(tmp_path, Member(gives=longer)) as running:
        assert running.guest.card.credential == longer
        kept = load_mesh(running.home)
        assert kept is not None
        assert kept.credential == longer


async def test_a_guest_that_may_do_more_now_says_to_start_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_INTERVAL_S", 0.05)
    member = Member()
    with pytest.RaisesGroup(
        pytest.RaisesExc(LocalError, match="start it again"), flatten_subgroups=True
    ):
        async with using(tmp_path, member):
            member.gives = credential(GUEST, Role.SERVE)
            await trio.sleep_forever()
    kept = load_mesh(Home.at(tmp_path))
    assert kept is not None
    assert kept.credential.role is Role.SERVE


async def test_a_credential_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    async with using(tmp_path, Member(gives=credential(MEMBER, Role.SERVE))) as running:
        assert running.guest.card.credential == credential(GUEST, Role.USE)

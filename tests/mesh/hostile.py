"""What hostile or broken programs and members do, and how a node's answers are checked."""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import random
import secrets
import socket
import struct
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import trio

from p2pmesh.config import Address, parse_address
from p2pmesh.errors import MeshError
from p2pmesh.gossip.membership import Gossip
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Basis, Credential, Role, issue, read_credential
from p2pmesh.identity.hello import HTTP, LocalIdentity, Needs, Peer
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey, parse_id
from p2pmesh.models import gguf
from p2pmesh.models.cards import Card, ModelDigest, card_of
from p2pmesh.models.store import EMBEDDED
from p2pmesh.node.keystore import load_mesh, node_key
from p2pmesh.node.mesh import Mesh
from p2pmesh.state.registers import (
    Caps,
    HeldModel,
    Member,
    Served,
    held_pages,
    held_register,
    serves_to_wire,
)
from p2pmesh.transport.base import Channel, Service
from p2pmesh.transport.tls import TlsTransport
from p2pmesh.wire.messages import Push, encode_message
from p2pmesh.wire.records import CREDENTIAL, seal
from p2pmesh.wire.registers import CAPS, MEMBER, SERVING
from tests.mesh.nodes import Node

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
PORTS = ("api", "console", "peer")
TIMEOUT_S = 60.0

_HANDSHAKE = (
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
_POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
# A TLS 1.2 record that announces a ClientHello of 512 bytes, most of which never come.
HALF_TLS = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)
JUNK: Mapping[str, bytes] = {
    "nothing": b"",
    "one byte": b"\x00",
    "random bytes": random.Random(1).randbytes(200_000),
    "a huge line": b"A" * 2_000_000,
    "endless headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000,
    "half of TLS": HALF_TLS,
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "no version": b"GET /\r\n\r\n",
    "a header that is none": b"GET / HTTP/1.1\r\nHost: localhost\r\n\x00\xff: \x01\r\n\r\n",
    "a length below zero": _POST + b"Content-Length: -1\r\n\r\n",
    "two lengths": _POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a length beyond all memory": _POST + b"Content-Length: 99999999999999999999\r\n\r\n",
    "a chunk without end": _POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
    "a body that is no JSON": _POST + b"Content-Length: 3\r\n\r\n{\xff}",
    "a body nested too deep": _POST + b"Content-Length: 100000\r\n\r\n" + b"[" * 100_000,
    "a byte after a handshake": _HANDSHAKE + b"Connection: Upgrade\r\n\r\nx",
    "a protocol that is not ASCII": (
        _HANDSHAKE + b"Connection: Upgrade\r\nSec-WebSocket-Protocol: \xff\xfe\r\n\r\n"
    ),
    "an extension that is not ASCII": (
        _HANDSHAKE + b"Connection: Upgrade\r\nSec-WebSocket-Extensions: \xff\xfe\r\n\r\n"
    ),
    "a connection token that is not ASCII": _HANDSHAKE + b"Connection: Upgrade, \xff\r\n\r\n",
    "a hello of 4 GiB": b"\xff\xff\xff\xff" + b"x" * 1000,
}


@contextmanager
def connected(node: Node, port: str, *, receive_bytes: int = 0) -> Iterator[socket.socket]:
    """A TCP connection to one of a node's ports.

    Args:
        node: Whose.
        port: One of `PORTS`.
        receive_bytes: How much the system takes for us while we do not read; 0 is its default.
    """
    host, _, number = str(node.me[port]).rpartition(":")
    with socket.socket() as one:
        one.settimeout(TIMEOUT_S)
        if receive_bytes:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        one.connect((host, int(number)))
        yield one


def throw(node: Node, port: str, junk: bytes) -> None:
    """Send junk and hang up; the node may hang up first."""
    with connected(node, port) as one:
        try:
            one.sendall(junk)
            one.shutdown(socket.SHUT_WR)
            while one.recv(65536):
                pass
        except OSError as exc:  # it hung up, which is right; only waiting for ever is not
            if isinstance(exc, TimeoutError):
                raise


def reset(one: socket.socket) -> None:
    """Close so that the other side sees a reset instead of an end."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def chat_request(question: str, **more: Any) -> bytes:
    """A whole chat request as it goes over the wire."""
    body = json.dumps({"messages": [{"role": "user", "content": question}], **more}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to a chat request."""

    status: int
    headers: Mapping[str, str]
    text: str


def ask(
    node: Node, question: str = QUESTION, *, timeout_s: float = TIMEOUT_S, model: str = "auto"
) -> Reply:
    """Ask a node; the text is the answer's, or the error's."""
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": 0}
    host, _, port = str(node.me["api"]).rpartition(":")
    with closing(http.client.HTTPConnection(host, int(port), timeout=timeout_s)) as connection:
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        response = connection.getresponse()
        answer = json.loads(response.read())
        headers = {name.lower(): value for name, value in response.getheaders()}
    if response.status != 200:
        return Reply(response.status, headers, str(answer["error"]["message"]))
    return Reply(200, headers, str(answer["choices"][0]["message"]["content"]))


def answers(*nodes: Node) -> bool:
    """Whether all of these answer correctly, and their consoles too."""
    return all(
        ask(node).text == ANSWER and {one["state"] for one in node.status()["nodes"]} == {"live"}
        for node in nodes
    )


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a node's process holds."""

    descriptors: int
    threads: int
    resident_bytes: int


def held(node: Node) -> Footprint:
    """What the node itself, without its engines, holds now."""
    process = psutil.Process(node.process.pid)
    with process.oneshot():
        return Footprint(process.num_fds(), process.num_threads(), process.memory_info().rss)


# --- members that mean ill ----------------------------------------------------------------------

Attack = Callable[[Channel], Awaitable[None]]
Handler = Callable[[trio.abc.Stream], Awaitable[None]]


def signed(
    key: SigningKey,
    mesh: MeshId | None,
    register: str,
    body: Mapping[str, object],
    *,
    ttl_s: int = 240,
) -> bytes:
    """A valid record, issued now."""
    assert mesh is not None
    now = int(time.time())
    return seal(
        key,
        mesh=mesh,
        register=register,
        epoch=now,
        seq=1,
        instance=1,
        issued_at=now,
        ttl_s=ttl_s,
        body=dict(body),
    ).raw


def member(name: str, *addresses: Address) -> dict[str, Any]:
    """The body of an honest `member` record."""
    return Member(name=name, addresses=addresses, version="0.1.0").to_wire()


def let_in(node: Node, key: SigningKey, *, role: Role = Role.SERVE) -> Credential:
    """A credential for `key`, which `node` signs as if it had been asked."""
    home = Home.at(Path(node.me["home"]))
    card = load_mesh(home)
    assert card is not None
    # Members that may not invite let others in over their network.
    basis: Basis = "grant" if card.credential.role >= Role.INVITE else "lan"
    return issue(
        card.credential, node_key(home), key.public,
        role=role, stage=False, basis=basis, now=time.time(), ttl_s=3600,
    )  # fmt: skip


async def identity_in(
    node: Node, key: SigningKey | None = None, *, role: Role = Role.SERVE
) -> LocalIdentity:
    """A member of the mesh of `node`, or of one that `node` is the founder of."""
    key = key or SigningKey(secrets.token_bytes(32))
    me = LocalIdentity(key=key, instance=1, mesh=None)
    peer = await TlsTransport(lambda: me, []).introduce(parse_address(node.me["peer"]))
    shown = let_in(node, key, role=role).raw
    return replace(me, mesh=peer.mesh, mesh_name=peer.mesh_name, credential=shown)


@dataclass
class Attacker:
    """A node with a key of its own that was let into the mesh and speaks raw bytes on its links."""

    me: LocalIdentity
    node: Node
    new_each_time: bool = False
    links: int = 0
    refused: int = 0

    @classmethod
    async def on(cls, node: Node) -> Attacker:
        """One that has `node` for its target."""
        return cls(await identity_in(node), node)

    async def run(self, attack: Attack, seconds: float) -> None:
        """Attack over one link after the other: whenever one is closed, the next is dialled."""
        transport = TlsTransport(lambda: self.me, [])
        with trio.move_on_after(seconds):
            while True:
                if self.new_each_time:
                    key = SigningKey(secrets.token_bytes(32))
                    self.me = replace(self.me, key=key, credential=let_in(self.node, key).raw)
                try:
                    target = parse_address(self.node.me["peer"])
                    async with transport.dial(target, expected=None) as channel:
                        self.links += 1
                        if not self.new_each_time:
                            mine = self.record(MEMBER, member("attacker"))
                            await channel.send(encode_message(Push(records=(mine,))))
                        await attack(channel)
                except* MeshError:
                    self.refused += 1

    def record(self, register: str, body: Mapping[str, object], *, ttl_s: int = 240) -> bytes:
        """A valid record of its own."""
        whole = {**body, CREDENTIAL: self.me.credential}
        return signed(self.me.key, self.me.mesh, register, whole, ttl_s=ttl_s)


async def never_answer(stream: trio.abc.Stream) -> None:
    """Take a request, say nothing, keep the stream open."""
    while await stream.receive_some(65536):
        pass


async def hang_up(stream: trio.abc.Stream) -> None:
    """Close a stream as soon as it is opened."""
    await stream.aclose()


class Liar:
    """A member that takes part in the gossip as it should and publishes whatever it likes.

    Args:
        me: Who it is.
        target: Whom it joins.
        registers: The bodies that it signs, besides its `member` record.
        name: What it calls itself.
        addresses: Where it says that it listens; None: where it does.
        on_stream: How it answers forwarded requests.

    Attributes:
        streams: How many streams were opened to it.
    """

    def __init__(
        self,
        me: LocalIdentity,
        target: Address,
        registers: Mapping[str, Mapping[str, Any]],
        *,
        name: str = "liar",
        addresses: Sequence[Address] | None = None,
        on_stream: Handler = hang_up,
    ) -> None:
        self._me, self._target, self._name = me, target, name
        self._registers = registers
        self._addresses = addresses
        self._on_stream = on_stream
        self.streams = 0

    @property
    def id(self) -> NodeId:
        """Its id."""
        return NodeId(self._me.key.id)

    def publish(self, register: str, body: Mapping[str, Any] | None) -> None:
        """Sign another body while it runs; None withdraws the register."""
        self._mesh.publish(register, body)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled; started once the mesh has its records."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        transport = TlsTransport(lambda: self._me, listeners)
        assert self._me.mesh is not None
        core = Gossip(
            key=self._me.key,
            mesh=self._me.mesh,
            instance=secrets.randbits(60),
            epoch=int(time.time()),
            seeds=(self._target,),
            credential=read_credential(self._me.credential),
        )
        self._mesh = Mesh(core, transport, save_epoch=lambda _: None, clock=time.time)
        addresses = (transport.address,) if self._addresses is None else self._addresses
        self._mesh.publish(MEMBER, member(self._name, *addresses))
        for register, body in self._registers.items():
            self._mesh.publish(register, body)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._mesh.run, {HTTP: Service(self._take, Needs(Role.USE))})
            await self._mesh.settled.wait()
            task_status.started()

    async def _take(self, _: Peer, stream: trio.abc.Stream) -> None:
        self.streams += 1
        with trio.CancelScope():
            try:
                await self._on_stream(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                await stream.aclose()  # whom it lied to hung up


@asynccontextmanager
async def lying(
    target: Node,
    *registers: Mapping[str, Mapping[str, Any]],
    key: SigningKey | None = None,
    **options: Any,
) -> AsyncIterator[Liar]:
    """A liar in the mesh of `target` for the length of the block; it leaves without goodbye.

    Args:
        target: Whom it joins.
        registers: What it signs, see `gives`, `holds` and `claims`.
        key: Its key; a random one.
        options: Of `Liar`.
    """
    me = await identity_in(target, key)
    merged = {register: body for part in registers for register, body in part.items()}
    liar = Liar(me, parse_address(target.me["peer"]), merged, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(liar.run)
        yield liar
        nursery.cancel_scope.cancel()


def key_below(*nodes: Node) -> SigningKey:
    """A key whose id sorts before those of all these nodes."""
    ids = [parse_id(node.me["id"]) for node in nodes]
    while not all((key := SigningKey(secrets.token_bytes(32))).id < one for one in ids):
        pass
    return key


@functools.cache
def demo() -> HeldModel:
    """The embedded model, as an honest holder describes it."""
    content = EMBEDDED.read_bytes()
    card = card_of([gguf.scan(content, size_bytes=len(content))])
    digest = ModelDigest(hashlib.sha256(content).hexdigest())
    return HeldModel(digest=digest, stem=EMBEDDED.stem, card=card, demo=True)


def gives(budget_bytes: int) -> dict[str, dict[str, Any]]:
    """The register that promises memory."""
    return {CAPS: Caps(budget_bytes=budget_bytes, engine="embedded", rpc="").to_wire()}


def holds(*held: HeldModel) -> dict[str, dict[str, Any]]:
    """The registers of a member that says that it has these files."""
    return {held_register(page): body for page, body in enumerate(held_pages(held))}


def describes(**changes: Any) -> HeldModel:
    """The embedded model with some fields of its card falsified."""
    card: Card = replace(demo().card, **changes)
    return replace(demo(), card=card)


def claims(
    served: Iterable[ModelDigest] = (), *, state: Any = "ready"
) -> dict[str, dict[str, Any]]:
    """The register of a member that says that it runs these models; the embedded one if none."""
    digests = list(served) or [demo().digest]
    return {SERVING: serves_to_wire([Served(digest=digest, state=state) for digest in digests])}

"""A mesh in memory: `FakeBackends`, and scripted engines that are real HTTP servers."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import h11
import trio
import trio.testing

from p2pmesh.errors import LinkError
from p2pmesh.gateway.limits import Limits
from p2pmesh.gateway.route import ServedModel, Target
from p2pmesh.gateway.serve import Gateway
from p2pmesh.identity.credentials import Credential, Role
from p2pmesh.identity.hello import HTTP, VERSIONS, Peer
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.catalogue import Catalogue, Named
from p2pmesh.models.parts import WHOLE, PartId, ReplicaKey
from p2pmesh.web_policy import THIS_MACHINE, WebPolicy
from tests.identity.builders import credential

HERE = NodeId(b"h" * 16)
THERE = NodeId(b"t" * 16)
YONDER = NodeId(b"y" * 16)
FAR = NodeId(b"f" * 16)
NAMES = {HERE: "here", THERE: "there", YONDER: "yonder", FAR: "far"}

CHAT = "/v1/chat/completions"
BODY = b'{"model": "alpha", "messages": []}'

ALPHA = ModelDigest("a" * 64)
BETA = ModelDigest("b" * 64)

Dial = Callable[[], Awaitable[trio.abc.Stream]]


def model(
    digest: ModelDigest = ALPHA,
    name: str = "alpha",
    *,
    modality: str = "chat",
    gives: frozenset[str] | None = None,
    state: str = "ready",
    size_bytes: int = 1,
    **more: Any,
) -> ServedModel:
    return ServedModel(
        digest=digest,
        id=name,
        gives=frozenset({modality}) if gives is None else gives,
        state=state,
        size_bytes=size_bytes,
        **more,
    )


def target(
    node: NodeId = HERE, digest: ModelDigest = ALPHA, *, slots: int = 0, part: str = WHOLE
) -> Target:
    return Target(
        node=node,
        node_name=NAMES[node],
        part=PartId(digest, part),
        model_id="alpha",
        local=node == HERE,
        slots=slots,
    )


class FakeBackends:
    """Who serves what is whatever the test says."""

    def __init__(self, *models: ServedModel) -> None:
        self._models = list(models) or [model()]
        self.ways: dict[ReplicaKey, tuple[Target, Dial]] = {}
        self.dialled: list[str] = []
        self.keys: dict[PartId, str] = {}
        self._lost: dict[NodeId, trio.Event] = {}
        self._changed = trio.Event()
        self.failures: list[ReplicaKey] = []
        self.stand_ins: dict[ModelDigest, ModelDigest] = {}
        self.in_flight: Counter[PartId] = Counter()

    def put(self, replica: Target, dial: Dial) -> None:
        self.ways[replica.key] = (replica, dial)
        self.announce()

    def drop(self, replica: Target) -> None:
        del self.ways[replica.key]
        self.announce()

    def set_models(self, *models: ServedModel) -> None:
        self._models = list(models)
        self.announce()

    def announce(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def models(self) -> Sequence[ServedModel]:
        return self._models

    def catalogue(self) -> Catalogue:
        return Catalogue(Named(digest=m.digest, stem=m.id, name="") for m in self._models)

    def targets(self, digest: ModelDigest) -> Sequence[Target]:
        digests = {digest, self.stand_ins.get(digest, digest)}
        found = [replica for replica, _ in self.ways.values() if replica.digest in digests]
        return sorted(found, key=lambda replica: (not replica.local, replica.node))

    def stand_in(self, digest: ModelDigest, other: ModelDigest) -> None:
        """Have a smaller quantisation answer for a model too."""
        self.stand_ins[digest] = other

    async def connect(self, target: Target) -> trio.abc.Stream:
        self.dialled.append(target.node_name)
        if target.key not in self.ways:
            raise LinkError("nobody is there")
        return await self.ways[target.key][1]()

    def engine_key(self, part: PartId) -> str | None:
        return self.keys.get(part)

    async def lost(self, target: Target) -> None:
        await self._lost.setdefault(target.node, trio.Event()).wait()

    def suspect(self, node: NodeId) -> None:
        self._lost.setdefault(node, trio.Event()).set()

    def trust(self, node: NodeId) -> None:
        del self._lost[node]

    def begin(self, part: PartId) -> None:
        self.in_flight[part] += 1

    def end(self, part: PartId) -> None:
        self.in_flight[part] -= 1

    def failed(self, replica: ReplicaKey) -> None:
        self.failures.append(replica)

    async def changed(self) -> None:
        await self._changed.wait()


async def refuse() -> trio.abc.Stream:
    await trio.lowlevel.checkpoint()
    raise ConnectionRefusedError("refused")


@dataclass
class Asked:
    """One request as an engine got it."""

    head: h11.Request
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        return dict(list(self.head.headers)).get(name)


class Reply:
    """What a script may do with one request: whole answers, or raw events and bytes."""

    def __init__(self, stream: trio.abc.Stream, http: h11.Connection) -> None:
        self.stream = stream
        self.http = http

    async def send(self, *events: h11.Event) -> None:
        data = b"".join(self.http.send(event) or b"" for event in events)
        await self.stream.send_all(data)

    async def head(self, status: int = 200, *headers: tuple[str, str]) -> None:
        await self.send(h11.Response(status_code=status, headers=list(headers)))

    async def data(self, data: bytes) -> None:
        await self.send(h11.Data(data=data))

    async def end(self) -> None:
        await self.send(h11.EndOfMessage())

    async def whole(self, body: bytes, status: int = 200, *headers: tuple[str, str]) -> None:
        framing = ("Content-Length", str(len(body)))
        response = h11.Response(status_code=status, headers=[framing, *headers])
        await self.send(response, h11.Data(data=body), h11.EndOfMessage())


Script = Callable[[Asked, Reply], Awaitable[None]]


async def hello(asked: Asked, reply: Reply) -> None:
    await reply.whole(b'{"hello": 1}', 200, ("Content-Type", "application/json"))


async def echo(asked: Asked, reply: Reply) -> None:
    await reply.whole(asked.body)


async def silent(asked: Asked, reply: Reply) -> None:
    await trio.sleep_forever()


async def work(asked: Asked, reply: Reply, seconds: float = math.inf) -> None:
    """As an owner's gateway while its engine computes."""
    until = trio.current_time() + seconds
    while trio.current_time() < until:
        await reply.send(h11.InformationalResponse(status_code=102, headers=[]))
        await trio.sleep(min(2, until - trio.current_time()))


async def hang_up(asked: Asked, reply: Reply) -> None:
    await reply.stream.aclose()


def status_script(status: int) -> Script:
    async def answer(asked: Asked, reply: Reply) -> None:
        await reply.whole(b"{}", status)

    return answer


@dataclass
class FakeEngine:
    """An HTTP server over memory streams: `dial` connects to it.

    Attributes:
        asked: Every request that came whole.
        closed: How many connections the other end closed while a script ran.
    """

    nursery: trio.Nursery
    script: Script = hello
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    closed: int = 0
    servers: list[trio.abc.Stream] = field(default_factory=list)

    async def dial(self) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.serve, theirs)
        return ours

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        self.servers.append(stream)
        http = h11.Connection(h11.SERVER)
        async with stream:
            while await self._one(stream, http):
                http.start_next_cycle()

    async def _one(self, stream: trio.abc.Stream, http: h11.Connection) -> bool:
        head: h11.Request | None = None
        body = b""
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                try:
                    http.receive_data(bytes(await stream.receive_some()))
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return False
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False
        assert head is not None
        asked = Asked(head, body)
        self.asked.append(asked)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._notice, stream, nursery.cancel_scope)
            try:
                await self.script(asked, Reply(stream, http))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return False
            nursery.cancel_scope.cancel()
        return http.our_state is h11.DONE and http.their_state is h11.DONE

    async def _notice(self, stream: trio.abc.Stream, scope: trio.CancelScope) -> None:
        """As llama-server does: stop working when the other end is gone."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.receive_some()
        self.closed += 1
        scope.cancel()


class HttpCaller:
    """A client of a gateway, over a memory stream; speaks bytes and reads answers.

    Attributes:
        informed: How many 102 came.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.informed = 0
        self.http = h11.Connection(h11.CLIENT)

    async def ask(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[h11.Response, bytes]:
        await self.send(method, path, body, **headers)
        return await self.answer()

    async def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        fields = {"host": "localhost"} | {k.replace("_", "-"): v for k, v in headers.items()}
        if body:
            fields["content-length"] = str(len(body))
        request = h11.Request(method=method, target=path, headers=list(fields.items()))
        data = self.http.send(request) or b""
        data += (self.http.send(h11.Data(data=body)) or b"") if body else b""
        data += self.http.send(h11.EndOfMessage()) or b""
        await self.stream.send_all(data)

    async def event(self) -> h11.Event:
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                self.http.receive_data(bytes(await self.stream.receive_some()))
                continue
            if isinstance(event, h11.InformationalResponse):
                self.informed += 1
                continue
            assert isinstance(event, h11.Event), event
            return event

    async def answer(self) -> tuple[h11.Response, bytes]:
        """The next whole answer; a broken one raises h11.RemoteProtocolError."""
        head: h11.Response | None = None
        body = b""
        while True:
            event = await self.event()
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                if self.http.our_state is h11.DONE and self.http.their_state is h11.DONE:
                    self.http.start_next_cycle()
                return head, body

    async def until(self, is_enough: Callable[[bytes], bool]) -> bytes:
        """Everything that comes until it is enough; that the gateway closes before is a failure."""
        got = b""
        while not is_enough(got):
            data = await self.stream.receive_some()
            assert data, f"the gateway closed after {got[-500:]!r}"
            got += data
        return got

    async def raw(self, data: bytes) -> bytes:
        """Send bytes; everything that comes until the gateway closes."""
        await self.stream.send_all(data)
        return await self.rest()

    async def rest(self) -> bytes:
        got = b""
        while True:
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                return got
            if not data:
                return got
            got += data


async def eventually(condition: Callable[[], bool], *, limit_s: float = 10) -> None:
    """Wait until something outside of trio's sight has come true."""
    with trio.fail_after(limit_s):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(0.005)


def field_of(head: h11.Response, name: str) -> str | None:
    """A header of an answer."""
    for key, value in head.headers:
        if key == name.encode():
            return value.decode()
    return None


def error_of(body: bytes) -> dict[str, Any]:
    """The error that an answer holds."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def peer_of(node: NodeId) -> Peer:
    """What the hello of a stream for forwarded requests tells of `node`."""
    return Peer(
        node=node,
        public=bytes(32),
        instance=1,
        mesh=MeshId(bytes(16)),
        mesh_name="home",
        purpose=HTTP,
        version=max(VERSIONS),
        clock_ahead_s=0,
    )


class World:
    """A gateway with fake backends inside a test's nursery."""

    def __init__(self, nursery: trio.Nursery, backends: FakeBackends, gateway: Gateway) -> None:
        self.nursery = nursery
        self.backends = backends
        self.gateway = gateway

    def engine(self, script: Script = hello, replica: Target | None = None) -> FakeEngine:
        """A new engine behind a replica (the local one unless said)."""
        engine = FakeEngine(self.nursery, script)
        self.backends.put(replica or target(), engine.dial)
        return engine

    def caller(self, *, peer: bool = False, node: NodeId = YONDER) -> HttpCaller:
        """A new connection to the gateway; from a peer, if said so, that is `node`."""
        if peer:
            return HttpCaller(self.peer_stream(node))
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.gateway.serve_client, theirs)
        return HttpCaller(ours)

    def peer_stream(
        self, node: NodeId, shown: Credential | None = None
    ) -> trio.abc.HalfCloseableStream:
        """The end of `node`, which showed that credential, of a new stream to the gateway."""
        ours, theirs = trio.testing.memory_stream_pair()
        peer = replace(peer_of(node), credential=shown)
        self.nursery.start_soon(self.gateway.serve_peer, peer, theirs)
        return ours

    def guest(self) -> HttpCaller:
        """A new connection from a node that may only use the mesh."""
        key = SigningKey(b"g" * 32)
        return HttpCaller(self.peer_stream(NodeId(key.id), credential(key, Role.USE)))


class Deserted(trio.abc.Listener[trio.abc.Stream]):
    """A port that nobody connects to; callers get their streams from `World.caller`."""

    async def accept(self) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError("it sleeps for ever")

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_world(
    *models: ServedModel, limits: Limits | None = None, policy: WebPolicy = THIS_MACHINE
) -> AsyncIterator[World]:
    """A running gateway; everything ends with the block, or fails at a deadline of its clock."""
    backends = FakeBackends(*models)
    gateway = Gateway(backends, limits=limits, rng=random.Random(7), policy=policy)
    is_mocked = isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)
    with trio.fail_after(600 if is_mocked else 30):
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.serve, [Deserted()])
            yield World(nursery, backends, gateway)
            nursery.cancel_scope.cancel()

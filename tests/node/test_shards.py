"""Shards on a node: their rankings from peers, their files, their engines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import memory_stream_pair

from p2pmesh.engine.argv import Launch
from p2pmesh.engine.find import Engine
from p2pmesh.errors import LinkError, MeshError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import RANKING, Needs, Purpose
from p2pmesh.identity.keys import NodeId
from p2pmesh.models import rankings
from p2pmesh.models.importance import RANKING_BYTES_MAX, Ranking, digest_of, rank
from p2pmesh.models.parts import PartId, Shard, ShardKind, ShardQuality, shard_name
from p2pmesh.models.shard_cache import ShardCache
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.slice import read_layout
from p2pmesh.models.store import Store
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.shards import Shards
from p2pmesh.transport.handshake import receive_frame, send_frame
from p2pmesh.watchable import Watchable
from tests.engine.samples import EMBEDDED
from tests.node.meshes import peer_of
from tests.state.builders import KEYS, NODES, digest

FILE = Store(Home.at(Path("/nowhere")), environ={}).embedded()
LAYOUT = read_layout(FILE)
MODEL = digest(1)
LAUNCH = Launch(model_paths=FILE.parts, alias="tiny", context=2048, slots=1, threads=1)
DEADLINE_S = 60.0


def ranking() -> Ranking:
    row = [2.0**-place for place in range(LAYOUT.count)]
    layers = LAYOUT.layers
    return rank(MODEL, "counts", layers, {"x": [row] * len(layers)}, [()] * len(layers))


NAME = digest_of(ranking())
SHARD = Shard(ShardKind.EXPERTS, NAME, LAYOUT.count, 4, 0b111111)
PART = PartId(MODEL, shard_name(MODEL, SHARD))
CLAIM = ShardQuality(ShardKind.EXPERTS, NAME, LAYOUT.count, 4, 50_000, 930_000)


class Ways:
    """The mesh as `Shards` uses it: what others say they have, and streams to their handlers."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.me = NODES[0]
        self.others: dict[NodeId, Any] = {}
        self.asked: list[NodeId] = []
        self._nursery = nursery

    @property
    def view(self) -> Any:
        held = {MODEL: SimpleNamespace(qualities=(CLAIM,))}
        holders = [
            SimpleNamespace(node=node, held=held, member=SimpleNamespace(name=node.hex()[:4]))
            for node in (self.me, *self.others)
        ]
        return SimpleNamespace(models={MODEL: SimpleNamespace(holders=holders)})

    async def open_stream(self, node: NodeId, purpose: Purpose) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        assert purpose == RANKING
        self.asked.append(node)
        handler = self.others[node]
        if handler is None:
            raise LinkError("nobody is there")
        ours, theirs = memory_stream_pair()
        self._nursery.start_soon(self._serve, handler, theirs)
        return ours

    async def _serve(self, handler: Any, stream: trio.abc.Stream) -> None:
        async with stream:
            with suppress(MeshError):
                await handler(peer_of(KEYS[0]), stream)


class Node:
    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        engine = Engine(kind="embedded", command=EMBEDDED, source="wheel", version="1")
        folder.mkdir()
        self.folder = folder
        self.ways = Ways(nursery)
        self.engines = EngineManager(engine, logs=folder)
        self.library = ShardLibrary(folder / "rankings", ShardCache(folder / "shards", None))
        self.shards = Shards(cast("Mesh", self.ways), self.engines, self.library)
        self.changes = Watchable()
        self.details: list[str] = []

    async def until(self, state: str | None) -> None:
        with self.engines.watched(self._note):
            while self.engines.states().get(PART) != state:
                await self.changes.wait(self.changes.count)

    def _note(self) -> None:
        self.details += [one.detail for one in self.engines.served()]
        self.changes.notify()


@asynccontextmanager
async def node_in(folder: Path) -> AsyncIterator[Node]:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            node = Node(folder, nursery)
            await nursery.start(node.engines.run)
            yield node
            nursery.cancel_scope.cancel()


def giver(folder: Path) -> Any:
    """The handler of a node that has the ranking."""
    rankings.save(folder / "rankings", ranking())
    library = ShardLibrary(folder / "rankings", ShardCache(folder / "shards", None))
    shards = Shards(cast("Mesh", None), cast("EngineManager", None), library)
    service = shards.handlers()[RANKING]
    assert service.needs == Needs(Role.SERVE)
    return service.handler


async def test_a_shard_is_made_and_answers(tmp_path: Path) -> None:
    async with node_in(tmp_path / "me") as node:
        rankings.save(node.folder / "rankings", ranking())
        node.shards.start(PART, SHARD, LAUNCH, FILE)
        await node.until("ready")
        [served] = node.engines.served()
        assert (served.name, served.shard) == (PART.name, SHARD)
        assert any(one.startswith("writing the shard, ") for one in node.details)
        [file] = (node.folder / "shards").glob("*.gguf")
        before = file.stat().st_ino
        node.engines.drain(PART)
        await node.until(None)
        node.shards.start(PART, SHARD, LAUNCH, FILE)
        await node.until("ready")
        assert file.stat().st_ino == before, "it is not made twice"


async def test_a_ranking_comes_from_whoever_has_it(tmp_path: Path) -> None:
    async def empty(_peer: object, stream: trio.abc.Stream) -> None:
        await receive_frame(stream)
        await send_frame(stream, b"")

    async def lying(_peer: object, stream: trio.abc.Stream) -> None:
        await receive_frame(stream)
        await send_frame(stream, b"\xc1 another ranking")

    async def breaking(_peer: object, stream: trio.abc.Stream) -> None:
        await receive_frame(stream)

    async with node_in(tmp_path / "me") as node:
        handlers = (None, empty, lying, breaking, giver(tmp_path / "giver"))
        node.ways.others = dict(zip(NODES[1:], handlers, strict=False))
        node.shards.start(PART, SHARD, LAUNCH, FILE)
        await node.until("ready")
        assert node.ways.asked == list(NODES[1 : len(handlers) + 1])
        assert node.library.read(NAME) is not None
        node.library.look({MODEL: FILE})
        assert CLAIM in node.library.known(MODEL), "others learn it from this node too"


async def test_without_its_ranking_a_shard_says_what_it_lacks(tmp_path: Path) -> None:
    async with node_in(tmp_path / "me") as node:
        node.ways.others = {NODES[1]: None}
        node.shards.start(PART, SHARD, LAUNCH, FILE)
        await node.until("failed")
        [served] = node.engines.served()
        assert "cannot be fetched" in served.detail
        assert "nobody is there" in served.detail


async def test_a_shard_that_is_stopped_while_it_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pmesh.models.slice.COPY_STEP_BYTES", 1024)
    async with node_in(tmp_path / "me") as node:
        rankings.save(node.folder / "rankings", ranking())
        node.shards.start(PART, SHARD, LAUNCH, FILE)
        with node.engines.watched(node._note):
            while not any(one.startswith("writing") for one in node.details):
                await node.changes.wait(node.changes.count)
        node.engines.cut(PART)
        await node.until(None)
        assert not list((node.folder / "shards").glob("*.gguf"))
        assert not list((node.folder / "shards").glob(".*"))


@pytest.mark.parametrize(
    "asked", [b"", b"a" * 63, b"../../../../../../etc/passwd".ljust(64, b"0"), b"A" * 64, b"0" * 64]
)
async def test_who_asks_for_something_else_gets_nothing(tmp_path: Path, asked: bytes) -> None:
    handler = giver(tmp_path)
    ours, theirs = memory_stream_pair()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handler, peer_of(KEYS[0]), theirs)
            await send_frame(ours, asked)
            assert await receive_frame(ours, bytes_max=RANKING_BYTES_MAX) == b""

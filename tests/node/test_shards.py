"""Shards on a node: their rankings from peers, their files, their engines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from p2pmesh.engine.argv import Launch
from p2pmesh.engine.find import Engine
from p2pmesh.errors import LinkError, MeshError, ModelError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import RANKING, Needs, Purpose
from p2pmesh.identity.keys import NodeId
from p2pmesh.models import rankings
from p2pmesh.models.importance import RANKING_BYTES_MAX, Ranking, digest_of, rank
from p2pmesh.models.parts import PartId, Shard, ShardKind, ShardQuality, shard_name
from p2pmesh.models.shard_cache import ShardCache
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.slice import of_headers, read_layout
from p2pmesh.models.store import Store
from p2pmesh.models.thin import thin_layout_of
from p2pmesh.node import shards as module
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.shards import Shards
from p2pmesh.transport.base import Service
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


def unchanged() -> None:
    """The file is still the model."""


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
        self.claims = (CLAIM,)
        self._nursery = nursery

    @property
    def view(self) -> Any:
        held = {MODEL: SimpleNamespace(qualities=self.claims)}
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
        self.fetched = 0
        self.shards = Shards(cast("Mesh", self.ways), self.engines, self.library, self._count)
        self.changes = Watchable()
        self.details: list[str] = []

    def _count(self) -> None:
        self.fetched += 1

    async def until(self, state: str | None, part: PartId = PART) -> None:
        with self.engines.watched(self._note):
            while self.engines.states().get(part) != state:
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
    return service(folder).handler


def service(folder: Path) -> Service:
    """The service of a node with what is in a folder."""
    library = ShardLibrary(folder / "rankings", ShardCache(folder / "shards", None))
    shards = Shards(cast("Mesh", None), cast("EngineManager", None), library, lambda: None)
    found = shards.handlers()[RANKING]
    assert found.needs == Needs(Role.SERVE)
    return found


async def test_a_shard_is_made_and_answers(tmp_path: Path) -> None:
    async with node_in(tmp_path / "me") as node:
        rankings.save(node.folder / "rankings", ranking())
        node.shards.start(PART, SHARD, LAUNCH, FILE, unchanged)
        await node.until("ready")
        [served] = node.engines.served()
        assert (served.name, served.shard) == (PART.name, SHARD)
        assert any(one.startswith("writing the shard, ") for one in node.details)
        [file] = (node.folder / "shards").glob("*.gguf")
        before = file.stat().st_ino
        node.engines.drain(PART)
        await node.until(None)
        node.shards.start(PART, SHARD, LAUNCH, FILE, unchanged)
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
        node.shards.start(PART, SHARD, LAUNCH, FILE, unchanged)
        await node.until("ready")
        assert node.ways.asked == list(NODES[1 : len(handlers) + 1])
        assert node.library.read(NAME) is not None
        assert node.fetched == 1
        node.library.look({MODEL: FILE})
        assert CLAIM in node.library.known(MODEL), "others learn it from this node too"


def thin_ranking(folder: Path) -> tuple[Ranking, Shard]:
    """A ranking with scores of neurons, kept in a folder, and a thin shard by it."""
    layout = of_headers(FILE, thin_layout_of)
    rng = np.random.default_rng(7)
    scores = rng.random((1, layout.experts, layout.width), dtype=np.float32)
    neurons = rankings.save_neurons(folder, [scores] * len(LAYOUT.layers))
    one = replace(ranking(), neurons=neurons)
    name = rankings.save(folder, one).stem
    return one, Shard(ShardKind.THIN, name, layout.count, 2, 0b11)


async def test_the_neurons_of_a_thin_shard_come_with_its_ranking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    one, shard = thin_ranking(tmp_path / "giver" / "rankings")
    part = PartId(MODEL, shard_name(MODEL, shard))
    claim = CLAIM._replace(kind=ShardKind.THIN, ranking=shard.ranking, places=shard.places)
    async with node_in(tmp_path / "me") as node:
        handler = service(tmp_path / "giver").handler
        other, other_shard = thin_ranking(tmp_path / "other" / "rankings")
        assert (other, other_shard) == (one, shard)
        assert one.neurons is not None
        broken = rankings.neurons_path(tmp_path / "other" / "rankings", one.neurons)
        broken.write_bytes(bytes(broken.stat().st_size))
        node.ways.others = dict(
            zip(NODES[1:], (service(tmp_path / "other").handler, handler), strict=False)
        )
        node.ways.claims = (claim,)
        node.shards.start(part, shard, LAUNCH, FILE, unchanged)
        await node.until("ready", part)
        assert node.library.lacks(FILE, MODEL, shard) == ""
        assert node.ways.asked == [NODES[1], NODES[1], NODES[2]], "the first gave other neurons"
        node.engines.drain(part)
        await node.until(None, part)


async def test_who_gives_neurons_too_slowly_is_left_for_another(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    one, shard = thin_ranking(tmp_path / "giver" / "rankings")
    size = rankings.neurons_bytes(one)
    given: list[int] = []

    async def slow(_peer: object, stream: trio.abc.Stream) -> None:
        await receive_frame(stream)
        await send_frame(stream, b"%d" % size)
        with suppress(trio.BrokenResourceError):
            for _ in range(size):
                await stream.send_all(b"0")
                given.append(1)
                mock_clock.jump(module.ANSWER_TIMEOUT_S / 2)

    async with trio.open_nursery() as nursery:
        node = Node(tmp_path / "me", nursery)
        node.ways.others = {NODES[1]: slow, NODES[2]: service(tmp_path / "giver").handler}
        claim = CLAIM._replace(ranking=shard.ranking)
        rankings.save(node.folder / "rankings", one)
        node.ways.claims = (claim,)
        await node.shards._fetch(MODEL, shard, "neurons", node.shards._ask_neurons)
        assert len(given) < 10
        assert node.library.lacks(FILE, MODEL, shard) == ""
        nursery.cancel_scope.cancel()


async def test_without_its_ranking_a_shard_says_what_it_lacks(tmp_path: Path) -> None:
    async with node_in(tmp_path / "me") as node:
        node.ways.others = {NODES[1]: None}
        node.shards.start(PART, SHARD, LAUNCH, FILE, unchanged)
        await node.until("failed")
        [served] = node.engines.served()
        assert "cannot be fetched" in served.detail
        assert "nobody is there" in served.detail


async def test_no_shard_is_made_of_a_file_that_is_another_model_by_now(tmp_path: Path) -> None:
    def changed() -> None:
        raise ModelError("it is not the file that was read")

    async with node_in(tmp_path / "me") as node:
        rankings.save(node.folder / "rankings", ranking())
        node.shards.start(PART, SHARD, LAUNCH, FILE, changed)
        await node.until("failed")
        [served] = node.engines.served()
        assert served.detail == "it is not the file that was read"
        assert not (node.folder / "shards").exists()


async def test_a_shard_that_is_stopped_while_it_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pmesh.models.slice.COPY_STEP_BYTES", 1024)
    async with node_in(tmp_path / "me") as node:
        rankings.save(node.folder / "rankings", ranking())
        node.shards.start(PART, SHARD, LAUNCH, FILE, unchanged)
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

"""Shards on a node: their files and engines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio

from p2pmesh.engine.argv import Launch
from p2pmesh.engine.find import Engine
from p2pmesh.errors import ModelError
from p2pmesh.models import rankings
from p2pmesh.models.parts import PartId, shard_name
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.rankings import Rankings
from p2pmesh.node.shards import Shards
from p2pmesh.watchable import Watchable
from tests.engine.samples import EMBEDDED
from tests.node.ranked import FILE, MODEL, SHARD, Ways, giver, held, library_in, ranking
from tests.state.builders import NODES

PART = PartId(MODEL, shard_name(MODEL, SHARD))
LAUNCH = Launch(model_paths=FILE.parts, alias="tiny", context=2048, slots=1, threads=1)
DEADLINE_S = 60.0


def unchanged() -> None:
    """The file is still the model."""


class Node:
    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        engine = Engine(kind="embedded", command=EMBEDDED, source="wheel", version="1")
        folder.mkdir()
        self.folder = folder
        self.ways = Ways(nursery)
        self.engines = EngineManager(engine, logs=folder)
        library = library_in(folder)
        exchange = Rankings(cast("Mesh", self.ways), library, held, lambda: None)
        self.shards = Shards(self.engines, library, exchange.obtain)
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


async def test_a_shard_gets_its_ranking_and_answers(tmp_path: Path) -> None:
    async with node_in(tmp_path / "me") as node:
        node.ways.others = {NODES[1]: giver(tmp_path / "giver")}
        node.shards.start(PART, SHARD, LAUNCH, FILE, unchanged)
        await node.until("ready")
        assert node.ways.asked == [NODES[1]]


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

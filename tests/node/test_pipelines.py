"""Stages and heads of pipelines on two nodes, with real engines and streams in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import memory_stream_pair

from p2pmesh.engine.argv import Launch
from p2pmesh.engine.confined import confinement_of
from p2pmesh.engine.confinement import Confinement, Level
from p2pmesh.engine.find import Engine
from p2pmesh.errors import EngineError, MeshError, PeerError
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import RPC, Needs, Purpose
from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import PartId, StageName, unit_id
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.pipelines import Pipelines
from p2pmesh.placement.pipeline import Stage
from p2pmesh.watchable import Watchable
from tests.engine.samples import MODEL, native
from tests.node.meshes import peer_of
from tests.state.builders import KEYS, NODES, digest

MIB = 2**20
LAYERS = 6
DEADLINE_S = 60.0


def engine() -> Engine:
    folder = native()
    here = confinement_of((str(folder / "llama-server"),))
    return Engine(
        kind="native",
        command=(str(folder / "llama-server"),),
        confinement=here,
        rpc_confinement=here,
        source="managed",
        version="b11434",
        rpc="7.0.0",
        rpc_command=(str(folder / "ggml-rpc-server"),),
    )


class Ways:
    """The mesh as `Pipelines` uses it: streams straight to the other node's handler."""

    def __init__(self, number: int, nursery: trio.Nursery) -> None:
        self.changes = Watchable()
        self._number, self._nursery = number, nursery
        self.others: dict[NodeId, Pipelines] = {}
        self.streams: list[trio.abc.Stream] = []

    async def open_stream(self, node: NodeId, purpose: Purpose) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        ours, theirs = memory_stream_pair()
        service = self.others[node].handlers()[purpose]
        self.streams.append(ours)
        self._nursery.start_soon(self._serve, service.handler, theirs)
        return ours

    async def _serve(self, handler: object, stream: trio.abc.Stream) -> None:
        assert callable(handler)
        async with stream:
            with suppress(MeshError):
                await handler(peer_of(KEYS[self._number]), stream)


class Node:
    def __init__(self, number: int, folder: Path, nursery: trio.Nursery) -> None:
        self.ways = Ways(number, nursery)
        self.engines = EngineManager(engine(), logs=folder)
        self.pipelines = Pipelines(cast("Mesh", self.ways), self.engines)
        self.changes = Watchable()

    async def until(self, part: PartId, state: str | None) -> None:
        with self.engines.watched(self.changes.notify):
            while self.engines.states().get(part) != state:
                await self.changes.wait(self.changes.count)


@asynccontextmanager
async def two(folder: Path) -> AsyncIterator[tuple[Node, Node]]:
    """A node that is a head, and one that runs its stage."""
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nodes = [Node(number, folder, nursery) for number in range(2)]
            for node in nodes:
                node.ways.others = {NODES[n]: one.pipelines for n, one in enumerate(nodes)}
                await nursery.start(node.engines.run)
                await nursery.start(node.pipelines.run)
            yield nodes[0], nodes[1]
            nursery.cancel_scope.cancel()


STAGES = (Stage(NODES[0], 0, 2, 64 * MIB), Stage(NODES[1], 3, LAYERS - 1, 64 * MIB))
UNIT = unit_id(digest(0), [stage.range for stage in STAGES])
HEAD, STAGE = (PartId(digest(0), str(StageName(UNIT, number))) for number in (0, 1))
LAUNCH = Launch(model_paths=(MODEL,), alias="tiny", context=2048, slots=2, threads=1)


def start_head(node: Node) -> None:
    node.pipelines.start_head(HEAD, STAGES, LAUNCH, lambda: None)


async def test_a_head_and_its_stage_come_up_and_end_together(tmp_path: Path) -> None:
    async with two(tmp_path) as (head, behind):
        behind.pipelines.start_stage(STAGE, STAGES, threads=1, model_paths=tuple)
        await behind.until(STAGE, "ready")
        start_head(head)
        start_head(head)  # it starts already
        await head.until(HEAD, "ready")
        [served] = head.engines.served()
        assert served.stages == tuple(stage.range for stage in STAGES)

        behind.engines.cut(STAGE)
        await behind.until(STAGE, None)
        await head.until(HEAD, None)

        behind.pipelines.start_stage(STAGE, STAGES, threads=1, model_paths=tuple)
        await behind.until(STAGE, "ready")
        start_head(head)
        await head.until(HEAD, "ready")
        head.engines.drain(HEAD)
        await head.until(HEAD, None)
        assert behind.engines.states() == {STAGE: "ready"}  # and takes another head


async def test_a_stage_takes_weights_from_its_nodes_file(tmp_path: Path) -> None:
    """Also from one that its node finds only when the stage runs already."""
    files: list[Path] = []
    async with two(tmp_path) as (head, behind):
        behind.pipelines.start_stage(STAGE, STAGES, threads=1, model_paths=lambda: files)
        await behind.until(STAGE, "ready")
        traffic = behind.pipelines._stages[STAGE].port.traffic
        for expected in (False, True):
            start_head(head)
            await head.until(HEAD, "ready")
            assert (traffic.own_bytes > MIB) is expected
            head.engines.drain(HEAD)
            await head.until(HEAD, None)
            files.append(MODEL)


@pytest.mark.full
async def test_a_head_whose_layers_went_elsewhere_than_planned_is_not_ready(tmp_path: Path) -> None:
    """The plan's card has one layer more than the file, so that llama-server counts otherwise."""
    stages = (Stage(NODES[0], 0, 3, 64 * MIB), Stage(NODES[1], 4, LAYERS, 64 * MIB))
    unit = unit_id(digest(0), [stage.range for stage in stages])
    first, second = (PartId(digest(0), str(StageName(unit, number))) for number in (0, 1))
    async with two(tmp_path) as (head, behind):
        behind.pipelines.start_stage(second, stages, threads=1, model_paths=tuple)
        await behind.until(second, "ready")
        head.pipelines.start_head(first, stages, LAUNCH, lambda: None)
        await head.until(first, "failed")
        [served] = head.engines.served()
        assert served.detail == "stage 1 got the layers 4, 5, 6 instead of 5 to 7"


async def test_nobody_but_its_head_reaches_a_stage(tmp_path: Path) -> None:
    async with two(tmp_path) as (head, behind):
        with pytest.raises(PeerError, match="runs no such stage for you"):
            await head.pipelines._open(NODES[1], STAGE)  # it does not run
        others = (Stage(NODES[2], 0, 2, 64 * MIB), STAGES[1])
        behind.pipelines.start_stage(STAGE, others, threads=1, model_paths=tuple)
        await behind.until(STAGE, "ready")
        with pytest.raises(PeerError, match="runs no such stage for you"):
            await head.pipelines._open(NODES[1], STAGE)
        stream = await head.ways.open_stream(NODES[1], RPC)
        await stream.send_all(b"\xff\xff\xff\xff junk")
        assert await stream.receive_some() == b""
        assert behind.engines.states() == {STAGE: "ready"}


@pytest.mark.parametrize("level", ["full", "files", "none"])
def test_a_stage_that_is_not_confined_takes_the_right_to_it(tmp_path: Path, level: Level) -> None:
    own = replace(engine(), rpc_confinement=Confinement(level))
    pipelines = Pipelines(cast("Mesh", None), EngineManager(own, logs=tmp_path))
    assert pipelines.handlers()[RPC].needs == Needs(Role.SERVE, stage=level != "full")


def test_an_engine_without_rpc_is_no_stage(tmp_path: Path) -> None:
    embedded = Engine(kind="embedded", command=("none",), source="wheel", version="1")
    pipelines = Pipelines(cast("Mesh", None), EngineManager(embedded, logs=tmp_path))
    with pytest.raises(EngineError, match="p2pmesh engine install"):
        pipelines.start_stage(STAGE, STAGES, threads=1, model_paths=tuple)

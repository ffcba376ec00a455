"""A model with a ranking of its experts, and a mesh in which others claim to have that."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import trio
from trio.testing import memory_stream_pair

from p2pmesh.errors import LinkError, MeshError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import RANKING, Needs, Peer, Purpose
from p2pmesh.identity.keys import NodeId
from p2pmesh.models import rankings
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.importance import Ranking, digest_of, rank
from p2pmesh.models.parts import Shard, ShardKind, ShardQuality
from p2pmesh.models.shard_cache import ShardCache
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.slice import read_layout
from p2pmesh.models.store import ModelFile, Store
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.rankings import Rankings
from p2pmesh.watchable import Watchable
from tests.node.meshes import peer_of
from tests.state.builders import KEYS, NODES, digest

FILE = Store(Home.at(Path("/nowhere")), environ={}).embedded()
LAYOUT = read_layout(FILE)
MODEL = digest(1)

Handler = Callable[[Peer, trio.abc.Stream], Awaitable[None]]


def ranking(ratio: float = 2.0) -> Ranking:
    row = [ratio**-place for place in range(LAYOUT.count)]
    layers = LAYOUT.layers
    return rank(MODEL, "counts", layers, {"x": [row] * len(layers)}, [()] * len(layers))


NAME = digest_of(ranking())
SHARD = Shard(ShardKind.EXPERTS, NAME, LAYOUT.count, 4, 0b111111)
CLAIM = ShardQuality(ShardKind.EXPERTS, NAME, LAYOUT.count, 4, 50_000, 930_000)


class Ways:
    """The mesh as `Rankings` uses it: what others say they have, and streams to their handlers.

    Attributes:
        others: The handlers of the other holders; None for one that cannot be reached.
        claims: What each says that `says` has nothing about.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.me = NODES[0]
        self.others: dict[NodeId, Handler | None] = {}
        self.claims: tuple[ShardQuality, ...] = (CLAIM,)
        self.says: dict[NodeId, tuple[ShardQuality, ...]] = {}
        self.wishes: tuple[str, ...] = ("somebody's",)
        self.asked: list[NodeId] = []
        self.changes = Watchable()
        self._nursery = nursery

    @property
    def view(self) -> Any:
        holders = [
            SimpleNamespace(
                node=node,
                held={MODEL: SimpleNamespace(qualities=self.says.get(node, self.claims))},
                member=SimpleNamespace(name=node.hex()[:4]),
            )
            for node in (self.me, *self.others)
        ]
        return SimpleNamespace(models={MODEL: SimpleNamespace(holders=holders, wishes=self.wishes)})

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

    async def _serve(self, handler: Handler, stream: trio.abc.Stream) -> None:
        async with stream:
            with suppress(MeshError):
                await handler(peer_of(KEYS[0]), stream)


def library_in(folder: Path) -> ShardLibrary:
    return ShardLibrary(folder / "rankings", ShardCache(folder / "shards", None))


def held(model: ModelDigest) -> ModelFile | None:
    return FILE if model == MODEL else None


def service(folder: Path) -> Handler:
    """The handler of a node with what is in a folder."""
    exchange = Rankings(cast("Mesh", None), library_in(folder), held, lambda: None)
    found = exchange.handlers()[RANKING]
    assert found.needs == Needs(Role.SERVE)
    return found.handler


def giver(folder: Path) -> Handler:
    """The handler of a node that has the ranking."""
    rankings.save(folder / "rankings", ranking())
    return service(folder)

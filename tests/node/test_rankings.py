"""Rankings, and the scores of neurons, between nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from p2pmesh.errors import LinkError
from p2pmesh.models import rankings
from p2pmesh.models.importance import RANKING_BYTES_MAX, Ranking, digest_of, to_bytes
from p2pmesh.models.parts import Shard, ShardKind, ShardQuality
from p2pmesh.models.slice import of_headers
from p2pmesh.models.thin import thin_layout_of
from p2pmesh.node import rankings as module
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.rankings import Rankings
from p2pmesh.transport.handshake import receive_frame, send_frame
from p2pmesh.watchable import Watchable
from tests.node.meshes import peer_of
from tests.node.ranked import (
    CLAIM,
    FILE,
    LAYOUT,
    MODEL,
    NAME,
    SHARD,
    Handler,
    Ways,
    giver,
    held,
    library_in,
    ranking,
    service,
)
from tests.state.builders import KEYS, NODES

DEADLINE_S = 600.0  # of a clock that may jump


@pytest.fixture
def patient_clock() -> MockClock:
    """A clock that jumps only when threads, too, have nothing to do."""
    return MockClock(autojump_threshold=0.05)


class Exchange:
    """A node that lacks everything, and the mesh around it."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.folder = folder / "rankings"
        self.ways = Ways(nursery)
        self.library = library_in(folder)
        self.told = Watchable()
        self.rankings = Rankings(cast("Mesh", self.ways), self.library, held, self.told.notify)

    def others(self, *handlers: Handler | None) -> None:
        self.ways.others = dict(zip(NODES[1:], handlers, strict=False))

    async def until_told(self, times: int = 1) -> None:
        while self.told.count < times:
            await self.told.wait(self.told.count)


@asynccontextmanager
async def exchange_in(folder: Path) -> AsyncIterator[Exchange]:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            yield Exchange(folder, nursery)
            nursery.cancel_scope.cancel()


async def empty(_peer: object, stream: trio.abc.Stream) -> None:
    await receive_frame(stream)
    await send_frame(stream, b"")


async def lying(_peer: object, stream: trio.abc.Stream) -> None:
    await receive_frame(stream)
    await send_frame(stream, b"\xc1 another ranking")


async def breaking(_peer: object, stream: trio.abc.Stream) -> None:
    await receive_frame(stream)


async def silent(_peer: object, stream: trio.abc.Stream) -> None:
    await receive_frame(stream)
    await trio.sleep_forever()


def slow(size: int) -> Handler:
    """A node that gives a file of neurons, but not in this life."""

    async def serve(_peer: object, stream: trio.abc.Stream) -> None:
        await receive_frame(stream)
        await send_frame(stream, b"%d" % size)
        with suppress(trio.BrokenResourceError):
            while True:
                await stream.send_all(bytes(module.PIECE_BYTES))
                await trio.sleep(module.ANSWER_TIMEOUT_S * 0.9)

    return serve


def thin_ranking(folder: Path) -> tuple[Ranking, Shard]:
    """A ranking with scores of neurons, kept in a folder, and a thin shard by it."""
    layout = of_headers(FILE, thin_layout_of)
    rng = np.random.default_rng(7)
    scores = rng.random((1, layout.experts, layout.width), dtype=np.float32)
    neurons = rankings.save_neurons(folder, [scores] * len(LAYOUT.layers))
    one = replace(ranking(), neurons=neurons)
    name = rankings.save(folder, one).stem
    return one, Shard(ShardKind.THIN, name, layout.count, 2, 0b11)


def thin_claim(shard: Shard) -> tuple[ShardQuality, ...]:
    return (CLAIM._replace(kind=shard.kind, ranking=shard.ranking, places=shard.places),)


# For a shard that is to start.


async def test_a_ranking_comes_from_whoever_has_it(tmp_path: Path) -> None:
    async with exchange_in(tmp_path / "me") as mine:
        mine.others(None, empty, lying, breaking, giver(tmp_path / "giver"))
        await mine.rankings.obtain(MODEL, FILE, SHARD)
        assert mine.ways.asked == list(NODES[1:6])
        assert mine.library.read(NAME) is not None
        assert mine.told.count == 1
        mine.library.look({MODEL: FILE})
        known = {one[:5] for one in mine.library.known(MODEL)}
        assert CLAIM[:5] in known, "others learn it from this node too"


async def test_what_nobody_gives_is_an_error_that_says_why(tmp_path: Path) -> None:
    async with exchange_in(tmp_path / "me") as mine:
        with pytest.raises(LinkError, match="cannot be fetched: no node has it"):
            await mine.rankings.obtain(MODEL, FILE, SHARD)
        mine.others(None)
        with pytest.raises(LinkError, match="nobody is there"):
            await mine.rankings.obtain(MODEL, FILE, SHARD)


async def test_nobody_is_asked_for_what_is_here(tmp_path: Path) -> None:
    async with exchange_in(tmp_path / "me") as mine:
        rankings.save(mine.folder, ranking())
        mine.others(None)
        await mine.rankings.obtain(MODEL, FILE, SHARD)
        assert mine.ways.asked == []


async def test_the_neurons_of_a_thin_shard_come_with_its_ranking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    one, shard = thin_ranking(tmp_path / "giver" / "rankings")
    assert thin_ranking(tmp_path / "other" / "rankings") == (one, shard)
    assert one.neurons is not None
    broken = rankings.neurons_path(tmp_path / "other" / "rankings", one.neurons)
    broken.write_bytes(bytes(broken.stat().st_size))
    async with exchange_in(tmp_path / "me") as mine:
        mine.others(service(tmp_path / "other"), service(tmp_path / "giver"))
        mine.ways.claims = thin_claim(shard)
        await mine.rankings.obtain(MODEL, FILE, shard)
        assert mine.library.lacks(FILE, MODEL, *shard[:2]) == ""
        assert mine.ways.asked == [NODES[1], NODES[1], NODES[2]], "the first gave other neurons"


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
        mine = Exchange(tmp_path / "me", nursery)
        mine.others(slow, service(tmp_path / "giver"))
        rankings.save(mine.folder, one)
        mine.ways.claims = thin_claim(shard)
        await mine.rankings.obtain(MODEL, FILE, shard)
        assert len(given) < 10
        assert mine.library.lacks(FILE, MODEL, *shard[:2]) == ""
        nursery.cancel_scope.cancel()


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


# Before any shard is to start.


async def test_what_others_claim_is_got_at_once_and_once(
    tmp_path: Path, patient_clock: MockClock
) -> None:
    one, shard = thin_ranking(tmp_path / "giver" / "rankings")
    async with exchange_in(tmp_path / "me") as mine, trio.open_nursery() as nursery:
        mine.others(service(tmp_path / "giver"))
        mine.ways.claims = thin_claim(shard)
        nursery.start_soon(mine.rankings.run)
        await mine.until_told()
        assert one.neurons is not None
        assert rankings.neurons_path(mine.folder, one.neurons).is_file()
        await trio.sleep(5)
        assert mine.ways.asked == [NODES[1]] * 2
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("why", ["nobody wants it", "it is not here"])
async def test_only_what_this_node_may_serve_is_got(
    tmp_path: Path, why: str, patient_clock: MockClock
) -> None:
    async with exchange_in(tmp_path / "me") as mine, trio.open_nursery() as nursery:
        mine.others(giver(tmp_path / "giver"))
        if why == "nobody wants it":
            mine.ways.wishes = ()
        else:
            mine.rankings = Rankings(
                cast("Mesh", mine.ways), mine.library, lambda _: None, mine.told.notify
            )
        nursery.start_soon(mine.rankings.run)
        await trio.sleep(10)
        assert mine.ways.asked == []
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["silent", "slow"])
async def test_no_node_keeps_another_from_giving(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, patient_clock: MockClock
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    one, shard = thin_ranking(tmp_path / "giver" / "rankings")
    first = silent if how == "silent" else slow(rankings.neurons_bytes(one))
    async with exchange_in(tmp_path / "me") as mine, trio.open_nursery() as nursery:
        rankings.save(mine.folder, one)
        mine.others(first, *[service(tmp_path / "giver")] * 2)
        mine.ways.claims = thin_claim(shard)
        nursery.start_soon(mine.rankings.run)
        await mine.until_told()
        assert mine.library.lacks(FILE, MODEL, *shard[:2]) == ""
        assert mine.ways.asked == [NODES[1], NODES[2]]
        nursery.cancel_scope.cancel()


async def test_what_is_measured_later_is_told_later(tmp_path: Path) -> None:
    async with exchange_in(tmp_path / "me") as mine, trio.open_nursery() as nursery:
        mine.others(giver(tmp_path / "giver"))
        nursery.start_soon(mine.rankings.run)
        await mine.until_told()
        mine.ways.claims = (CLAIM, CLAIM._replace(critical=9, divergence=10_000))
        mine.ways.changes.notify()
        await mine.until_told(2)
        mine.library.look({MODEL: FILE})
        told = {(one.critical, one.divergence) for one in mine.library.known(MODEL)}
        assert (9, 10_000) in told
        assert mine.ways.asked == [NODES[1]], "the ranking was here"
        nursery.cancel_scope.cancel()


async def test_of_what_three_say_the_middle_is_believed(tmp_path: Path) -> None:
    gives = giver(tmp_path / "giver")
    async with exchange_in(tmp_path / "me") as mine, trio.open_nursery() as nursery:
        mine.others(gives, gives, gives)
        mine.ways.says[NODES[1]] = (CLAIM._replace(divergence=0),)
        nursery.start_soon(mine.rankings.run)
        await mine.until_told()
        mine.library.look({MODEL: FILE})
        assert CLAIM[:5] in {one[:5] for one in mine.library.known(MODEL)}
        nursery.cancel_scope.cancel()


async def test_who_fails_is_asked_again_after_a_while(
    tmp_path: Path, patient_clock: MockClock
) -> None:
    async with exchange_in(tmp_path / "me") as mine, trio.open_nursery() as nursery:
        mine.others(None)
        nursery.start_soon(mine.rankings.run)
        await trio.sleep(module.RETRY_S * 0.9)
        assert mine.ways.asked == [NODES[1]]
        await trio.sleep(module.RETRY_S)
        assert mine.ways.asked == [NODES[1]] * 2
        nursery.cancel_scope.cancel()


async def test_nobody_fills_a_disk_with_rankings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient_clock: MockClock
) -> None:
    monkeypatch.setattr(module, "DAY_S", day_s := 300)
    count = module.FROM_ONE_MAX + 2
    made = [ranking(1.5 + number / 100) for number in range(count)]
    for one in made:
        rankings.save(tmp_path / "giver" / "rankings", one)
    async with exchange_in(tmp_path / "me") as mine, trio.open_nursery() as nursery:
        mine.others(service(tmp_path / "giver"))
        nursery.start_soon(mine.rankings.run)
        for one in made:
            mine.ways.claims = (CLAIM._replace(ranking=digest_of(one)),)
            mine.ways.changes.notify()
            await trio.sleep(5)
        found = list(mine.folder.glob(f"*{rankings.SUFFIX}"))
        assert len(found) == module.FROM_ONE_MAX
        await trio.sleep(day_s)
        await mine.until_told(module.FROM_ONE_MAX + 1)
        nursery.cancel_scope.cancel()


async def test_a_ranking_of_another_model_is_not_vouched_for(tmp_path: Path) -> None:
    other = replace(ranking(), model=type(MODEL)("b" * 64))
    rankings.save(tmp_path / "giver" / "rankings", other)
    async with exchange_in(tmp_path / "me") as mine, trio.open_nursery() as nursery:
        mine.others(service(tmp_path / "giver"))
        mine.ways.claims = (CLAIM._replace(ranking=digest_of(other)),)
        nursery.start_soon(mine.rankings.run)
        await mine.until_told()
        assert mine.library.read(digest_of(other)) == to_bytes(other)
        mine.library.look({MODEL: FILE})
        assert mine.library.known(MODEL) == ()
        nursery.cancel_scope.cancel()

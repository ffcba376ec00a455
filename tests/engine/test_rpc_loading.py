"""Loading a pipeline whose stages may have its model's file too."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import memory_stream_pair

from p2pmesh.engine import rpc_relay, rpc_weights
from p2pmesh.engine.rpc_builds import Command
from p2pmesh.engine.rpc_filter import Allowance
from p2pmesh.engine.rpc_offers import OfferAnswer
from p2pmesh.engine.rpc_relay import StagePort
from p2pmesh.engine.rpc_server import HOST
from p2pmesh.engine.rpc_weights import Place, tensor_places
from p2pmesh.errors import EngineError
from p2pmesh.watchable import Watchable
from tests.engine.pipelines import Pipeline, pipeline
from tests.engine.rpc_frames import (
    BUFFER,
    BUILD,
    CAPS,
    HELLO_ANSWER,
    MB,
    answer,
    index,
    number,
    offer,
    request,
    set_tensor,
    tensor,
)
from tests.engine.samples import MODEL
from tests.engine.weight_files import DOWN, TENSORS, UP, flipped, overwrite, write_weights
from tests.models.builders import tiny_gguf

# --- real engines -------------------------------------------------------------------------------

LAYERS = (3,)
FIRST_LAYER = 3  # of the stage, whose model has 6


async def said(split: Pipeline) -> tuple[str, Any]:
    choice = await split.choice(logprobs=1)
    return choice["text"], choice["logprobs"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """What one node says."""

    async def ask() -> tuple[str, Any]:
        async with pipeline(tmp_path_factory.mktemp("alone"), ()) as split:
            return await said(split)

    return trio.run(ask)


def weights_of_the_stage() -> dict[str, Place]:
    layers = tuple(f"blk.{layer}." for layer in range(FIRST_LAYER, FIRST_LAYER + sum(LAYERS)))
    return {k: v for k, v in tensor_places((MODEL,)).items() if k.startswith((*layers, "output_n"))}


async def test_weights_that_the_stage_has_do_not_travel(
    tmp_path: Path, alone: tuple[str, Any]
) -> None:
    async with pipeline(tmp_path, LAYERS, own=(MODEL,)) as split:
        (stage,), (port,) = split.stages, split.ports
        assert stage.port.traffic == port.traffic
        assert await said(split) == alone
        assert stage.failures == []


def wide(folder: Path) -> tuple[Path, tuple[Path, ...]]:
    """A model with large tensors in one file, and the same one in several files."""
    one = tiny_gguf(folder / "one.gguf", feed_forward=1 << 16)
    tiny_gguf(folder / "parts.gguf", feed_forward=1 << 16, split_tensors=5)
    return one, tuple(sorted(folder.glob("parts-*.gguf")))


async def test_hardly_anything_but_weights_travels(tmp_path: Path) -> None:
    """What still travels are graphs and small tensors."""
    model, own = wide(tmp_path)
    async with pipeline(tmp_path, (1,), model=model, own=own, allowed_bytes=1 << 30) as split:
        traffic = split.ports[0].traffic
        assert traffic.own_bytes == 3 * 64 * 4 << 16
        assert traffic.to_stage_bytes < traffic.own_bytes / 100


async def test_one_byte_that_differs_costs_one_tensor(
    tmp_path: Path, alone: tuple[str, Any]
) -> None:
    place = max(weights_of_the_stage().values(), key=lambda place: place.size)
    own = tmp_path / "own.gguf"
    shutil.copy(MODEL, own)
    with own.open("r+b") as file:
        file.seek(place.at + place.size // 2)
        [old] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes((old ^ 1,)))
    async with pipeline(tmp_path / "equal", LAYERS, own=(MODEL,)) as split:
        whole = split.ports[0].traffic.own_bytes
    async with pipeline(tmp_path / "flipped", LAYERS, own=(own,)) as split:
        assert split.ports[0].traffic.own_bytes == whole - place.size
        assert split.ports[0].traffic == split.stages[0].port.traffic
        assert await said(split) == alone


async def test_a_stage_without_the_file_gets_all_weights(
    tmp_path: Path, alone: tuple[str, Any]
) -> None:
    weights_bytes = sum(place.size for place in weights_of_the_stage().values())
    async with pipeline(tmp_path, LAYERS) as split:
        assert split.ports[0].traffic.own_bytes == 0
        assert split.ports[0].traffic.to_stage_bytes > weights_bytes
        assert await said(split) == alone


# --- a stage's end ------------------------------------------------------------------------------


@dataclass
class Loading:
    """A stage's end, with a program in place of its engine that has a buffer and keeps weights."""

    head: trio.abc.Stream
    port: StagePort
    got: bytearray = field(default_factory=bytearray)
    changes: Watchable = field(default_factory=Watchable)
    failures: list[EngineError] = field(default_factory=list)
    ended: trio.Event = field(default_factory=trio.Event)

    async def offers(self, name: str, data: bytes, digest: bytes = b"") -> OfferAnswer:
        """What it says to an offer."""
        digest = digest or hashlib.sha256(data).digest()
        await self.head.send_all(offer(len(data), digest, description=tensor(name=name.encode())))
        got = await receive(self.head, 9)
        assert got[:8] == number(1)
        return OfferAnswer(got[8])

    async def has(self, size: int) -> bytes:
        """What the engine got, once that is so much."""
        while len(self.got) < size:
            await self.changes.wait(self.changes.count)
        return bytes(self.got)


async def receive(stream: trio.abc.Stream, size: int) -> bytes:
    got = b""
    while len(got) < size:
        more = await stream.receive_some(size - len(got))
        assert more
        got += more
    return got


@asynccontextmanager
async def loading(
    paths: Callable[[], Sequence[Path]], *, takes: bool = True, buffer_bytes: int = MB
) -> AsyncIterator[Loading]:
    """A connection behind ALLOC_BUFFER; without `takes` the engine takes nothing more."""
    near, far = memory_stream_pair()
    stage = Loading(near, StagePort(BUILD, Allowance(buffer_bytes), paths))

    async def engine(stream: trio.SocketStream) -> None:
        async with stream:
            await receive(stream, 33)
            await stream.send_all(answer(HELLO_ANSWER))
            await receive(stream, 21)
            await stream.send_all(answer(number(BUFFER) + number(buffer_bytes)))
            while takes and (data := await stream.receive_some()):
                stage.got += data
                stage.changes.notify()
            await trio.sleep_forever()

    async def serve(port: int) -> None:
        try:
            await stage.port.serve(far, HOST, port, float)
        except EngineError as exc:
            stage.failures.append(exc)
        stage.ended.set()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, engine, 0, host=HOST))
            nursery.start_soon(serve, listeners[0].socket.getsockname()[1])
            await near.send_all(request(Command.HELLO, CAPS))
            await receive(near, 36)
            await near.send_all(request(Command.ALLOC_BUFFER, index(0) + number(buffer_bytes)))
            await receive(near, 24)
            yield stage
            nursery.cancel_scope.cancel()


def frame(name: str) -> bytes:
    return set_tensor(TENSORS[name], description=tensor(name=name.encode()))


async def test_a_tensor_that_is_here_is_loaded_from_here(tmp_path: Path) -> None:
    paths = write_weights(tmp_path / "model.gguf", per_file=1)
    async with loading(lambda: paths) as stage:
        for name in (UP, DOWN):
            assert await stage.offers(name, TENSORS[name]) is OfferAnswer.HAVE
        expected = frame(UP) + frame(DOWN)
        assert await stage.has(len(expected)) == expected
        assert stage.port.traffic.own_bytes == len(TENSORS[UP]) + len(TENSORS[DOWN])
        assert stage.port.traffic.to_head_bytes == 36 + 24 + 2 * 9


async def test_a_tensor_that_differs_or_is_not_here_is_sent(tmp_path: Path) -> None:
    paths = write_weights(tmp_path / "model.gguf")
    async with loading(lambda: paths) as stage:
        for name, data in ((UP, flipped(TENSORS[UP], 7)), ("x", TENSORS[UP]), (UP, bytes(70_000))):
            assert await stage.offers(name, data) is OfferAnswer.SEND
        await stage.head.send_all(frame(UP))
        assert await stage.has(len(frame(UP))) == frame(UP), "and nothing of this node's own"
        assert stage.port.traffic.own_bytes == 0


async def test_a_stage_without_a_file_says_so() -> None:
    async with loading(tuple) as stage:
        assert await stage.offers(UP, TENSORS[UP]) is OfferAnswer.NO_FILE


@pytest.mark.parametrize("change", ["flipped", "cut"])
async def test_a_file_that_changes_behind_its_digest_ends_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    [path] = write_weights(tmp_path / "model.gguf")

    async def hashes(place: Place, digest: bytes) -> bool:
        found = await rpc_weights.has_digest(place, digest)
        new = flipped(TENSORS[UP], 100) if change == "flipped" else b""
        overwrite(path, TENSORS[UP], new)
        return found

    monkeypatch.setattr(rpc_relay, "has_digest", hashes)
    async with loading(lambda: (path,)) as stage:
        assert await stage.offers(UP, TENSORS[UP]) is OfferAnswer.HAVE
        await stage.ended.wait()
    [failure] = stage.failures
    reason = "changed while it was loaded" if change == "flipped" else "lost its model's file"
    assert reason in str(failure)


async def test_a_stage_that_hashes_for_long_does_not_stand_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_weights(tmp_path / "model.gguf")
    monkeypatch.setattr(rpc_relay, "STALL_S", 0.05)
    monkeypatch.setattr(rpc_relay, "WATCH_INTERVAL_S", 0.01)

    async def hashes(place: Place, digest: bytes) -> bool:
        await trio.sleep(0.3)
        return await rpc_weights.has_digest(place, digest)

    monkeypatch.setattr(rpc_relay, "has_digest", hashes)
    async with loading(lambda: paths) as stage:
        assert await stage.offers(UP, TENSORS[UP]) is OfferAnswer.HAVE
        assert await stage.has(len(frame(UP))) == frame(UP)
        assert stage.failures == []


async def test_an_engine_that_takes_no_weights_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_relay, "STALL_S", 0.1)
    monkeypatch.setattr(rpc_relay, "WATCH_INTERVAL_S", 0.01)
    big = bytes(8 * MB)  # more than the system keeps for a connection
    paths = write_weights(tmp_path / "model.gguf", {"big": big})
    async with loading(lambda: paths, takes=False, buffer_bytes=len(big)) as stage:
        assert await stage.offers("big", big) is OfferAnswer.HAVE
        await stage.ended.wait()
    assert "stands still" in str(stage.failures[0])

"""What a head's end sends: whatever the files on both sides are, the stage gets the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.engine.rpc_builds import Command
from p2pmesh.engine.rpc_offers import SMALL_BYTES, OfferAnswer
from p2pmesh.engine.rpc_sender import Bytes, WeightsSender
from p2pmesh.engine.rpc_weights import Weights
from p2pmesh.errors import LocalError, ModelError, PeerError
from tests.engine.rpc_frames import (
    BUILD,
    MB,
    answer,
    chunks,
    graph,
    greeted,
    payload_of,
    request,
    set_tensor,
    tensor,
)
from tests.engine.weight_files import DOWN, NORM, TENSORS, UP, flipped, overwrite, write_weights

OTHER = "blk.0.attn_q.weight"  # in no file
QUESTION = request(Command.SET_TENSOR_HASH, payload_of(Command.SET_TENSOR_HASH))


class Way:
    """A head's end, and a stage that has these tensors (None: no file) behind its filter."""

    def __init__(self, paths: Sequence[Path], own: Mapping[str, bytes] | None) -> None:
        self.sent = self.spared = self.offers = 0
        self.replies = bytearray()
        self.names: list[str] = []
        self.before_answer: Callable[[], object] = lambda: None
        self._own = own
        self._stage = greeted()
        self._stage.allocate()
        self._stage.got.clear()
        self.sender = WeightsSender(
            BUILD,
            Weights(lambda: paths),
            send=self._send,
            reply=self._reply,
            seen=self.names.append,
            spared=self._spare,
        )

    @property
    def got(self) -> bytes:
        """What the stage's engine got."""
        return bytes(self._stage.got)

    async def say(self, data: bytes, cuts: Sequence[int] = ()) -> None:
        """The head's engine says this, and something small in the end, as it always does."""
        for chunk in chunks(data + graph(tensor()), cuts):
            await self.sender.from_engine(chunk)

    def _spare(self, size: int) -> None:
        self.spared += size

    async def _reply(self, data: Bytes) -> None:
        self.replies += data

    async def _send(self, data: Bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += len(data)
        self._stage.got += self._stage.filter.from_head(bytes(data))
        offer = self._stage.filter.offer
        if offer is None:
            return
        self.offers += 1
        self.before_answer()
        said = OfferAnswer.NO_FILE if self._own is None else OfferAnswer.SEND
        data = (self._own or {}).get(offer.tensor.name, b"")
        if hashlib.sha256(data).digest() == offer.digest:
            said = OfferAnswer.HAVE
            self._stage.got += offer.tensor.frame() + data
        for byte in self._stage.filter.answer_offer(said):
            assert self.sender.from_stage(bytes((byte,))) == b""


def frame(name: str, data: bytes) -> bytes:
    return set_tensor(data, description=tensor(name=name.encode()))


@pytest.fixture(scope="module", params=[0, 1], ids=["one-file", "parts"])
def paths(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("weights")
    return write_weights(folder / "model.gguf", per_file=request.param)


# A tensor as the file has it, with another byte, shorter by some bytes, or longer.
CHANGES = st.tuples(st.sampled_from(["none", "flip", "cut", "add"]), st.integers(0, 65_000))
MODELS = st.dictionaries(st.sampled_from([*TENSORS, OTHER]), CHANGES)


def made(model: Mapping[str, tuple[str, int]]) -> dict[str, bytes]:
    """The tensors of a model."""
    return {name: changed(TENSORS.get(name, TENSORS[UP]), *how) for name, how in model.items()}


def changed(data: bytes, change: str, at: int) -> bytes:
    match change:
        case "flip":
            return flipped(data, at)
        case "cut":
            return data[:at]
        case "add":
            return data + bytes(at + 1)
    return data


@settings(deadline=None, max_examples=60)
@given(model=MODELS, stage=st.none() | MODELS, cuts=st.lists(st.integers(0, 1 << 20), max_size=9))
def test_a_stage_gets_what_the_engine_says(
    paths: tuple[Path, ...],
    model: dict[str, tuple[str, int]],
    stage: dict[str, tuple[str, int]] | None,
    cuts: list[int],
) -> None:
    said, own = made(model), None if stage is None else made(stage)
    frames = b"".join(frame(name, data) for name, data in said.items())
    way = Way(paths, own)
    trio.run(way.say, frames, cuts)
    assert way.got == frames + graph(tensor())
    offered = {
        name: data
        for name, data in said.items()
        if len(data) >= SMALL_BYTES and TENSORS.get(name) == data
    }
    spared = [data for name, data in offered.items() if own and own.get(name) == data]
    assert way.spared == sum(map(len, spared))
    assert way.offers == (min(len(offered), 1) if own is None else len(offered))
    assert way.sent <= len(way.got) - way.spared + 354 * way.offers


@settings(deadline=None, max_examples=40)
@given(at=st.integers(0, len(TENSORS[UP]) - 1), cuts=st.lists(st.integers(0, 1 << 20), max_size=5))
def test_any_byte_that_differs_is_seen(paths: tuple[Path, ...], at: int, cuts: list[int]) -> None:
    way, said = Way(paths, TENSORS), frame(UP, flipped(TENSORS[UP], at))
    trio.run(way.say, said, cuts)
    assert way.got == said + graph(tensor())
    assert (way.offers, way.spared) == (0, 0)


async def test_a_part_of_a_tensor_is_sent(paths: tuple[Path, ...]) -> None:
    """Whatever its size: an offer is of a whole tensor."""
    said = bytearray(frame(DOWN, TENSORS[DOWN]))
    said[9 + 296 + 1] = 32
    way = Way(paths, TENSORS)
    await way.say(bytes(said))
    assert way.got == said + graph(tensor())
    assert way.offers == 0


async def test_the_cache_is_answered_without_the_stage(paths: tuple[Path, ...]) -> None:
    way = Way(paths, TENSORS)
    await way.say(QUESTION + frame(UP, TENSORS[UP]))
    assert way.replies == answer(b"\0")
    assert way.got == frame(UP, TENSORS[UP]) + graph(tensor())
    assert way.spared == len(TENSORS[UP])


async def test_nothing_passes_while_a_tensor_is_compared(paths: tuple[Path, ...]) -> None:
    way, said = Way(paths, TENSORS), frame(UP, TENSORS[UP])
    await way.sender.from_engine(said[:-1])
    assert way.sent == 0
    await way.sender.from_engine(said[-1:])
    assert way.sent == 354


async def test_only_offers_are_answered_out_of_turn(paths: tuple[Path, ...]) -> None:
    way = Way(paths, TENSORS)
    said = answer(b"\x01" * 8)
    assert way.sender.from_stage(said) == said
    await way.say(frame(UP, TENSORS[UP]))
    assert way.sender.from_stage(said) == said


async def test_a_stage_that_answers_an_offer_with_something_else_is_refused(
    paths: tuple[Path, ...],
) -> None:
    way = Way(paths, TENSORS)
    way.before_answer = lambda: way.sender.from_stage(answer(b"\x07"))
    with pytest.raises(PeerError, match="answer to an offer is invalid"):
        await way.say(frame(UP, TENSORS[UP]))


@pytest.fixture
def changing(tmp_path: Path) -> Path:
    [path] = write_weights(tmp_path / "model.gguf")
    return path


async def test_a_file_that_changes_before_it_is_sent_ends_the_connection(changing: Path) -> None:
    way = Way((changing,), {})
    way.before_answer = lambda: overwrite(changing, TENSORS[UP], flipped(TENSORS[UP], 9))
    with pytest.raises(ModelError, match=r"model\.gguf changed while its model was loaded"):
        await way.say(frame(UP, TENSORS[UP]))


async def test_a_file_that_is_cut_before_anything_was_compared_is_not_missed(
    changing: Path,
) -> None:
    way, said = Way((changing,), {}), frame(UP, TENSORS[UP])
    await way.sender.from_engine(said[: 9 + 305])
    os.truncate(changing, 1000)
    await way.say(said[9 + 305 :])
    assert way.got == said + graph(tensor())


async def test_a_file_that_is_cut_later_ends_the_connection(changing: Path) -> None:
    """What was equal so far is nowhere else."""
    way, said = Way((changing,), {}), frame(UP, TENSORS[UP])
    await way.sender.from_engine(said[:70_000])
    os.truncate(changing, 1000)
    with pytest.raises(LocalError, match="is shorter than it was"):
        await way.sender.from_engine(said[70_000:])


def test_the_tensors_are_of_the_sizes_that_matter() -> None:
    sizes = {name: len(data) for name, data in TENSORS.items()}
    assert sizes[NORM] < SMALL_BYTES == sizes[DOWN] < sizes[UP] < MB

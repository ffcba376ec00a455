"""Weights on this node's disk: where they are, and what becomes of those that are gone."""

from __future__ import annotations

import hashlib
import time
from functools import partial
from pathlib import Path

import pytest
import trio

from p2pmesh.engine import rpc_weights
from p2pmesh.engine.rpc_weights import (
    READ_BYTES,
    Place,
    TensorReader,
    Weights,
    has_digest,
    tensor_places,
)
from p2pmesh.errors import LocalError
from tests.engine.weight_files import DOWN, NORM, TENSORS, UP, write_weights

DATA = bytes(range(256)) * (READ_BYTES // 100)  # two and a half reads
SHA256 = hashlib.sha256(DATA).digest()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    path = tmp_path / "weights"
    path.write_bytes(b"header" + DATA + b"more")
    return Place(path, 6, len(DATA))


@pytest.mark.parametrize("per_file", [0, 1, 2])
def test_each_tensor_is_where_its_file_has_it(tmp_path: Path, per_file: int) -> None:
    paths = write_weights(tmp_path / "model.gguf", per_file=per_file)
    places = tensor_places(paths)
    assert len(paths) == (per_file and -(-len(TENSORS) // per_file)) or len(paths) == 1
    assert places.keys() == TENSORS.keys()
    for name, data in TENSORS.items():
        found = places[name]
        assert found.size == len(data)
        assert found.path.read_bytes()[found.at :][: found.size] == data


async def test_a_tensor_is_found_by_name_and_size(tmp_path: Path) -> None:
    weights = Weights(lambda: write_weights(tmp_path / "model.gguf"))
    found = await weights.find(UP, len(TENSORS[UP]))
    assert found is not None
    assert await has_digest(found, hashlib.sha256(TENSORS[UP]).digest())
    assert not await has_digest(found, hashlib.sha256(TENSORS[DOWN]).digest())
    assert await weights.find(UP, len(TENSORS[UP]) - 1) is None
    assert await weights.find(NORM + "s", len(TENSORS[NORM])) is None
    assert await weights.are_here()


async def test_files_that_are_not_here_or_damaged_have_no_tensors(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF")
    for paths in ((), (damaged,), (tmp_path / "missing.gguf",)):
        weights = Weights(partial(tuple, paths))
        assert await weights.find(UP, len(TENSORS[UP])) is None
        assert not await weights.are_here()


async def test_a_tensor_is_read_to_its_end(place: Place) -> None:
    reader = TensorReader(place)
    pieces = [await reader.read(), await reader.read(7)]
    while reader.left:
        pieces.append(await reader.read())
    assert b"".join(pieces) == DATA
    assert [len(piece) for piece in pieces[:2]] == [READ_BYTES, 7]
    assert reader.digest() == SHA256
    assert await has_digest(place, SHA256)


async def test_what_differs_does_not_count(place: Place) -> None:
    reader = TensorReader(place)
    assert await reader.equals(memoryview(DATA)[:1000])
    assert not await reader.equals(memoryview(DATA)[1001:2000])
    assert not await reader.equals(memoryview(b"x"))
    assert reader.at == 1000
    assert reader.digest() == hashlib.sha256(DATA[:1000]).digest()


async def test_a_file_that_became_shorter_or_is_gone_is_an_error(place: Place) -> None:
    place.path.write_bytes(DATA[:-7])
    reader = TensorReader(place)
    with pytest.raises(LocalError, match="is shorter than it was"):
        while reader.left:
            await reader.read()
    assert not await has_digest(place, SHA256)
    place.path.unlink()
    with pytest.raises(LocalError, match="Cannot read"):
        await TensorReader(place).equals(memoryview(DATA)[:10])
    assert not await has_digest(place, SHA256)


async def test_a_disk_that_does_not_answer_is_an_error(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_weights, "READ_S", 0.05)
    monkeypatch.setattr(TensorReader, "_peek", lambda _self, _count: time.sleep(0.5))
    with trio.fail_after(0.4), pytest.raises(LocalError, match="could not be read in"):
        await TensorReader(place).read()

"""What the tests of expert shards share: models in memory, and shards as their tensors."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from p2pmesh.models import shard_file
from p2pmesh.models.experts import ExpertLists
from p2pmesh.models.gguf import Header, scan
from tests.models.layouts import EXPERTS, moe_gguf

Array = np.ndarray[Any, Any]


class Source(NamedTuple):
    """The files of a model in memory."""

    files: tuple[bytes, ...]
    headers: tuple[Header, ...]


@functools.cache
def source(
    layout: str,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    down: gguf.GGMLQuantizationType | None = None,
    width: int = 0,
    split_tensors: int = 0,
) -> Source:
    """Return the model of `moe_gguf`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.gguf")
        moe_gguf(path, layout, kind=kind, down=down, width=width, split_tensors=split_tensors)
        files = tuple(path.read_bytes() for path in sorted(Path(folder).iterdir()))
    return Source(files, tuple(map(scan, files)))


def cut(model: Source, lists: ExpertLists) -> Source:
    """Return the shard of a model, made in memory."""
    return assembled(model, shard_file.shard_file(model.headers, lists))


def assembled(model: Source, shard: shard_file.ShardFile, *, slab_bytes: int = 2**20) -> Source:
    """Return the file of a shard, with the bytes of its model in memory.

    Args:
        slab_bytes: Of a matrix that are read at a time.
    """
    data = b"".join(_bytes(model, piece, slab_bytes) for piece in shard.pieces())
    assert len(data) == shard.size_bytes
    return Source((data,), (scan(data),))


def _bytes(model: Source, piece: shard_file.Piece, slab_bytes: int) -> bytes:
    match piece:
        case shard_file.Span(part=part, start=start, end=end):
            return model.files[part][start:end]
        case shard_file.Cut(part=part):
            data = model.files[part]
            slabs = list(piece.slabs(slab_bytes))
            return b"".join(one.taken(data[one.start :][: one.read_bytes]) for one in slabs)
        case bytes():
            return piece


def tensors(model: Source) -> dict[str, tuple[tuple[int, ...], int, bytes]]:
    """Return shape, type and bytes of each tensor, in their order in the file."""
    return {
        tensor.name: (
            tensor.shape,
            tensor.type,
            data[(start := header.data_offset + tensor.offset) : start + tensor.size_bytes],
        )
        for data, header in zip(model.files, model.headers, strict=True)
        for tensor in header.tensors
    }


def assert_kept(before: Source, after: Source, lists: Mapping[int, Sequence[int]]) -> None:
    """Each kept expert has the bytes that the model has; everything else is whole."""
    whole, shard = tensors(before), tensors(after)
    assert list(whole) == list(shard)
    for name, (shape, kind, data) in whole.items():
        counts_experts = shape[-1] == EXPERTS and ("exp" in name or "ffn_gate_inp." in name)
        if not counts_experts or "_shexp" in name:
            assert shard[name] == (shape, kind, data)
            continue
        kept = lists[int(name.split(".")[1])]
        size = len(data) // EXPERTS
        rows = b"".join(data[expert * size :][:size] for expert in kept)
        assert shard[name] == ((*shape[:-1], len(kept)), kind, rows)

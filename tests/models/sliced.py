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
    split_tensors: int = 0,
) -> Source:
    """Return the model of `moe_gguf`."""
    with tempfile.TemporaryDirectory() as folder:
        moe_gguf(Path(folder, "m.gguf"), layout, kind=kind, split_tensors=split_tensors)
        files = tuple(path.read_bytes() for path in sorted(Path(folder).iterdir()))
    return Source(files, tuple(map(scan, files)))


def cut(model: Source, lists: ExpertLists) -> Source:
    """Return the shard of a model, made in memory."""
    pieces = shard_file.shard_file(model.headers, lists).pieces()
    data = b"".join(
        model.files[piece.part][piece.start : piece.end]
        if isinstance(piece, shard_file.Span)
        else piece
        for piece in pieces
    )
    return Source((data,), (scan(data),))


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

"""Importance matrices for tests: files as llama-imatrix writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from p2pmesh.models.imatrix import DownTensor, Imatrix, LayerStatistics


def random_imatrix(tensors: Mapping[int, DownTensor], *, chunks: int = 8, seed: int = 1) -> Imatrix:
    """Return statistics in which no token reached the first expert of each layer."""
    rng = np.random.default_rng(seed)
    layers = {}
    for layer, tensor in tensors.items():
        counts = rng.integers(1, 1000, tensor.experts).astype(np.float64)
        counts[0] = 0
        sums = rng.random((tensor.experts, tensor.width), np.float32) * counts[:, None]
        layers[layer] = LayerStatistics(counts=counts, in_sum2=sums.astype(np.float32))
    return Imatrix(chunks=chunks, layers=layers)


def write_imatrix(
    path: Path, tensors: Mapping[int, DownTensor], matrix: Imatrix, *, kind: str = "imatrix"
) -> Path:
    """Write statistics of the experts' last matrices; `kind` is what the file says that it is."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type(kind)
    writer.add_uint32("imatrix.chunk_count", matrix.chunks)
    for layer, statistics in matrix.layers.items():
        name = tensors[layer].info.name
        writer.add_tensor(f"{name}.in_sum2", statistics.in_sum2)
        writer.add_tensor(f"{name}.counts", statistics.counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

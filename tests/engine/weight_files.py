"""GGUF files of a few tensors with known bytes; no engine could load them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

# Above and below the size from which tensors are offered, and no multiple of any chunk.
TENSORS: Mapping[str, bytes] = {
    "blk.0.ffn_up.weight": np.random.default_rng(1).bytes(150_001),
    "blk.0.ffn_down.weight": np.random.default_rng(2).bytes(65_536),
    "blk.0.attn_norm.weight": np.random.default_rng(3).bytes(65_535),
}
UP, DOWN, NORM = TENSORS


def write_weights(
    path: Path, tensors: Mapping[str, bytes] = TENSORS, *, per_file: int = 0
) -> tuple[Path, ...]:
    """Return the files of a model with these tensors, in order."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_file)
    for name, data in tensors.items():
        writer.add_tensor(name, np.frombuffer(data, np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (path,) if path.exists() else tuple(sorted(path.parent.glob(f"{path.stem}-*-of-*")))


def flipped(data: bytes, at: int) -> bytes:
    """The data with another byte at this place."""
    changed = bytearray(data)
    changed[at] ^= 0x10
    return bytes(changed)


def overwrite(path: Path, old: bytes, new: bytes) -> None:
    """Put a tensor's new bytes, of the same size, in place of its old ones in a file."""
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))

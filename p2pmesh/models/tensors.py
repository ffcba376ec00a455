"""The rows of a GGUF file's tensor table: what a tensor may claim to be, and where it may lie.

Pure. Sizes follow from shape and type and are never taken from the file; types are those of the
gguf package. Messages are clauses, as in gguf.py.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from p2pmesh.errors import ModelError

ELEMENTS_MAX = 2**63 - 1  # of one tensor; llama.cpp counts them in int64

_LAYER = re.compile(r"blk\.(\d{1,9})\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One row of the tensor table.

    Attributes:
        shape: Elements per dimension, the fastest first, as the file has them.
        type: ggml's number of the type, see `type_name`.
        offset: Bytes from the file's `data_offset`.
        size_bytes: What shape and type need.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    size_bytes: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return functools.reduce(int.__mul__, self.shape, 1)


def layer_of(name: str) -> int | None:
    """The layer that a tensor of this name belongs to, counted from 0; None for none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


@functools.cache
def _types() -> dict[int, tuple[str, int, int]]:
    # Late: the gguf package imports numpy, 0.1 s that commands without a model need not wait for.
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def type_name(number: int) -> str:
    """The name of one of ggml's tensor types, such as "Q8_0"."""
    known = _types().get(number)
    return known[0] if known else f"type {number}"


def type_block(number: int) -> int:
    """Return how many neighbouring elements of a row one of ggml's known types stores together."""
    return _types()[number][1]


def tensor_bytes(name: str, shape: tuple[int, ...], number: int) -> int:
    """Return the bytes of a tensor of this shape and type, or raise why there can be none."""
    known = _types().get(number)
    if known is None:
        raise ModelError(
            f"tensor {name!r} has the unknown type {number}; the file is damaged, or newer than "
            "this p2pmesh: update it"
        )
    type_text, block, block_bytes = known
    elements = functools.reduce(int.__mul__, shape, 1)  # of at most 4 numbers below 2**64
    if elements > ELEMENTS_MAX:
        raise ModelError(f"tensor {name!r} claims {elements} elements; it is damaged or forged")
    row = shape[0] if shape else 1
    if row % block:
        raise ModelError(
            f"tensor {name!r} has rows of {row} elements, no multiple of {type_text}'s {block}; "
            "it is damaged"
        )
    return elements // block * block_bytes


def check_layout(tensors: tuple[TensorInfo, ...], alignment: int, data_bytes: int) -> None:
    """All tensors have names of their own and lie in the file, aligned, one behind the other."""
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ModelError("two of its tensors have the same name; it is damaged or forged")
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.offset % alignment:
            raise ModelError(f"tensor {tensor.name!r} is not aligned; it is damaged")
        if tensor.offset < end:
            raise ModelError(
                f"tensors {before!r} and {tensor.name!r} overlap; it is damaged or forged"
            )
        end, before = tensor.offset + tensor.size_bytes, tensor.name
        if end > data_bytes:
            raise ModelError(
                f"it ends before tensor {tensor.name!r} does ({end - data_bytes} bytes are "
                "missing); download it again"
            )

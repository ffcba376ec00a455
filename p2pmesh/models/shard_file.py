"""The file of a shard, as bytes of its own and ranges of the model's files.

Pure. Nothing is decoded: a shard is the model's header with some numbers changed, and parts of the
model's bytes. Experts are whole slices along the last axis of their tensors, whatever the
quantisation, so a shard of whole experts consists of ranges: a node that has the model can write
the file, another can fetch just these ranges. Thin shards (thin.py) also have columns of matrices.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from p2pmesh.models.experts import ExpertLists, check_lists, is_sliced, layout_of
from p2pmesh.models.gguf import MAGIC, Header
from p2pmesh.models.metadata import Metadata
from p2pmesh.models.tensors import TensorInfo, layer_of, tensor_bytes

if TYPE_CHECKING:  # numpy takes 0.1 s that whoever cuts no columns need not wait for
    import numpy as np

    Indices: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

_SPLIT = "split."  # keys of a file that is one of several parts
_KEY_PREFIX_BYTES = 8 + 4  # length of the key, and type of the value
_ARRAY_PREFIX_BYTES = 4 + 8  # type and number of the elements


class Span(NamedTuple):
    """Bytes `start` to `end` of one of the model's files, counted from 0."""

    part: int
    start: int
    end: int


class Cut(NamedTuple):
    """Some columns of a matrix in one of the model's files, whose rows are neighbours.

    Attributes:
        part: Number of the file, from 0.
        start: Its first byte there.
        rows: How many there are; each gives the same columns.
        columns: Of each row.
        column_bytes: Of one column in one row.
        kept: The columns that stay, ascending.
    """

    part: int
    start: int
    rows: int
    columns: int
    column_bytes: int
    kept: Indices

    @property
    def read_bytes(self) -> int:
        """The bytes of the whole matrix."""
        return self.rows * self.columns * self.column_bytes

    @property
    def size_bytes(self) -> int:
        """The bytes that stay."""
        return self.rows * len(self.kept) * self.column_bytes

    def slabs(self, bytes_max: int) -> Iterator[Cut]:
        """Cut the matrix into parts whose results follow each other.

        Args:
            bytes_max: To read for each of them, or one column where that is more.
        """
        rows = max(bytes_max // (self.columns * self.column_bytes), 1)
        columns = min(max(bytes_max // self.column_bytes, 1), self.columns)
        for row in range(0, self.rows, rows):
            for column in range(0, self.columns, columns):
                first, end = self.kept.searchsorted([column, column + columns])
                yield Cut(
                    part=self.part,
                    start=self.start + (row * self.columns + column) * self.column_bytes,
                    rows=min(rows, self.rows - row),
                    columns=min(columns, self.columns - column),
                    column_bytes=self.column_bytes,
                    kept=self.kept[first:end] - column,
                )

    def taken(self, data: bytes) -> bytes:
        """Return what stays of the bytes of the whole matrix."""
        import numpy as np

        matrix = np.frombuffer(data, np.dtype((np.void, self.column_bytes)))
        return matrix.reshape(self.rows, self.columns).take(self.kept, axis=1).tobytes()


Piece: TypeAlias = bytes | Span | Cut

Slicing: TypeAlias = Callable[[TensorInfo, Span], tuple[tuple[int, ...], Iterable[Piece]]]
"""Called with a tensor of the model and where it lies; returns its shape and bytes in the shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A tensor of the shard: what it is there, and where the model has its bytes."""

    info: TensorInfo
    source: Iterable[Piece]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """The file of a shard.

    Attributes:
        header: Its bytes up to the first tensor.
        tensors: Its tensors, in the order of the model.
        alignment: Bytes; each tensor begins at a multiple of it.
    """

    header: tuple[Piece, ...]
    tensors: tuple[_Tensor, ...]
    alignment: int

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        sizes = (tensor.info.size_bytes for tensor in self.tensors)
        return sum(map(_length, self.header)) + sum(size + -size % self.alignment for size in sizes)

    def pieces(self) -> Iterator[Piece]:
        """All bytes of the file in order; neighbouring ranges of the model are one."""
        return _joined(self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        yield from self.header
        for tensor in self.tensors:
            yield from tensor.source
            yield bytes(-tensor.info.size_bytes % self.alignment)


Plan: TypeAlias = Callable[[Sequence[Header]], ShardFile]
"""Returns the file of a shard, given the headers of its model; raises as `shard_file` does."""


def shard_file(headers: Sequence[Header], lists: ExpertLists) -> ShardFile:
    """Return the shard of a model that keeps these experts.

    Args:
        headers: Of the model's files, in order; the first holds the metadata.
        lists: The experts to keep in each layer that has any.

    Raises:
        ModelError: The model has no experts, or no shard of it would be right; a clause that goes
            on from the file's name.
        ConfigError: No shard can be made of these lists.
    """
    layout = layout_of(headers)
    kept = check_lists(layout, lists)
    prefix = f"{Metadata(headers[0]).architecture}."
    changed = {
        f"{prefix}expert_count": kept,
        f"{prefix}expert_used_count": layout.used_of(kept),
    }

    def sliced(tensor: TensorInfo, whole: Span) -> tuple[tuple[int, ...], Iterable[Piece]]:
        layer = layer_of(tensor.name)
        if layer is None or not is_sliced(tensor.name):
            return tensor.shape, (whole,)
        size = tensor.size_bytes // tensor.shape[-1]
        starts = [whole.start + expert * size for expert in lists[layer]]
        source = [Span(whole.part, start, start + size) for start in starts]
        return (*tensor.shape[:-1], kept), source

    return changed_file(headers, changed, sliced)


def changed_file(
    headers: Sequence[Header], changed: Mapping[str, int | tuple[int, ...]], sliced: Slicing
) -> ShardFile:
    """Return a model as one file with other numbers and parts of some tensors.

    Args:
        headers: Of the model's files, in order; the first holds the metadata.
        changed: Numbers by the key of the metadata, which has as many there.
        sliced: What there is of each tensor.
    """
    tensors = tuple(_tensors(headers, sliced))
    return ShardFile(
        header=tuple(_header(headers[0], changed, [tensor.info for tensor in tensors])),
        tensors=tensors,
        alignment=headers[0].alignment,
    )


def _tensors(headers: Sequence[Header], sliced: Slicing) -> Iterator[_Tensor]:
    offset = 0
    for part, header in enumerate(headers):
        for tensor in header.tensors:
            start = header.data_offset + tensor.offset
            shape, source = sliced(tensor, Span(part, start, start + tensor.size_bytes))
            info = TensorInfo(
                name=tensor.name,
                shape=shape,
                type=tensor.type,
                offset=offset,
                size_bytes=tensor_bytes(tensor.name, shape, tensor.type),
            )
            yield _Tensor(info=info, source=source)
            offset += info.size_bytes + -info.size_bytes % headers[0].alignment


def _header(
    header: Header, changed: Mapping[str, int | tuple[int, ...]], tensors: Sequence[TensorInfo]
) -> Iterator[Piece]:
    """The header of the shard: that of the model, with other numbers and another tensor table."""
    keys = [key for key in header.entries if not key.startswith(_SPLIT)]
    pieces: list[Piece] = [MAGIC + struct.pack("<IQQ", header.version, len(tensors), len(keys))]
    for key in keys:
        if key in changed:
            pieces += _entry(header, key, changed[key])
        else:
            pieces.append(Span(0, *header.entries[key]))
    pieces.append(b"".join(map(_row, tensors)))
    yield from pieces
    yield bytes(-sum(map(_length, pieces)) % header.alignment)


def _entry(header: Header, key: str, value: int | tuple[int, ...]) -> tuple[Piece, ...]:
    """A metadata entry with other numbers, in the type and width that it had."""
    start, end = header.entries[key]
    numbers = value if isinstance(value, tuple) else (value,)
    at = start + _KEY_PREFIX_BYTES + len(key.encode())
    if isinstance(value, tuple):
        at += _ARRAY_PREFIX_BYTES
    width = (end - at) // len(numbers)
    return Span(0, start, at), b"".join(number.to_bytes(width, "little") for number in numbers)


def _row(tensor: TensorInfo) -> bytes:
    name = tensor.name.encode()
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        + struct.pack("<IQ", tensor.type, tensor.offset)
    )


def _length(piece: Piece) -> int:
    match piece:
        case Span(start=start, end=end):
            return end - start
        case Cut():
            return piece.size_bytes
    return len(piece)


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same bytes in fewer pieces, none of them empty."""
    last: Piece = b""
    for piece in pieces:
        if not _length(piece):
            continue
        if isinstance(last, bytes) and isinstance(piece, bytes):
            last += piece
        elif (
            isinstance(last, Span)
            and isinstance(piece, Span)
            and (last.part, last.end) == (piece.part, piece.start)
        ):
            last = Span(last.part, last.start, piece.end)
        else:
            if last:
                yield last
            last = piece
    if last:
        yield last

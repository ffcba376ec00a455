"""The file of an expert shard, as bytes of its own and ranges of the model's files.

Pure. Experts are whole slices along the last axis of their tensors, whatever the quantisation, so
nothing is decoded: a shard is the model's header with some numbers changed, and ranges of the
model's bytes. A node that has the model can write the file; another can fetch just these ranges.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from p2pmesh.models.experts import ExpertLists, check_lists, is_sliced, layout_of
from p2pmesh.models.gguf import MAGIC, Header
from p2pmesh.models.metadata import Metadata
from p2pmesh.models.tensors import TensorInfo, layer_of, tensor_bytes

_SPLIT = "split."  # keys of a file that is one of several parts
_KEY_PREFIX_BYTES = 8 + 4  # length of the key, and type of the value
_ARRAY_PREFIX_BYTES = 4 + 8  # type and number of the elements


class Span(NamedTuple):
    """Bytes `start` to `end` of one of the model's files, counted from 0."""

    part: int
    start: int
    end: int


Piece: TypeAlias = bytes | Span


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A tensor of the shard: what it is there, and where the model has its bytes."""

    info: TensorInfo
    source: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """The file of a shard.

    Attributes:
        header: Its bytes up to the first tensor.
        tensors: Its tensors, in the order of the model.
        alignment: Bytes; each tensor begins at a multiple of it.
        kept: Experts of each layer.
    """

    header: tuple[Piece, ...]
    tensors: tuple[_Tensor, ...]
    alignment: int
    kept: int

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        return sum(map(_length, self.pieces()))

    def pieces(self) -> Iterator[Piece]:
        """All bytes of the file in order; neighbouring ranges of the model are one."""
        return _joined(self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        yield from self.header
        for tensor in self.tensors:
            yield from tensor.source
            yield bytes(-tensor.info.size_bytes % self.alignment)


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
    tensors = tuple(_tensors(headers, lists))
    return ShardFile(
        header=tuple(_header(headers[0], changed, [tensor.info for tensor in tensors])),
        tensors=tensors,
        alignment=headers[0].alignment,
        kept=kept,
    )


def _tensors(headers: Sequence[Header], lists: ExpertLists) -> Iterator[_Tensor]:
    offset = 0
    for part, header in enumerate(headers):
        for tensor in header.tensors:
            start = header.data_offset + tensor.offset
            shape, layer = tensor.shape, layer_of(tensor.name)
            source: Iterable[Span] = [Span(part, start, start + tensor.size_bytes)]
            if layer is not None and is_sliced(tensor.name):
                size = tensor.size_bytes // shape[-1]
                source = [
                    Span(part, start + expert * size, start + (expert + 1) * size)
                    for expert in lists[layer]
                ]
                shape = (*shape[:-1], len(lists[layer]))
            info = TensorInfo(
                name=tensor.name,
                shape=shape,
                type=tensor.type,
                offset=offset,
                size_bytes=tensor_bytes(tensor.name, shape, tensor.type),
            )
            yield _Tensor(info=info, source=tuple(source))
            offset += info.size_bytes + -info.size_bytes % headers[0].alignment


def _header(
    header: Header, changed: dict[str, int | tuple[int, ...]], tensors: Sequence[TensorInfo]
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
    return piece.end - piece.start if isinstance(piece, Span) else len(piece)


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

"""The header of a GGUF file: metadata and tensor table, without the weights.

Pure: works on any buffer, so a mapped file, bytes just read or a range sent by a peer are alike.
Files come from strangers. Each number that the file states is bounded before it is used, each
bound is a constant below with its reason, and `ModelError` is the only thing that escapes. What a
model's card does not need (a vocabulary of 150,000 strings) is walked and not kept: gguf's own
reader takes seconds for that, and loops for as long as a forged count tells it to.

Messages are clauses that go on from a file's name: "model.gguf cannot be used: <message>".
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

from p2pmesh.errors import ModelError
from p2pmesh.models.tensors import TensorInfo, check_layout, tensor_bytes

__all__ = ["Header", "ShortReadError", "Skipped", "TensorInfo", "Value", "ValueType", "scan"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had 32 bit counts and left use in 2023; llama.cpp refuses it too
DEFAULT_ALIGNMENT = 32

HEADER_BYTES_MAX = 128 * 2**20  # the largest seen are near 30 MB: 260k tokens and a tokenizer.json
KEY_COUNT_MAX = 4096  # real files have 20 to 80
KEY_BYTES_MAX = 65_535  # the limit that the format itself states
TENSOR_COUNT_MAX = 65_536  # the largest models have a few thousand
NAME_BYTES_MAX = 63  # llama.cpp: GGML_MAX_NAME, with the final zero
DIMENSIONS_MAX = 4  # llama.cpp: GGML_MAX_DIMS
ARRAY_ELEMENTS_MAX = 4 * 2**20  # a vocabulary has up to 260k tokens and twice as many merges
ARRAY_DEPTH_MAX = 1  # arrays in arrays are allowed by the format; nobody writes or reads them
KEPT_ELEMENTS_MAX = 1024  # per-layer lists (at most 1000 layers), tags, languages
KEPT_STRING_BYTES = 2**20  # chat templates reach 30 KB; longer are whole tokenizer files
ALIGNMENT_MAX = 2**20  # pages are at most 64 KiB; more only wastes the file

# Things people take for a model because of a wrong download, by how they begin.
_OTHER_FILES = (
    (
        b"version https://git-lfs",
        "it is a git LFS pointer; fetch the real file with `git lfs pull`",
    ),
    (b"<", "it is a web page, not a model; download the file itself"),
    (b"lmgg", "it is in the old GGML format; get a GGUF file of this model"),
    (b"tjgg", "it is in the old GGJT format; get a GGUF file of this model"),
    (b"FUGG", "its bytes are in reverse order; get a little-endian GGUF file"),
)


class ValueType(IntEnum):
    """How a metadata value is stored."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_CODES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A value too long to keep: an array's element type and count, or a string's bytes."""

    type: ValueType
    count: int


Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | tuple[Scalar, ...] | Skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        alignment: Bytes; each tensor begins at a multiple of it.
        data_offset: Bytes from the start of the file to the first tensor.
        size_bytes: Of the whole file.
        entries: For each metadata key, where its entry (key, type and value) begins and ends, in
            bytes from the start of the file: what copies a header need not understand its values.
    """

    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    size_bytes: int
    entries: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class ShortReadError(ModelError):
    """The header goes on behind the bytes given, and the file has more of them."""


def scan(buffer: bytes | memoryview | mmap.mmap, *, size_bytes: int | None = None) -> Header:
    """Read the header at the start of a GGUF file.

    Args:
        buffer: The file, or enough of its beginning.
        size_bytes: Of the whole file, when `buffer` is only a part.

    Raises:
        ShortReadError: `buffer` ends before the header, and the file does not.
        ModelError: The file is damaged, forged, or no GGUF file that can be used here.
    """
    with memoryview(buffer) as whole, whole.cast("B") as view:
        size = len(view) if size_bytes is None else size_bytes
        assert size >= len(view), "a part cannot be longer than its file"
        with view[:HEADER_BYTES_MAX] as head:
            return _Scan(head, size).header()


class _Scan:
    """A position in the header; every step is checked against the end first."""

    def __init__(self, view: memoryview, size_bytes: int) -> None:
        self._view = view
        self._size_bytes = size_bytes
        self._at = 0

    def header(self) -> Header:
        version = self._preamble()
        tensor_count = self._count("tensors", TENSOR_COUNT_MAX)
        key_count = self._count("metadata keys", KEY_COUNT_MAX)
        metadata: dict[str, Value] = {}
        entries: dict[str, tuple[int, int]] = {}
        for _ in range(key_count):
            start = self._at
            key = self._name("a metadata key", KEY_BYTES_MAX)
            if key in metadata:
                raise ModelError(f"its header has the key {key!r} twice; it is damaged or forged")
            metadata[key] = self._value(key)
            entries[key] = (start, self._at)
        alignment = _alignment(metadata)
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        data_offset = -(-self._at // alignment) * alignment
        check_layout(tensors, alignment, self._size_bytes - data_offset)
        return Header(
            version=version,
            alignment=alignment,
            metadata=metadata,
            tensors=tensors,
            data_offset=data_offset,
            size_bytes=self._size_bytes,
            entries=entries,
        )

    def _preamble(self) -> int:
        if self._size_bytes == 0:
            raise ModelError("it is empty; download it again")
        start = bytes(self._view[:64])
        for prefix, sentence in _OTHER_FILES:
            if start.startswith(prefix):
                raise ModelError(sentence)
        if not MAGIC.startswith(start[:4]):
            raise ModelError("it is not a GGUF file; p2pmesh serves models in the GGUF format only")
        self._take(4)
        version = self._u32()
        if version and version & 0xFFFF == 0:
            raise ModelError("it is big-endian; get the little-endian GGUF file of this model")
        if version < VERSIONS[0]:
            raise ModelError(f"it is GGUF version {version}, which is too old; get a newer file")
        if version > VERSIONS[-1]:
            raise ModelError(f"it is GGUF version {version}, newer than this p2pmesh; update it")
        return version

    def _short(self) -> ModelError:
        """Why the bytes end here."""
        if len(self._view) == HEADER_BYTES_MAX:
            return ModelError(
                f"its header is larger than {HEADER_BYTES_MAX >> 20} MiB; it is damaged or forged"
            )
        if len(self._view) < self._size_bytes:
            return ShortReadError(
                f"its header is longer than the {len(self._view)} bytes read so far"
            )
        return ModelError(
            f"it ends inside its header, after {self._size_bytes} bytes; download it again"
        )

    def _take(self, count: int) -> int:
        """Step over `count` bytes and return where they begin."""
        at = self._at
        if count > len(self._view) - at:
            raise self._short()
        self._at = at + count
        return at

    def _u32(self) -> int:
        value: int = _U32.unpack_from(self._view, self._take(4))[0]
        return value

    def _u64(self) -> int:
        value: int = _U64.unpack_from(self._view, self._take(8))[0]
        return value

    def _count(self, what: str, limit: int) -> int:
        count = self._u64()
        if count > limit:
            raise ModelError(f"it claims {count} {what} (at most {limit}); it is damaged or forged")
        return count

    def _name(self, what: str, limit: int) -> str:
        length = self._u64()
        if not 0 < length <= limit:
            raise ModelError(
                f"{what} has {length} bytes (1 to {limit} are allowed); it is damaged or forged"
            )
        at = self._take(length)
        try:
            return str(self._view[at : at + length], "utf-8")
        except UnicodeDecodeError as exc:
            raise ModelError(f"{what} is not UTF-8 text; it is damaged or forged") from exc

    def _type(self, key: str) -> ValueType:
        number = self._u32()
        try:
            return ValueType(number)
        except ValueError as exc:
            raise ModelError(f"{key!r} has the unknown value type {number}; it is damaged") from exc

    def _value(self, key: str) -> Value:
        kind = self._type(key)
        if kind is ValueType.STRING:
            return self._string()
        if kind is ValueType.ARRAY:
            return self._array(key)
        return self._numbers(kind, 1)[0]

    def _string(self) -> str | Skipped:
        length = self._u64()
        at = self._take(length)
        if length > KEPT_STRING_BYTES:
            return Skipped(type=ValueType.STRING, count=length)
        # Names in some old files are Latin-1, and llama.cpp does not mind: neither do we.
        return str(self._view[at : at + length], "utf-8", "replace")

    def _numbers(self, kind: ValueType, count: int) -> tuple[Scalar, ...]:
        layout = f"<{count}{_CODES[kind]}"
        return struct.unpack_from(layout, self._view, self._take(struct.calcsize(layout)))

    def _array(self, key: str) -> tuple[Scalar, ...] | Skipped:
        kind = self._type(key)
        if kind is ValueType.ARRAY:
            raise ModelError(f"{key!r} nests arrays deeper than {ARRAY_DEPTH_MAX}; it is damaged")
        count = self._count(f"elements in {key!r}", ARRAY_ELEMENTS_MAX)
        if kind is ValueType.STRING:
            return self._strings(count)
        if count <= KEPT_ELEMENTS_MAX:
            return self._numbers(kind, count)
        self._take(count * struct.calcsize("<" + _CODES[kind]))
        return Skipped(type=kind, count=count)

    def _strings(self, count: int) -> tuple[Scalar, ...] | Skipped:
        if count * _U64.size > len(self._view) - self._at:
            raise self._short()  # at once, not after walking what there is
        start = self._at
        self._walk(count)
        if count > KEPT_ELEMENTS_MAX or self._at - start > KEPT_STRING_BYTES:
            return Skipped(type=ValueType.STRING, count=count)
        self._at = start
        return tuple(str(self._string()) for _ in range(count))

    def _walk(self, count: int) -> None:
        """Step over `count` strings: the loop that decides how fast a header is read."""
        view, at, length_at = self._view, self._at, _U64.unpack_from
        try:
            for _ in range(count):
                at += 8 + length_at(view, at)[0]
        except (struct.error, OverflowError):  # the position left the buffer, or 64 bits
            raise self._short() from None
        self._take(at - self._at)

    def _tensor(self) -> TensorInfo:
        name = self._name("a tensor name", NAME_BYTES_MAX)
        dimensions = self._u32()
        if dimensions > DIMENSIONS_MAX:
            raise ModelError(
                f"tensor {name!r} has {dimensions} dimensions (at most {DIMENSIONS_MAX}); "
                "it is damaged or forged"
            )
        shape = tuple(self._u64() for _ in range(dimensions))
        number = self._u32()
        return TensorInfo(
            name=name,
            shape=shape,
            type=number,
            offset=self._u64(),
            size_bytes=tensor_bytes(name, shape, number),
        )


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or not 0 < value <= ALIGNMENT_MAX or value & (value - 1):
        raise ModelError(
            f"its alignment {value!r} is no power of two up to {ALIGNMENT_MAX}; it is damaged"
        )
    return int(value)

"""The weights of a model on this node's disk, by tensor, for the ends of a pipeline's tunnel.

Shell: reads in worker threads, in chunks, so that memory stays the same whatever a tensor's size.
Each read opens the file anew and has a deadline: a disk that does not answer holds up one thread,
and the connection goes on without the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog
import trio

from p2pmesh.errors import LocalError, MeshError
from p2pmesh.models.store import read_header

READ_BYTES = 1024 * 1024
READ_S = 10.0  # for one such read; a disk that spins up takes some seconds

_T = TypeVar("_T")
_R = TypeVar("_R")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies.

    Attributes:
        path: The file.
        at: Its first byte in the file.
        size: In bytes.
    """

    path: Path
    at: int
    size: int


def tensor_places(paths: Sequence[Path]) -> Mapping[str, Place]:
    """Return where the tensors of a model's files are, by name; blocks while headers are read.

    Raises:
        ModelError: A file is damaged.
        LocalError: A file cannot be read.
    """
    return {
        tensor.name: Place(path, header.data_offset + tensor.offset, tensor.size_bytes)
        for path in paths
        for header in (read_header(path),)
        for tensor in header.tensors
    }


class Weights:
    """The tensors of one model, as far as this node has its files.

    Args:
        paths: The model's files; empty while this node has none. Asked once, when the first tensor
            is looked for.
    """

    def __init__(self, paths: Callable[[], Sequence[Path]]) -> None:
        self._paths = paths
        self._places: Mapping[str, Place] | None = None
        self._turn = trio.Lock()

    async def are_here(self) -> bool:
        """Whether this node has any tensor of the model."""
        return bool(await self._table())

    async def find(self, name: str, size: int) -> Place | None:
        """Return where the tensor of this name is, if it is here and has exactly this size."""
        place = (await self._table()).get(name)
        return place if place is not None and place.size == size else None

    async def _table(self) -> Mapping[str, Place]:
        async with self._turn:
            if self._places is None:
                self._places = await self._read()
            return self._places

    async def _read(self) -> Mapping[str, Place]:
        paths = tuple(self._paths())
        try:
            with trio.fail_after(READ_S):
                return await trio.to_thread.run_sync(tensor_places, paths, abandon_on_cancel=True)
        except (MeshError, trio.TooSlowError) as exc:
            # Nothing is lost: all weights travel then.
            log.warning("weights_unreadable", path=str(paths[0]), reason=str(exc))
            return {}


class TensorReader:
    """Reads one tensor from its beginning, and hashes what was read.

    Attributes:
        at: How many bytes were read, or were found equal.
    """

    def __init__(self, place: Place) -> None:
        """Nothing is read yet."""
        self.at = 0
        self._place = place
        self._hash = hashlib.sha256()

    @property
    def left(self) -> int:
        """How many bytes come after those."""
        return self._place.size - self.at

    def digest(self) -> bytes:
        """Return the SHA-256 of the bytes up to `at`."""
        return self._hash.digest()

    async def read(self, count: int = READ_BYTES) -> bytes:
        """Return the next `count` bytes, or what is left of the tensor if that is less.

        Raises:
            LocalError: They cannot be read, or not in time.
        """
        return await self._in_thread(self._read, min(count, self.left))

    async def equals(self, data: memoryview) -> bool:
        """Whether the next bytes are these; only then they count as read.

        Raises:
            LocalError: They cannot be read, or not in time.
        """
        return await self._in_thread(self._equals, data)

    async def _in_thread(self, work: Callable[[_T], _R], argument: _T) -> _R:
        try:
            with trio.fail_after(READ_S):
                return await trio.to_thread.run_sync(work, argument, abandon_on_cancel=True)
        except trio.TooSlowError as exc:
            raise LocalError(f"{self._place.path} could not be read in {READ_S:.0f} s") from exc

    def _equals(self, data: memoryview) -> bool:
        is_equal = self._peek(len(data)) == data
        if is_equal:
            self._take(data)
        return is_equal

    def _read(self, count: int) -> bytes:
        data = self._peek(count)
        self._take(data)
        return data

    def _take(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self.at += len(data)

    def _peek(self, count: int) -> bytes:
        path = self._place.path
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(self._place.at + self.at)
                data = file.read(count)
        except OSError as exc:
            raise LocalError(f"Cannot read {path} ({exc.strerror})") from exc
        if len(data) < count:
            raise LocalError(f"{path} is shorter than it was")
        return data


async def has_digest(place: Place, digest: bytes) -> bool:
    """Whether a tensor's bytes have this SHA-256; False as well when they cannot be read."""
    reader = TensorReader(place)
    try:
        while reader.left:
            await reader.read()
    except LocalError as exc:
        log.warning("weights_unreadable", path=str(place.path), reason=str(exc))
        return False
    return reader.digest() == digest

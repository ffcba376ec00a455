"""Writing the file of a shard.

Shell: synchronous, for threads. shard_file.py and thin.py decide what the file holds; here its
bytes are copied, through one small buffer whatever the size of the model. The file appears whole
or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeVar

from p2pmesh.errors import ConfigError, LocalError, ModelError
from p2pmesh.home import replacing
from p2pmesh.models.experts import ExpertLayout, ExpertLists, layout_of
from p2pmesh.models.gguf import Header
from p2pmesh.models.shard_file import Cut, Plan, ShardFile, Span, shard_file
from p2pmesh.models.store import ModelFile, Progress, read_header

COPY_STEP_BYTES = 8 * 2**20  # progress some 100 times a second, and the disks stay busy

T = TypeVar("T")
Chunk: TypeAlias = bytes | memoryview


def read_layout(model: ModelFile) -> ExpertLayout:
    """Return the experts of a model; reads the headers of its files.

    Raises:
        ModelError: It has no experts, or no shard of it would be right.
        LocalError: The system does not let it be read.
    """
    return of_headers(model, layout_of)


def of_headers(model: ModelFile, read: Callable[[Sequence[Header]], T]) -> T:
    """Return what a function finds in the headers of a model's files.

    Raises:
        ModelError: The function raised one, a clause that goes on from the file's name.
        LocalError: The system does not let the files be read.
    """
    headers = [read_header(path) for path in model.parts]
    try:
        return read(headers)
    except ModelError as exc:
        raise ModelError(f"{model.parts[0]} cannot be cut into shards: {exc}") from exc


def shard_bytes(model: ModelFile, lists: ExpertLists) -> int:
    """Return the size in bytes that `write_shard` would give the shard; raises what that does."""
    return of_headers(model, partial(shard_file, lists=lists)).size_bytes


def write_shard(
    model: ModelFile, lists: ExpertLists, output: Path, progress: Progress | None = None
) -> int:
    """Write the shard of a model that keeps these experts; see `write_planned`.

    Args:
        model: As the store opened it.
        lists: The experts to keep in each layer that has any.
        output: The file.
        progress: Called with bytes written and bytes in all.
    """
    return write_planned(model, partial(shard_file, lists=lists), output, progress)


def write_planned(
    model: ModelFile, plan: Plan, output: Path, progress: Progress | None = None
) -> int:
    """Write a shard of a model, and return its size in bytes.

    Args:
        model: As the store opened it.
        plan: Of the shard's file.
        output: The file, replaced if it is there; nothing is left of it when this raises.
        progress: Called with bytes written and bytes in all; what it raises stops the work.

    Raises:
        ConfigError: No such shard can be made, or `output` is the model itself.
        ModelError: The model cannot be cut, is damaged, or changed meanwhile.
        LocalError: The system does not let the model be read or the shard be written.
    """
    if os.path.realpath(output) in {os.path.realpath(part) for part in model.parts}:
        raise ConfigError(f"{output} is the model itself; choose another file for the shard")
    before = _stamps(model)
    shard = of_headers(model, plan)
    size_bytes = shard.size_bytes
    _check_room(output, size_bytes)
    report = progress or (lambda _done, _total: None)
    with replacing(output, advice="make room, or choose another place") as file:
        _copy(model.parts, shard, file, size_bytes, report)
        if _stamps(model) != before:
            raise _changed(model.parts[0])
    return size_bytes


def _copy(
    parts: Sequence[Path], shard: ShardFile, file: BinaryIO, total: int, report: Progress
) -> None:
    buffer = memoryview(bytearray(COPY_STEP_BYTES))
    done = 0
    report(done, total)
    for piece in shard.pieces():
        match piece:
            case Span(part=part):
                chunks = _chunks(parts[part], piece, buffer)
            case Cut(part=part):
                chunks = _columns(parts[part], piece)
            case _:
                chunks = iter([piece])
        for chunk in chunks:
            done += file.write(chunk)
            report(done, total)


def _chunks(path: Path, span: Span, buffer: memoryview) -> Iterator[Chunk]:
    """The bytes of a range, in a buffer that the next step overwrites."""
    left = span.end - span.start
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(span.start)
            while left:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise _changed(path)
                yield buffer[:count]
                left -= count
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _columns(path: Path, cut: Cut) -> Iterator[Chunk]:
    """The columns of a matrix that stay, some at a time."""
    try:
        with path.open("rb") as file:
            file.seek(cut.start)
            for slab in cut.slabs(COPY_STEP_BYTES):  # one lies behind the other
                data = file.read(slab.read_bytes)
                if len(data) != slab.read_bytes:
                    raise _changed(path)
                yield slab.taken(data)
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _check_room(output: Path, size_bytes: int) -> None:
    """Say at once what would otherwise show after minutes of copying."""
    try:
        free = shutil.disk_usage(output.parent).free
    except OSError as exc:
        raise LocalError(
            f"Cannot write {output} ({exc.strerror}); choose another place for the shard"
        ) from exc
    if free < size_bytes:
        raise LocalError(
            f"Cannot write {output}: it needs {size_bytes >> 20} MiB and {free >> 20} MiB are free "
            "there; make room, or choose another place"
        )


def _stamps(model: ModelFile) -> list[tuple[int, int]]:
    """Size in bytes and modification time in ns of each part."""
    stamps: list[tuple[int, int]] = []
    for path in model.parts:
        try:
            status = path.stat()
        except OSError as exc:
            raise _unreadable(path, exc) from exc
        stamps.append((status.st_size, status.st_mtime_ns))
    return stamps


def _changed(path: Path) -> ModelError:
    return ModelError(f"{path} changed while it was read; try again when its download is done")


def _unreadable(path: Path, exc: OSError) -> LocalError:
    return LocalError(f"Cannot read {path} ({exc.strerror}); check its permissions and its disk")

"""The expert shards that were made on this machine, kept so that none is made twice.

Shell: synchronous, for threads. A shard's file is named by the digest of its model, ranking and
exact lists, and its time is that of its last use: when the shards would take more disk than they
may, those that were unused longest go first. One process works in a folder at a time.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from p2pmesh.errors import LocalError
from p2pmesh.home import locked
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.experts import ExpertLists, shard_digest, shard_file_name
from p2pmesh.models.slice import shard_bytes, write_shard
from p2pmesh.models.store import ModelFile, Progress


class ShardCache:
    """The shards in one folder.

    Args:
        folder: Made when first needed.
        size_bytes_max: What the shards may take in all; None for half of what is free without them.
    """

    def __init__(self, folder: Path, size_bytes_max: int | None) -> None:
        self._folder = folder
        self._size_bytes_max = size_bytes_max

    def make(
        self,
        model: ModelFile,
        digest: ModelDigest,
        lists: ExpertLists,
        *,
        ranking: str = "",
        progress: Progress | None = None,
    ) -> Path:
        """Return the file of a shard, which is written unless it is here; blocks meanwhile.

        Args:
            model: As the store opened it.
            digest: Of the model, as the store computed it.
            lists: The experts to keep in each layer that has any.
            ranking: The digest of the ranking that chose them; "" for none.
            progress: As for `write_shard`; not called when the shard is here.

        Raises:
            ConfigError: No shard can be made of these lists.
            ModelError: The model cannot be cut, is damaged, or changed meanwhile.
            LocalError: It would take more disk than shards may, the system does not let the files
                be read or written, or another process makes a shard here.
        """
        size_bytes = shard_bytes(model, lists)
        path = self._folder / shard_file_name(shard_digest(digest, ranking, lists))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with locked(
                self._folder / "lock",
                f"Another p2pmesh is making a shard in {self._folder}; try again when it is done",
            ):
                if path.is_file() and path.stat().st_size == size_bytes:
                    os.utime(path)
                    return path
                self._make_room(size_bytes)
                write_shard(model, lists, path, progress)
        except OSError as exc:
            raise LocalError(
                f"Cannot keep a shard in {self._folder} ({exc.strerror}); choose another --home"
            ) from exc
        return path

    def _make_room(self, size_bytes: int) -> None:
        for unfinished in self._folder.glob(".shard-*"):  # nobody writes: we have the lock
            unfinished.unlink()
        held = [(path, path.stat()) for path in self._folder.glob(shard_file_name("*"))]
        total = sum(status.st_size for _, status in held)
        limit = self._size_bytes_max
        if limit is None:
            limit = (shutil.disk_usage(self._folder).free + total) // 2
        if size_bytes > limit:
            raise LocalError(
                f"This shard takes {size_bytes >> 20} MiB of disk and all shards may take "
                f"{limit >> 20} MiB; keep fewer experts, or allow more with --disk"
            )
        for path, status in sorted(held, key=lambda one: one[1].st_mtime_ns):
            if total + size_bytes <= limit:
                return
            path.unlink()
            total -= status.st_size

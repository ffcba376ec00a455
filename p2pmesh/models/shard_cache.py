"""The expert shards that were made on this machine, kept so that none is made twice.

Shell: synchronous, for threads. A shard's file is named by the digest of its model, ranking and
exact lists, or width, and its time is that of its last use: when the shards would take more disk
than they may, those that were unused longest go first, and never one that runs. One process works
in a folder at a time, and of its threads one after the other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from p2pmesh.errors import LocalError, ModelError
from p2pmesh.home import locked
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.experts import ExpertLists, shard_digest, shard_file_name
from p2pmesh.models.importance import Ranking, digest_of
from p2pmesh.models.parts import Shard
from p2pmesh.models.shard_file import Plan, shard_file
from p2pmesh.models.slice import of_headers, write_planned
from p2pmesh.models.store import ModelFile, Progress
from p2pmesh.models.thin import thin_digest, thin_layout_of

if TYPE_CHECKING:
    from p2pmesh.models.thin_places import Floats


class ShardCache:
    """The shards in one folder.

    Args:
        folder: Made when first needed.
        size_bytes_max: What the shards may take in all; None for half of what is free without them.
        in_use: Returns the files of shards that run, which are never deleted.
    """

    def __init__(
        self,
        folder: Path,
        size_bytes_max: int | None,
        *,
        in_use: Callable[[], Collection[Path]] = frozenset,
    ) -> None:
        self._folder = folder
        self._size_bytes_max = size_bytes_max
        self._in_use = in_use
        self._making = Lock()

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
        plan = partial(shard_file, lists=lists)
        return self._planned(model, plan, shard_digest(digest, ranking, lists), progress)

    def make_thin(
        self,
        model: ModelFile,
        digest: ModelDigest,
        ranking: Ranking,
        neurons: Floats | None,
        shard: Shard,
        *,
        progress: Progress | None = None,
    ) -> Path:
        """Return the file of a thin shard, which is written unless it is here; blocks meanwhile.

        Args:
            model: As the store opened it.
            digest: Of the model, as the store computed it.
            ranking: That of the shard.
            neurons: Its scores of neurons, as `rankings.load_neurons` returns them.
            shard: What it holds.
            progress: As for `write_planned`; not called when the shard is here.

        Raises:
            ModelError: The model cannot be cut, is damaged, or changed meanwhile; or the ranking
                is that of another model, or the shard one of another ranking.
            LocalError: As for `make`, or this node has no scores of neurons.
        """
        from p2pmesh.models.thin_places import ThinPlaces  # late: numpy, as in shard_file.py

        if neurons is None:
            raise LocalError(
                f"This node has no scores of the neurons of {model.stem}, so that it cannot make a "
                f"thin shard: p2pmesh experts rank {model.stem}"
            )
        if ranking.model != digest:
            raise ModelError("the ranking is of another model; rank this one")
        places = ThinPlaces(ranking, neurons, of_headers(model, thin_layout_of))
        plan = places.plan_of(shard)
        width = shard.size * places.layout.step
        return self._planned(model, plan, thin_digest(digest, digest_of(ranking), width), progress)

    def _planned(
        self, model: ModelFile, plan: Plan, digest: str, progress: Progress | None
    ) -> Path:
        size_bytes = of_headers(model, plan).size_bytes
        path = self._folder / shard_file_name(digest)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            taken = (
                f"Another p2pmesh is making a shard in {self._folder}; try again when it is done"
            )
            with self._making, locked(self._folder / "lock", taken):
                if path.is_file() and path.stat().st_size == size_bytes:
                    os.utime(path)
                    return path
                self._make_room(size_bytes)
                write_planned(model, plan, path, progress)
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
        in_use = set(self._in_use())
        running = sum(status.st_size for path, status in held if path in in_use)
        if running + size_bytes > limit:
            taken = f", {running >> 20} MiB of it by those that run" if running else ""
            raise LocalError(
                f"This shard takes {size_bytes >> 20} MiB of disk and all shards may take "
                f"{limit >> 20} MiB{taken}; keep less of the model, or allow more with --disk"
            )
        for path, status in sorted(held, key=lambda one: one[1].st_mtime_ns):
            if total + size_bytes <= limit:
                return
            if path not in in_use:
                path.unlink()
                total -= status.st_size

"""The cache of what is known about model files, so that nothing is read or hashed twice.

Shell: one JSON file in the cache directory, replaced whole. An entry holds only while all parts
of the model have the sizes and times it was made from. The file is a cache: damaged or unwritable,
it costs time and never an error. Several nodes of one user may share it, so saving merges.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import structlog

from p2pmesh.errors import LocalError, PeerError
from p2pmesh.home import write_atomic
from p2pmesh.models.cards import Card, ModelDigest, from_wire, to_wire

log = structlog.get_logger(__name__)

FORMAT = 2  # raise it when cards are computed differently
ENTRIES_MAX = 4096  # the newest stay; about 2 MB
FILE_BYTES_MAX = 16 * 2**20  # larger was not written here

Stamp: TypeAlias = tuple[tuple[int, int], ...]
"""Size in bytes and modification time in ns of each part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedModel:
    """The cached description of one model file.

    Attributes:
        stamp: The state of its parts that this is true for.
    """

    stamp: Stamp
    card: Card | None = None
    digest: ModelDigest | None = None


class ModelCache:
    """The cache of cards and digests. All methods may be called from any thread.

    Args:
        path: The JSON file; it and its directory are made when first needed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, CachedModel] = {}
        self._changed: dict[str, CachedModel] = {}
        self._loaded = False

    def get(self, path: Path, stamp: Stamp) -> CachedModel:
        """Return the cached description of the model at `path`, in this state of its parts."""
        with self._lock:
            if not self._loaded:
                self._known = self._load()
                self._loaded = True
            known = self._known.get(str(path))
        return known if known is not None and known.stamp == stamp else CachedModel(stamp=stamp)

    def put(self, path: Path, known: CachedModel) -> None:
        """Remember; what `known` leaves open stays as it was for the same stamp."""
        before = self.get(path, known.stamp)
        merged = replace(
            known, card=known.card or before.card, digest=known.digest or before.digest
        )
        if merged != before:
            with self._lock:
                self._known[str(path)] = self._changed[str(path)] = merged

    def save(self) -> None:
        """Write what was learned since the last time, if anything."""
        with self._lock:
            if not self._changed:
                return
            entries = self._load()
            for path, known in self._changed.items():
                entries.pop(path, None)
                entries[path] = known  # the newest last
            newest = list(entries.items())[-ENTRIES_MAX:]
            content = {"format": FORMAT, "files": {path: _pack(k) for path, k in newest}}
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self._path, json.dumps(content).encode())
            except (LocalError, OSError) as exc:
                log.warning("model_cache_unwritable", path=str(self._path), reason=str(exc))
            else:
                self._changed.clear()

    def _load(self) -> dict[str, CachedModel]:
        try:
            with self._path.open("rb") as file:
                content: Any = json.loads(file.read(FILE_BYTES_MAX))
            if content["format"] != FORMAT:
                return {}
            return {path: _unpack(entry) for path, entry in content["files"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            log.warning("model_cache_ignored", path=str(self._path), reason=repr(exc))
            return {}
        except PeerError as exc:  # a card in it is none
            log.warning("model_cache_ignored", path=str(self._path), reason=str(exc))
            return {}


def _pack(known: CachedModel) -> dict[str, Any]:
    return {
        "stamp": known.stamp,
        "card": to_wire(known.card) if known.card else None,
        "digest": known.digest,
    }


def _unpack(entry: Any) -> CachedModel:
    stamp: Sequence[Sequence[int]] = entry["stamp"]
    digest = entry["digest"]
    if digest is not None and (len(digest) != 64 or len(bytes.fromhex(digest)) != 32):
        raise ValueError("a digest has 64 hexadecimal characters")
    return CachedModel(
        stamp=tuple((int(size), int(time)) for size, time in stamp),
        card=from_wire(entry["card"]) if entry["card"] is not None else None,
        digest=ModelDigest(digest) if digest is not None else None,
    )

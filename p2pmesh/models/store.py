"""The model files of this machine: found, opened, identified.

Shell: synchronous, for threads; all methods may be called from several at once. Files stay where
they are and are never written. What cannot be used is skipped in a search and remembered with its
reason (`unusable`), and is an error when the user named it.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import structlog

from p2pmesh.errors import ConfigError, LocalError, MeshError, ModelError
from p2pmesh.home import Home
from p2pmesh.models import catalogue, gguf
from p2pmesh.models.cache import CachedModel, ModelCache, Stamp
from p2pmesh.models.cards import Card, ModelDigest, card_of
from p2pmesh.models.metadata import OtherKindError
from p2pmesh.models.search_paths import Candidate, find_candidates, usual_places

log = structlog.get_logger(__name__)

EMBEDDED = Path(__file__).parent / "data" / "p2pmesh-demo-tiny.gguf"
PARTS_MAX = 1000  # files of one model; the largest published have about 60
HASH_STEP_BYTES = 8 * 2**20  # progress some 100 times a second, and the disk stays busy
# Headers are read, not mapped: a file that shrinks under a mapping kills the process. Most models
# end within the second step.
HEADER_STEPS_BYTES = (2**20, 16 * 2**20, gguf.HEADER_BYTES_MAX)
SUGGESTIONS = 3

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; what it raises stops the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """A model on this machine.

    Attributes:
        parts: Its files in order, absolute, links not resolved.
        stem: What it is called here; two files may share it.
        size_bytes: Of all parts.
        aliases: What the program that fetched it calls it.
    """

    parts: tuple[Path, ...]
    stem: str
    size_bytes: int
    card: Card
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """A file that looked like a model and cannot be served.

    Attributes:
        reason: A sentence that names the file.
        state: `damaged`; `other` when it is a good file that is not for serving alone; `missing`
            when the file, or a part of it, is not here or cannot be read.
    """

    path: Path
    reason: str
    state: Literal["damaged", "other", "missing"]


class Store:
    """Finds and opens model files.

    Args:
        home: Its `models` are searched first; its `cache` holds what was learned.
        environ: The environment, which says where other programs keep theirs.
    """

    def __init__(self, home: Home, *, environ: Mapping[str, str]) -> None:
        self._places = usual_places(home.models, environ)
        self._user = environ.get("HOME") or environ.get("USERPROFILE") or "~"
        self._index = ModelCache(home.cache / "models.json")
        self._lock = threading.Lock()
        self._unusable: dict[Path, Unusable] = {}

    @property
    def unusable(self) -> tuple[Unusable, ...]:
        """Return the files that the last search skipped, and why."""
        with self._lock:
            return tuple(self._unusable.values())

    def embedded(self) -> ModelFile:
        """The small model that comes with p2pmesh.

        Raises:
            LocalError: This installation lacks it.
        """
        if not _is_file(EMBEDDED):
            raise LocalError(f"{EMBEDDED} is missing; install p2pmesh again")
        return self.open(EMBEDDED)

    def discover(self) -> list[ModelFile]:
        """All models in the usual places, the node's own first; blocks while it reads headers."""
        models: list[ModelFile] = []
        unusable: dict[Path, Unusable] = {}
        seen: set[str] = set()
        for place in self._places:
            for candidate in find_candidates(place):
                # Caches of several programs, and revisions in one, link to the same file.
                real = os.path.realpath(_first_part(candidate.path))
                if real in seen:
                    continue
                seen.add(real)
                try:
                    models.append(self._open(candidate))
                except MeshError as exc:
                    unusable[candidate.path] = _unusable(candidate.path, exc)
        self._index.save()
        with self._lock:
            news = [one for path, one in unusable.items() if self._unusable.get(path) != one]
            self._unusable = unusable
        for one in news:
            log.warning("model_skipped", path=str(one.path), reason=one.reason)
        return models

    def open(self, path: Path) -> ModelFile:
        """The model in a file, or in the parts it is one of.

        Raises:
            ConfigError: There is no such file.
            ModelError: It cannot be used, or parts are missing.
            LocalError: The system does not let it be read.
        """
        model = self._open(Candidate(path=path))
        self._index.save()
        return model

    def _open(self, candidate: Candidate) -> ModelFile:
        if candidate.problem:
            raise LocalError(candidate.problem)
        parts = _parts(candidate.path.absolute())
        stamp = _stamp(parts)
        card = self._index.get(parts[0], stamp).card
        if card is None:
            card = _read_card(parts)
            self._index.put(parts[0], CachedModel(stamp=stamp, card=card))
        return ModelFile(
            parts=parts,
            stem=catalogue.public_id(candidate.stem or parts[0].name),
            size_bytes=sum(size for size, _ in stamp),
            card=card,
            aliases=candidate.aliases,
        )

    def digest(self, model: ModelFile, progress: Progress | None = None) -> ModelDigest:
        """The SHA-256 of a model's file; of several parts, that of their digests in hex, joined.

        Args:
            model: As `open` or `discover` returned it.
            progress: Called before and after every 8 MiB; not called when the digest is known.

        Raises:
            ModelError: The file changed since it was opened, or while it was read.
            LocalError: The system does not let it be read.
        """
        stamp = _stamp(model.parts)
        if sum(size for size, _ in stamp) != model.size_bytes:
            raise _changed(model.parts[0])
        known = self._index.get(model.parts[0], stamp).digest
        if known is not None:
            return known
        done = 0
        digests: list[str] = []
        for path, (size, _) in zip(model.parts, stamp, strict=True):
            digests.append(_hash(path, done, model.size_bytes, progress))
            done += size
        if _stamp(model.parts) != stamp:
            raise _changed(model.parts[0])
        joined = "".join(digests).encode()
        digest = digests[0] if len(digests) == 1 else hashlib.sha256(joined).hexdigest()
        self._index.put(model.parts[0], CachedModel(stamp=stamp, digest=ModelDigest(digest)))
        self._index.save()
        return ModelDigest(digest)

    def check(self, model: ModelFile, digest: ModelDigest) -> None:
        """Make sure that a file is still what it was when it was read; quick, reads nothing.

        Raises:
            ModelError: It changed, or is gone.
            LocalError: The system does not let it be looked at.
        """
        if self._index.get(model.parts[0], _stamp(model.parts)).digest != digest:
            raise ModelError(
                f"{model.parts[0]} is not the file that was read; restart the node to read it again"
            )

    def locate(self, text: str) -> ModelFile:
        """The model that the user means: a path, or a name that a search finds.

        Raises:
            ConfigError: There is none, or several; says what was looked for and where.
            ModelError: There is one, and it cannot be used.
            LocalError: The system does not let it be read.
        """
        if not text.strip() or "\0" in text:
            raise ConfigError(f"{text!r} is no model: give a GGUF file or the name of a model")
        path = Path(self._user + text[1:] if text.startswith(("~/", "~\\")) else text)
        if _is_file(path):
            return self.open(path)
        models = [*self.discover(), self.embedded()]
        found = self._named(text, models)
        if len(found) == 1:
            return found[0]
        if found:
            paths = ", ".join(str(model.parts[0]) for model in found)
            raise ConfigError(f"Several models are called {text!r}; give the path of one: {paths}")
        if os.path.lexists(path):
            return self.open(path)  # raises: a folder, a device, a broken link
        raise ConfigError(self._not_found(text, models))

    def _named(self, text: str, models: Sequence[ModelFile]) -> list[ModelFile]:
        """The models with this name, by the first kind of name that fits any."""
        for kind in (
            lambda model: text == model.stem,
            lambda model: text in model.aliases,
            lambda model: text == model.card.name,
            lambda model: catalogue.public_id(text) == model.stem,
            lambda model: (
                len(text) >= catalogue.PREFIX_CHARACTERS
                and (self._known_digest(model) or "").startswith(text.lower())
            ),
        ):
            found = [model for model in models if kind(model)]
            if found:
                return found
        return []

    def _known_digest(self, model: ModelFile) -> ModelDigest | None:
        try:
            return self._index.get(model.parts[0], _stamp(model.parts)).digest
        except MeshError:
            return None  # gone since it was found

    def _not_found(self, text: str, models: Sequence[ModelFile]) -> str:
        names = {name for model in models for name in (model.stem, *model.aliases)}
        wanted = catalogue.public_id(Path(text).name)
        close = difflib.get_close_matches(wanted, sorted(names), SUGGESTIONS, 0.4)
        hint = f"closest: {', '.join(close)}" if close else "see `p2pmesh models`"
        where = ", ".join(str(place.path) for place in self._places)
        return f"No model {text!r}: no such file, and none of that name in {where}; {hint}"


def _unusable(path: Path, exc: MeshError) -> Unusable:
    if isinstance(exc, OtherKindError):
        return Unusable(path=path, reason=str(exc), state="other")
    state: Literal["damaged", "missing"] = "damaged" if isinstance(exc, ModelError) else "missing"
    return Unusable(path=path, reason=str(exc), state=state)


def _first_part(path: Path) -> Path:
    """The file that a part's model begins with; `path` itself when it is no part."""
    stem, _, count = catalogue.split_part(path.stem)
    if path.suffix.lower() != ".gguf" or count == 1:
        return path
    return path.with_name(f"{stem}-00001-of-{count:05d}{path.suffix}")


def _parts(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` belongs to."""
    _stamp((path,))
    stem, number, count = catalogue.split_part(path.stem)
    if path.suffix.lower() != ".gguf" or (number, count) == (1, 1):
        return (path,)
    if not 1 <= number <= count <= PARTS_MAX:
        raise ModelError(f"{path} cannot be used: no model has a part {number} of {count}")
    parts = tuple(
        path.with_name(f"{stem}-{index:05d}-of-{count:05d}{path.suffix}")
        for index in range(1, count + 1)
    )
    missing = [part.name for part in parts if not _is_file(part)]
    if missing:
        are = f"and {len(missing) - 1} more are" if len(missing) > 1 else "is"
        raise LocalError(
            f"{path} cannot be used: {missing[0]} {are} missing beside it; download all parts"
        )
    return parts


def _stamp(parts: Sequence[Path]) -> Stamp:
    """Size and time of each part; each is checked to be a file."""
    stamps: list[tuple[int, int]] = []
    for path in parts:
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise ConfigError(f"There is no model file {path}; check the path") from exc
        except OSError as exc:
            raise _unreadable(path, exc) from exc
        if stat.S_ISDIR(status.st_mode):
            raise ConfigError(f"{path} is a folder; name the GGUF file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} is not a regular file; name a GGUF file")
        stamps.append((status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def read_header(path: Path) -> gguf.Header:
    """Return the header of a GGUF file; blocks while it is read.

    Raises:
        ModelError: The file is damaged, or no GGUF file that can be used here.
        LocalError: The system does not let it be read.
    """
    try:
        with path.open("rb") as file:
            return _read_header(file)
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    except ModelError as exc:
        raise ModelError(f"{path} cannot be used: {exc}") from exc


def _read_card(parts: Sequence[Path]) -> Card:
    headers = [read_header(path) for path in parts]
    try:
        return card_of(headers)
    except ModelError as exc:
        raise type(exc)(f"{parts[0]} cannot be used: {exc}") from exc


def _read_header(file: BinaryIO) -> gguf.Header:
    size = os.fstat(file.fileno()).st_size
    start = b""
    for step in HEADER_STEPS_BYTES:
        start += file.read(min(step, size) - len(start))
        try:
            return gguf.scan(start, size_bytes=size)
        except gguf.ShortReadError:
            continue
    raise ModelError("it became shorter while it was read; try again when its download is done")


def _hash(path: Path, done: int, total: int, progress: Progress | None) -> str:
    """SHA-256 of one file. `done` bytes of `total` are behind us already."""
    hasher = hashlib.sha256()
    report = progress or (lambda _done, _total: None)
    report(done, total)
    for chunk in _chunks(path):
        hasher.update(chunk)
        done += len(chunk)
        if done > total:
            raise _changed(path)  # it grows; do not follow it for ever
        report(done, total)
    return hasher.hexdigest()


def _chunks(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, in one buffer that the next step overwrites."""
    step = memoryview(bytearray(HASH_STEP_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(step):
                yield step[:count]
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _changed(path: Path) -> ModelError:
    return ModelError(f"{path} changed while it was read; try again when its download is done")


def _unreadable(path: Path, exc: OSError) -> LocalError:
    return LocalError(f"Cannot read {path} ({exc.strerror}); check its permissions and its disk")

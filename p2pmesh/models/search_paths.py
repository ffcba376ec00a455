"""The folders where people already have GGUF files, and the files in them.

Shell: reads directories, never files' contents except Ollama's manifests. Knows each program's
layout and nothing of what a model is. Walks are bounded; what cannot be read is skipped with a
log event, since one locked folder must not hide the models beside it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger(__name__)

DEPTH_MAX = 8  # Hugging Face needs 5, folders sorted by hand rarely 4
ENTRIES_MAX = 50_000  # per place: a second or two of walking on a slow disk
MANIFEST_BYTES_MAX = 2**20  # they are below 10 KB

_OLLAMA_MODEL = "application/vnd.ollama.image.model"
_OLLAMA_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A directory in which a program keeps models.

    Attributes:
        owner: Whose directory it is, for people.
        path: It need not exist.
    """

    owner: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A file that may be a model.

    Attributes:
        path: As found, links not resolved: in some caches only the link has a name.
        stem: What to call it when its file name says nothing, else None.
        aliases: What else people call it.
        problem: Why it cannot be used, as far as its program's own notes say; "" when they do not.
    """

    path: Path
    stem: str | None = None
    aliases: tuple[str, ...] = ()
    problem: str = ""


def usual_places(
    own: Path, environ: Mapping[str, str], platform: str = sys.platform
) -> tuple[Place, ...]:
    """The places to look in, in order of preference; `own` is the node's directory."""
    user = environ.get("USERPROFILE" if platform == "win32" else "HOME")
    home = Path(user) if user else None

    def named(*variables: str) -> Path | None:
        value = next((environ[name] for name in variables if environ.get(name)), None)
        return Path(value) if value else None

    def below(base: Path | None, *parts: str) -> Path | None:
        return base.joinpath(*parts) if base else None

    cache = named("XDG_CACHE_HOME") or below(home, ".cache")
    hub = named("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    hub = hub or below(named("HF_HOME") or below(cache, "huggingface"), "hub")
    llama = {"darwin": below(home, "Library", "Caches"), "win32": named("LOCALAPPDATA")}
    found = [
        ("p2pmesh", own),
        ("Hugging Face", hub),
        ("llama.cpp", named("LLAMA_CACHE") or below(llama.get(platform, cache), "llama.cpp")),
        ("LM Studio", below(home, ".lmstudio", "models")),
        ("LM Studio", below(home, ".cache", "lm-studio", "models")),
        ("Ollama", named("OLLAMA_MODELS") or below(home, ".ollama", "models")),
    ]
    if platform == "linux":  # its system service
        found.append(("Ollama", Path("/usr/share/ollama/.ollama/models")))
    return tuple(Place(owner=owner, path=path) for owner, path in found if path)


def find_candidates(place: Place) -> Iterator[Candidate]:
    """The files of a place that may be models, in the order of their names."""
    yield from (_ollama if place.owner == "Ollama" else _plain)(place.path)


def _plain(root: Path) -> Iterator[Candidate]:
    for path in _walk(root, lambda name: name.lower().endswith(".gguf")):
        yield Candidate(path=path)


def _walk(root: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Regular files below `root` with a wanted name; follows links, each directory once."""
    seen: set[str] = set()
    budget = ENTRIES_MAX
    waiting = [(root, 0)]
    while waiting:
        directory, depth = waiting.pop()
        real = os.path.realpath(directory)
        if real in seen:
            continue
        seen.add(real)
        deeper: list[tuple[Path, int]] = []
        for entry in _entries(directory):
            budget -= 1
            if budget < 0:
                log.warning("walk_stopped", root=str(root), entries=ENTRIES_MAX)
                return
            is_file, is_directory = _kind(entry)
            if is_file and wanted(entry.name):
                yield Path(entry.path)
            elif is_directory and depth < DEPTH_MAX and not entry.name.startswith("."):
                deeper.append((Path(entry.path), depth + 1))
        waiting += reversed(deeper)


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether it is, or links to, a file or a directory."""
    try:
        return entry.is_file(), entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be entered
        return False, False


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []  # most people have few of these programs
    except OSError as exc:
        log.info("directory_skipped", path=str(directory), reason=exc.strerror)
        return []


def _ollama(root: Path) -> Iterator[Candidate]:
    """Ollama's models lie in blobs named by digest; their names are in manifests."""
    manifests = root / "manifests"
    for path in _walk(manifests, lambda name: not name.startswith(".")):
        parts = path.relative_to(manifests).parts
        if len(parts) < 3:
            continue
        space, model, tag = parts[-3:]
        owned = "" if space == "library" else f"{space}/"
        names = [f"{owned}{model}:{tag}"] + ([f"{owned}{model}"] if tag == "latest" else [])
        try:
            digest = _model_layer(path)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
            log.info("manifest_skipped", path=str(path), reason=repr(exc))
            problem = (
                f"{path} cannot be used: it is no manifest of Ollama's; ollama pull {names[0]}"
            )
            yield Candidate(path=path, problem=problem)
            continue
        if digest is None:
            continue
        blob = root / "blobs" / f"sha256-{digest}"
        missing = not os.path.isfile(blob)  # noqa: PTH113  (no error where we may not look)
        yield Candidate(
            path=blob,
            stem=f"{owned}{model}-{tag}".replace("/", "-"),
            aliases=tuple(names),
            problem=f"{names[0]} cannot be used: its file {blob} is missing; ollama pull {names[0]}"
            if missing
            else "",
        )


def _model_layer(manifest: Path) -> str | None:
    """Return the digest of a manifest's weights, None when it has none; raises on any nonsense."""
    with manifest.open("rb") as file:
        parsed: Any = json.loads(file.read(MANIFEST_BYTES_MAX))
    for layer in parsed["layers"]:
        if layer["mediaType"] == _OLLAMA_MODEL:
            # It becomes part of a path: nothing but a digest may pass.
            match = _OLLAMA_DIGEST.match(layer["digest"])
            if match is None:
                raise ValueError("the weights are not named by a digest")
            return match[1]
    return None

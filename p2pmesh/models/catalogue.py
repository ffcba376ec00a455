"""What models are called.

Pure. A model is its SHA-256; everything else is a name for it. The public id is the file's stem.
The model's own name and the digest, or at least eight characters of it, are aliases. When two
models share a stem both become `stem@first8`, and asking for the bare stem is answered with the
choice. Names depend only on the set of entries, so that all nodes call a model the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2pmesh.errors import ModelError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.metadata import plain_text

STEM_CHARACTERS_MAX = 200  # file names have at most 255 bytes on usual systems
DIGEST_CHARACTERS = 64
PREFIX_CHARACTERS = 8  # 32 bits: enough among models that are not forged to collide

_SUFFIX = re.compile(r"\.gguf\Z", re.IGNORECASE)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\Z")
_QUALIFIED = re.compile(rf"(?s)(.+)@([0-9a-f]{{{PREFIX_CHARACTERS},{DIGEST_CHARACTERS}}})\Z")
_HEX = re.compile(rf"[0-9a-f]{{{PREFIX_CHARACTERS},{DIGEST_CHARACTERS}}}\Z")


class UnknownModel(ModelError):  # noqa: N818  (a state of the request; the name is what one reads)
    """No model of the mesh has this name; nothing was tried instead."""


class AmbiguousModel(ModelError):  # noqa: N818  (as above)
    """Several models have this name.

    Attributes:
        choices: Their public ids, sorted.
    """

    def __init__(self, text: str, choices: Sequence[str]) -> None:
        self.choices = tuple(choices)
        super().__init__(f"{text!r} names several models; choose one of: {', '.join(choices)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A model as one node calls it.

    Attributes:
        digest: Its SHA-256.
        stem: What `public_id` made of its file name.
        name: The model's own name, "" when it has none.
    """

    digest: ModelDigest
    stem: str
    name: str = ""


def split_part(stem: str) -> tuple[str, int, int]:
    """A file stem as (stem of the model, part, count of parts); (stem, 1, 1) for a lone file."""
    match = _PART.search(stem)
    if match is None or match.start() == 0:
        return stem, 1, 1
    return stem[: match.start()], int(match[1]), int(match[2])


def public_id(file_name: str) -> str:
    """The id under which a model file is offered: its stem, without the number of the part."""
    stem, _, _ = split_part(_SUFFIX.sub("", file_name))
    return plain_text(stem, STEM_CHARACTERS_MAX) or "model"


class Catalogue:
    """The names of a set of models. Immutable; build a new one when the set changes.

    Args:
        entries: In any order, repeated at will: many nodes name the same models.
    """

    def __init__(self, entries: Iterable[Named]) -> None:
        stems: defaultdict[ModelDigest, set[str]] = defaultdict(set)
        by_stem: defaultdict[str, set[ModelDigest]] = defaultdict(set)
        self._by_name: defaultdict[str, set[ModelDigest]] = defaultdict(set)
        for entry in entries:
            stems[entry.digest].add(entry.stem)
            by_stem[entry.stem].add(entry.digest)
            if entry.name:
                self._by_name[entry.name].add(entry.digest)
        self._by_stem = dict(by_stem)
        self._ids = {digest: self._make_id(digest, min(stems[digest])) for digest in sorted(stems)}
        self._by_id = {public: digest for digest, public in self._ids.items()}

    def _make_id(self, digest: ModelDigest, stem: str) -> str:
        # A stem that looks qualified always gets its own digest behind it, so that no file can
        # be named to take another model's id.
        others = self._by_stem[stem]
        if len(others) == 1 and not _QUALIFIED.match(stem):
            return stem
        length = PREFIX_CHARACTERS
        while len({other[:length] for other in others}) < len(others):
            length += 1
        return f"{stem}@{digest[:length]}"

    def id_of(self, digest: ModelDigest) -> str:
        """The public id.

        Raises:
            UnknownModel: It is not in this catalogue.
        """
        try:
            return self._ids[digest]
        except KeyError:
            raise UnknownModel(f"no model with the SHA-256 {digest} is known here") from None

    def resolve(self, text: str) -> ModelDigest:
        """The one model that `text` names: as id, stem, own name, SHA-256 or start of it.

        Raises:
            UnknownModel: None has this name.
            AmbiguousModel: Several have, and none has it as its id.
        """
        exact = self._by_id.get(text)
        if exact is not None:
            return exact
        for found in (self._by_stem.get(text), self._qualified(text), self._by_name.get(text)):
            if found:
                return self._only(text, found)
        prefix = text.lower()
        if _HEX.match(prefix):
            found = {digest for digest in self._ids if digest.startswith(prefix)}
            if found:
                return self._only(text, found)
        raise UnknownModel(f"no model here is called {text!r}; see the list of models")

    def _qualified(self, text: str) -> set[ModelDigest]:
        """`stem@first8` names its model whether or not another has that stem now."""
        match = _QUALIFIED.match(text)
        if match is None:
            return set()
        return {d for d in self._by_stem.get(match[1], ()) if d.startswith(match[2])}

    def _only(self, text: str, found: set[ModelDigest]) -> ModelDigest:
        if len(found) > 1:
            raise AmbiguousModel(text, sorted(self._ids[digest] for digest in found))
        return next(iter(found))

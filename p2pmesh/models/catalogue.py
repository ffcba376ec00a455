"""The names of models.

Pure. A model is its SHA-256; everything else is a name for it. The public id is the file's stem.
The model's own name and the digest, or at least eight characters of it, are aliases. When two
models with an equal claim share a stem both become `stem@first8`, and asking for the bare stem is
answered with the choice; the model with a stronger claim keeps the stem, so that nobody takes the
name of a model in use by holding a file. Names depend only on the set of entries, so that all
nodes call a model the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from p2pmesh.errors import ModelError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.wire.text import plain_text

STEM_CHARACTERS_MAX = 200  # file names have at most 255 bytes on usual systems
DIGEST_CHARACTERS = 64
PREFIX_CHARACTERS = 8  # 32 bits: enough among models that are not forged to collide
AUTO = "auto"  # in a request: any model that fits; so no model is called that
UNNAMED = "model"

T = TypeVar("T")

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
        claim: How strongly the names are its own; the larger wins a name that others have too.
    """

    digest: ModelDigest
    stem: str
    name: str = ""
    claim: int = 0


def split_part(stem: str) -> tuple[str, int, int]:
    """A file stem as (stem of the model, part, count of parts); (stem, 1, 1) for a lone file."""
    match = _PART.search(stem)
    if match is None or match.start() == 0:
        return stem, 1, 1
    return stem[: match.start()], int(match[1]), int(match[2])


def public_id(file_name: str) -> str:
    """The id under which a model file is offered: its stem, without the number of the part."""
    stem, _, _ = split_part(_SUFFIX.sub("", file_name))
    return plain_text(stem, STEM_CHARACTERS_MAX) or UNNAMED


class Catalogue:
    """The names of a set of models. Immutable; build a new one when the set changes.

    Args:
        entries: In any order, repeated at will: many nodes name the same models.
    """

    def __init__(self, entries: Iterable[Named]) -> None:
        stems: defaultdict[ModelDigest, dict[str, int]] = defaultdict(dict)
        by_stem: defaultdict[str, dict[ModelDigest, int]] = defaultdict(dict)
        by_name: defaultdict[str, dict[ModelDigest, int]] = defaultdict(dict)
        for entry in entries:
            _claim(stems[entry.digest], entry.stem, entry.claim)
            _claim(by_stem[entry.stem], entry.digest, entry.claim)
            if entry.name:
                _claim(by_name[entry.name], entry.digest, entry.claim)
        self._by_stem, self._by_name = dict(by_stem), dict(by_name)
        self._ids = {
            digest: self._make_id(digest, min(_strongest(stems[digest])))
            for digest in sorted(stems)
        }
        self._by_id = {public: digest for digest, public in self._ids.items()}

    def _make_id(self, digest: ModelDigest, stem: str) -> str:
        # A stem that looks qualified always gets its own digest behind it, so that no file can
        # be named to take another model's id.
        others = self._by_stem[stem]
        if _strongest(others) == {digest} and stem != AUTO and not _QUALIFIED.match(stem):
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
        stem, name = (_strongest(names.get(text, {})) for names in (self._by_stem, self._by_name))
        for found in (stem, self._qualified(text), name):
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


def _claim(claims: dict[T, int], what: T, claim: int) -> None:
    claims[what] = max(claim, claims.get(what, claim))


def _strongest(claims: Mapping[T, int]) -> set[T]:
    """Everything whose claim nothing else exceeds."""
    most = max(claims.values(), default=0)
    return {what for what, claim in claims.items() if claim == most}

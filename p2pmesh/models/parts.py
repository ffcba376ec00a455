"""Parts: the key of everything that runs.

Pure. A part is what one node runs for one model: the whole model, one stage of a pipeline, or one
shard of its experts. Its name says which, and for a stage or shard of which unit, by a digest over
the model, the nodes and the exact ranges, so that two plans never share a process by accident.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest

WHOLE = "whole"
NAME_CHARACTERS_MAX = 32
# Kinds of parts that this version runs and routes to; those of others are their own affair.
_KNOWN = re.compile(WHOLE)


class PartId(NamedTuple):
    """A part of a model, wherever it runs."""

    digest: ModelDigest
    name: str = WHOLE

    def __str__(self) -> str:
        return f"{self.digest}/{self.name}"


class ReplicaKey(NamedTuple):
    """A part on one node: what tells a replica from every other."""

    node: NodeId
    part: PartId


def parse_part(text: str) -> PartId | None:
    """The part that `str` made a text of; None for any other text."""
    digest, _, name = text.partition("/")
    part = PartId(ModelDigest(digest), name)
    return part if is_known(name) and str(part) == text else None


def is_known(name: str) -> bool:
    """Whether this version knows what a part of this name is."""
    return _KNOWN.fullmatch(name) is not None

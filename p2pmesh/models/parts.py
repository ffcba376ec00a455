"""Parts: the key of everything that runs.

Pure. A part is what one node runs for one model: the whole model, one stage of a pipeline, or one
shard of its experts. Its name says which, and for a stage or shard of which unit, by a digest over
the model, the nodes and the exact ranges, so that two plans never share a process by accident.

Stage 0 of a pipeline is its head: it keeps the first layers, the embedding and the output, and is
the only part of its unit that takes requests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.wire.codec import encode

WHOLE = "whole"
NAME_CHARACTERS_MAX = 32
# More stages never made one stream faster, and each is one more machine that must not fail.
STAGES_MAX = 8
UNIT_BYTES = 8
_STAGE = re.compile(rf"stage-([0-9a-f]{{{2 * UNIT_BYTES}}})-([0-{STAGES_MAX - 1}])")


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


class StageRange(NamedTuple):
    """The layers of one stage and the node that runs them; `last_layer` is one of them."""

    node: NodeId
    first_layer: int
    last_layer: int


class StageName(NamedTuple):
    """The meaning of a stage's name: its unit, and its number there; 0 is the head."""

    unit: str
    number: int

    def __str__(self) -> str:
        return f"stage-{self.unit}-{self.number}"


def unit_id(digest: ModelDigest, stages: Sequence[StageRange]) -> str:
    """The id of a pipeline: BLAKE2b-8 over the model, the nodes in order and the exact ranges."""
    data = encode([digest, [list(stage) for stage in stages]])
    return blake2b(data, digest_size=UNIT_BYTES).hexdigest()


def parse_stage(name: str) -> StageName | None:
    """The stage that a part's name means; None for other parts."""
    match = _STAGE.fullmatch(name)
    return StageName(match[1], int(match[2])) if match else None


def parse_part(text: str) -> PartId | None:
    """The part that `str` made a text of; None for any other text."""
    digest, _, name = text.partition("/")
    part = PartId(ModelDigest(digest), name)
    return part if is_known(name) and str(part) == text else None


def is_known(name: str) -> bool:
    """Whether this version knows what a part of this name is."""
    return name == WHOLE or _STAGE.fullmatch(name) is not None


def takes_requests(name: str) -> bool:
    """Whether requests are sent to parts of this name: whole models and the heads of pipelines."""
    if name == WHOLE:  # nearly all are, and this is asked for every replica at each change
        return True
    stage = parse_stage(name)
    return stage is not None and stage.number == 0

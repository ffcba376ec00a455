"""Parts: the key of everything that runs.

Pure. A part is what one node runs for one model: the whole model, one stage of a pipeline, or one
shard of its experts. Its name says which, and for a stage or shard of which unit, by a digest over
the model, the nodes and the exact ranges, so that two plans never share a process by accident.

Stage 0 of a pipeline is its head: it keeps the first layers, the embedding and the output, and is
the only part of its unit that takes requests. A shard answers alone, so its name covers only what
it holds: it stays the same part when others come and go.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from hashlib import blake2b
from typing import Any, NamedTuple

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.wire.codec import encode

WHOLE = "whole"
NAME_CHARACTERS_MAX = 32
# More stages never made one stream faster, and each is one more machine that must not fail.
STAGES_MAX = 8
UNIT_BYTES = 8
PLACES_MAX = 1024  # of experts in a layer; the largest published models have 512
MEASURES_MAX = 64  # of the shards of one ranking
QUALITIES_MAX = 8  # of the shards of one model, that go to the mesh
RANKING_CHARACTERS = 64
UNMEASURED = -1
_SHARD = re.compile(rf"shard-[0-9a-f]{{{2 * UNIT_BYTES}}}")
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


class ShardKind(StrEnum):
    """What a shard leaves out of a model: whole experts, or neurons of all of them."""

    EXPERTS = "experts"
    THIN = "thin"


class Shard(NamedTuple):
    """What a shard holds of the experts of a model, by places in a ranking.

    A ranking orders the experts of each layer, where they are in groups those of each group. A
    shard holds the experts of the same places in each of them. A thin shard holds all experts and
    of each so many of the first neurons; a place is a block of neurons there.

    Attributes:
        kind: What its places are.
        ranking: Its digest.
        places: How many there are.
        critical: So many of the first places are in every shard of the model.
        kept: The places that this shard holds, the critical ones among them: bit i for place i. In
            a thin shard these are all.
    """

    kind: ShardKind
    ranking: str
    places: int
    critical: int
    kept: int

    @property
    def size(self) -> int:
        """Return how many places it holds."""
        return self.kept.bit_count()

    def described(self) -> dict[str, Any]:
        """Return how much it holds, for people and programs: places of `kind`, of how many."""
        return {"kind": self.kind.value, "held": self.size, "of": self.places}

    @property
    def kept_bytes(self) -> bytes:
        """Return the places as bytes, the first eight in the first one."""
        return self.kept.to_bytes(-(-self.places // 8), "little")


class ShardQuality(NamedTuple):
    """How good shards are that hold at least the first places of a ranking.

    Attributes:
        kind: What the places are.
        ranking: Its digest.
        places: How many it has for the experts of each layer, or of each group; or for the neurons
            of each expert.
        critical: So many of the first ones the shards hold, and perhaps others.
        divergence: Of their answers from the whole model's, on the kind of text where that is
            largest: Kullback-Leibler divergence per token in millionths of a nat; `UNMEASURED`.
        coverage: How much of the importance of a layer they hold, on the kind of text and the layer
            where that is least, in millionths.
    """

    kind: ShardKind
    ranking: str
    places: int
    critical: int
    divergence: int
    coverage: int

    @property
    def is_measured(self) -> bool:
        """Whether the divergence was measured."""
        return self.divergence != UNMEASURED


def shard_name(digest: ModelDigest, shard: Shard) -> str:
    """The name of a shard: BLAKE2b-8 over the model, the ranking and the places that it holds."""
    what = [shard.kind.value, shard.ranking, shard.places, shard.critical, shard.kept_bytes]
    data = encode([digest, what])
    return f"shard-{blake2b(data, digest_size=UNIT_BYTES).hexdigest()}"


def is_shard(name: str) -> bool:
    """Whether a part of this name is a shard."""
    return _SHARD.fullmatch(name) is not None


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
    return name == WHOLE or _STAGE.fullmatch(name) is not None or is_shard(name)


def takes_requests(name: str) -> bool:
    """Whether requests are sent to parts of this name: all but the stages behind a head."""
    if name == WHOLE:  # nearly all are, and this is asked for every replica at each change
        return True
    stage = parse_stage(name)
    return is_shard(name) if stage is None else stage.number == 0


def is_full(name: str) -> bool:
    """Whether a part of this name answers as the whole model does."""
    return takes_requests(name) and not is_shard(name)

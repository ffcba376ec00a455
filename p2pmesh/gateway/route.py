"""Which model a request means, and which replica answers it.

Pure: what is served where comes in, a choice goes out; randomness is an argument. The same inputs
give the same choice on every node, apart from the draw between two replicas. Knows nothing of
HTTP, of connections, or of how a replica is reached.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import PartId, ReplicaKey, is_full

READY = "ready"
LOADING = "loading"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One ready replica of a model.

    Attributes:
        node_name: The node as people know it.
        model_id: The model's public id.
        local: Whether the engine is a child of this very node.
        slots: How many requests it works on at once; 0 when that is not known.
        part: The model, and which part of it.
        key: What tells this replica from every other.
    """

    node: NodeId
    node_name: str
    part: PartId
    model_id: str
    local: bool
    slots: int = 0
    key: ReplicaKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Made once: each request asks for it many times.
        object.__setattr__(self, "key", ReplicaKey(self.node, self.part))

    @property
    def digest(self) -> ModelDigest:
        """The model."""
        return self.part.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsServed:
    """The expert shards of a model.

    Attributes:
        experts: Of each layer, in the whole model; where they are in groups, of each group.
        kept: How many of them each shard holds, in the order of the nodes.
        divergence: Of each shard from the whole model, at most, in nats per token; None where that
            was not measured.
        coverage: Of the importance of the experts, which each shard holds at least, 0 to 1.
    """

    experts: int
    kept: tuple[int, ...]
    divergence: float | None
    coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model that somebody in the mesh serves or wants served.

    Attributes:
        id: Its public id.
        gives: What can be asked of it: `chat`, `completion`, `embedding`, `rerank`; all that the
            nodes which may answer say, unless this node knows better.
        certain: This node has the file, so it need not ask others what the model can do.
        placed: The plan gives it to a node; what merely runs somewhere nobody asked for.
        demo: It is the embedded one, which answers only where nothing else can.
        state: `ready`, `loading`, `failed` or `not served`.
        reason: Why it is in that state, for a person; may be empty.
        nodes: Names of the nodes that hold a ready replica.
        context_tokens: The context that a request gets, prompt and answer together; 0 when that is
            not known.
        created_s: Unix time shown as its creation; 0 when not known.
        layout: How it is served, or will be: `whole`, `pipeline`, `experts`, or `quantisation` when
            a smaller one answers for it; "" for not at all.
        shards: In `experts`, what the shards hold and how good they are at least.
        served_as: The id of the quantisation that answers for it; "" where it answers itself.
    """

    digest: ModelDigest
    id: str
    gives: frozenset[str]
    state: str
    certain: bool = True
    placed: bool = True
    demo: bool = False
    reason: str = ""
    nodes: tuple[str, ...] = ()
    context_tokens: int = 0
    size_bytes: int = 0
    created_s: int = 0
    layout: str = ""
    shards: ShardsServed | None = None
    served_as: str = ""

    def fit(self, modalities: Sequence[str]) -> int | None:
        """The place among `modalities` of the first that the model gives; None for none."""
        return next((place for place, one in enumerate(modalities) if one in self.gives), None)


def choose(
    candidates: Sequence[Target],
    in_flight: Mapping[ReplicaKey, int],
    rng: Random,
    *,
    tried: Collection[ReplicaKey] = (),
    is_avoided: Callable[[ReplicaKey], bool] | None = None,
    beginning: object = None,
) -> Target | None:
    """The replica that should answer next, or None when all were tried.

    The local one while it has a free slot; else the less busy of two drawn at random, which
    keeps entry nodes that do not talk to each other from all choosing the same one. Of shards,
    which answer in different ways, a conversation draws always the same while it is there: that
    with the largest digest of both (rendezvous), whichever node was asked. Those that are avoided
    come last.

    Args:
        candidates: Ready replicas of one model.
        in_flight: How many requests of this node each replica is answering.
        rng: Draws the two.
        tried: Replicas that already failed this request.
        is_avoided: Whether a replica failed other requests a moment ago.
        beginning: What all requests of a conversation have in common, bytes or JSON; None when that
            is not known.
    """
    left = [target for target in candidates if target.key not in tried]
    if is_avoided is not None and len(left) > 1:
        left = [target for target in left if not is_avoided(target.key)] or left
    if len(left) <= 1:
        return left[0] if left else None
    if beginning is not None and not all(is_full(target.part.name) for target in left):
        said = beginning if isinstance(beginning, bytes) else json.dumps(beginning).encode()
        return max(left, key=lambda target: (_draw(said, target.key), target.key))
    for target in left:
        if target.local and _has_room(target, in_flight):
            return target
    first, second = rng.sample(left, 2)
    return second if _busier(first, second, in_flight) else first


def _draw(said: bytes, key: ReplicaKey) -> bytes:
    return blake2b(said + key.node + str(key.part).encode(), digest_size=8).digest()


def _has_room(target: Target, in_flight: Mapping[ReplicaKey, int]) -> bool:
    return target.slots == 0 or in_flight.get(target.key, 0) < target.slots


def _busier(first: Target, second: Target, in_flight: Mapping[ReplicaKey, int]) -> bool:
    """Whether `first` has more requests per slot than `second`; no division, no rounding."""
    here, there = in_flight.get(first.key, 0), in_flight.get(second.key, 0)
    return here * max(second.slots, 1) > there * max(first.slots, 1)


def rank_auto(models: Sequence[ServedModel], modalities: Sequence[str]) -> list[ServedModel]:
    """The models that a request without a model may mean, best first.

    Only those that the plan places: what a node runs for itself answers for nobody else. Ready
    before loading, anything before the demonstration model, the wanted modality first, then the
    largest, which is the most able as a rule; equals by id. Every node ranks them the same.

    Args:
        models: All of the mesh.
        modalities: Those that can answer, the most fitting first.
    """
    fitting = [
        (model, place)
        for model in models
        if model.placed
        and model.state in (READY, LOADING)
        and (place := model.fit(modalities)) is not None
    ]
    fitting.sort(
        key=lambda pair: (
            pair[0].state != READY,
            pair[0].demo,
            pair[1],
            -pair[0].size_bytes,
            pair[0].id,
            pair[0].digest,
        )
    )
    return [model for model, _ in fitting]

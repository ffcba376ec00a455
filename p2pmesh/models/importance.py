"""How much each expert of a model matters: scores become a ranking that nodes agree on.

Pure. A ranking is made once, from text that runs through the whole model, and is then named by the
digest of its bytes: a shard cut by it is the same on every node. It holds one weight per domain of
text, layer and expert, and names the file with the scores of single neurons (`rankings.py`), by
which thin shards are cut. Layers are ranked apart, since equal ids in different layers have nothing
in common; a layer's weights are relative to its largest, so weights of two layers are not compared.

Rankings are small and canonical: gossip carries the digest, any peer that has it the bytes, and
`from_bytes` trusts nothing.

Shares of a layer's importance are whole numbers in millionths, rounded down, so that all nodes
compute the same from the same ranking.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from statistics import median
from typing import Any, Literal, NamedTuple, NewType, cast, get_args

from p2pmesh.errors import PeerError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.sharing import MILLION
from p2pmesh.wire.codec import decode, encode
from p2pmesh.wire.fields import as_map, take, take_list

RankingDigest = NewType("RankingDigest", str)
Method = Literal["counts-energy", "counts"]
"""What a weight measures: sqrt(tokens routed x energy of the output), or the tokens alone."""
Merge = Literal["mean", "worst"]

DIGEST_BYTES = 32
WEIGHT_MAX = 2**16 - 1  # two bytes each: finer than what one text tells about the next
_DIGEST = re.compile(r"[0-9a-f]{64}")  # it becomes the name of a file
LAYERS_MAX = 1000  # as in metadata.py
EXPERTS_MAX = 4096  # of a layer; the largest published have 512
DOMAINS_MAX = 16
NAME_CHARACTERS_MAX = 64
RANKING_BYTES_MAX = 2 * 2**20  # 94 layers x 128 experts x 3 domains are 73 kB

# A "super expert" (arXiv 2507.23279) writes an activation into one channel that is larger than all
# others by orders of magnitude; attention depends on it, and without it the model says nonsense.
# That paper asks for a tenth of the largest output of the model. Here the outputs are root mean
# squares over all tokens of an expert, so it must also stand out of its own layer: ten times the
# median there is far beyond what layers without such experts show (factors of 2 to 3).
CRITICAL_OF_LARGEST = 0.1
CRITICAL_OF_MEDIAN = 10.0

NEURONS_MAX = 2**20  # of an expert; the widest published have 16384

LayerWeights = tuple[int, ...]
Groups = tuple[tuple[int, ...], ...]


class Domain(NamedTuple):
    """The weights of all experts on one kind of text: a tuple per layer, one number per expert."""

    name: str
    weights: tuple[LayerWeights, ...]


class Neurons(NamedTuple):
    """The file with the scores of neurons: its digest, and the neurons of one expert."""

    digest: str
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The importance of a model's experts.

    Attributes:
        model: Digest of the whole model's file.
        experts: In each of the layers.
        layers: Numbers of the layers that have experts, ascending.
        domains: In the order of their names.
        critical: For each layer the experts that every shard needs, ascending.
        neurons: The scores of single neurons on the same domains; None without any.
    """

    model: ModelDigest
    method: Method
    experts: int
    layers: tuple[int, ...]
    domains: tuple[Domain, ...]
    critical: tuple[tuple[int, ...], ...]
    neurons: Neurons | None = None


def rank(
    model: ModelDigest,
    method: Method,
    layers: Sequence[int],
    scores: Mapping[str, Sequence[Sequence[float]]],
    critical: Sequence[Sequence[int]],
    *,
    neurons: Neurons | None = None,
) -> Ranking:
    """Make a ranking of scores.

    Args:
        model: Digest of the whole model's file.
        method: What the scores measure.
        layers: Numbers of the layers that have experts, ascending.
        scores: By domain, for each layer and expert; finite, not negative, of any scale.
        critical: For each layer, see `critical_experts`.
        neurons: The file with the scores of single neurons, if there is one.
    """
    domains = tuple(
        Domain(name, tuple(_weights(layer) for layer in scores[name])) for name in sorted(scores)
    )
    return Ranking(
        model=model,
        method=method,
        experts=len(domains[0].weights[0]),
        layers=tuple(layers),
        domains=domains,
        critical=tuple(tuple(sorted(experts)) for experts in critical),
        neurons=neurons,
    )


def critical_experts(peaks: Sequence[Sequence[float]]) -> tuple[tuple[int, ...], ...]:
    """Return for each layer the experts whose outputs are outliers, ascending.

    Args:
        peaks: For each layer and expert the mean square of its output in the channel where that is
            largest, over the tokens routed to it; 0 for an expert that no token reached.
    """
    # Squares are compared with squares.
    floor = CRITICAL_OF_LARGEST**2 * max((max(layer, default=0.0) for layer in peaks), default=0.0)
    found = []
    for layer in peaks:
        reached = [peak for peak in layer if peak > 0]
        limit = max(floor, CRITICAL_OF_MEDIAN**2 * median(reached)) if reached else math.inf
        found.append(tuple(expert for expert, peak in enumerate(layer) if peak > limit))
    return tuple(found)


def to_bytes(ranking: Ranking) -> bytes:
    """Return the canonical bytes of a ranking."""
    return encode(
        {
            "critical": [list(experts) for experts in ranking.critical],
            "domains": [
                [domain.name, b"".join(_pack(layer) for layer in domain.weights)]
                for domain in ranking.domains
            ],
            "experts": ranking.experts,
            "layers": list(ranking.layers),
            "method": ranking.method,
            "model": ranking.model,
            "neurons": list(ranking.neurons or ()),
        }
    )


def digest_of(ranking: Ranking) -> RankingDigest:
    """Return the name of a ranking: BLAKE2b-32 of its bytes, in hex."""
    return RankingDigest(blake2b(to_bytes(ranking), digest_size=DIGEST_BYTES).hexdigest())


def from_bytes(data: bytes) -> Ranking:
    """Return the ranking that `to_bytes` made bytes of.

    Raises:
        PeerError: The bytes are no ranking, or not the canonical form of one.
    """
    fields = as_map(decode(data, bytes_max=RANKING_BYTES_MAX), "a ranking")
    experts = take(fields, "experts", int)
    layers = take_list(fields, "layers", int, size_max=LAYERS_MAX)
    method, model = take(fields, "method", str), take(fields, "model", str, size_max=64)
    if not _DIGEST.fullmatch(model):
        raise PeerError("a ranking of a model without a digest")
    if not 0 < experts <= EXPERTS_MAX or not layers:
        raise PeerError("a ranking without layers, or with an impossible number of experts")
    if list(layers) != sorted(set(layers)) or layers[0] < 0:
        raise PeerError("a ranking whose layers are out of order")
    if method not in get_args(Method):
        raise PeerError("a ranking by a method that this version does not know")
    rows = take_list(fields, "domains", list, size_max=DOMAINS_MAX)
    domains = tuple(_domain(row, len(layers), experts) for row in rows)
    names = [domain.name for domain in domains]
    if not names or names != sorted(set(names)):
        raise PeerError("a ranking without domains, or with domains out of order")
    critical = take_list(fields, "critical", list, size_max=LAYERS_MAX)
    if len(critical) != len(layers):
        raise PeerError("a ranking with critical experts of other layers")
    return Ranking(
        model=ModelDigest(model),
        method=cast("Method", method),
        experts=experts,
        layers=layers,
        domains=domains,
        critical=tuple(_ids(row, experts) for row in critical),
        neurons=_neurons(take(fields, "neurons", list)),
    )


def merged(ranking: Ranking, how: Merge) -> Ranking:
    """Return the ranking with all domains merged into one, named as the way of merging.

    A shard by it serves all prompts alike. It names no neurons: their file has other domains.

    Args:
        ranking: Of any number of domains.
        how: By "mean" an expert counts its mean share of the importance in all domains; by "worst"
            its largest one, so that what one domain needs is not outvoted by the others.
    """
    combine: Callable[[Sequence[int]], int] = sum if how == "mean" else max
    layers = []
    for row in zip(*(domain.weights for domain in ranking.domains), strict=True):
        shares = [_shares(weights) for weights in row]
        layers.append([float(combine(column)) for column in zip(*shares, strict=True)])
    return rank(ranking.model, ranking.method, ranking.layers, {how: layers}, ranking.critical)


def ordered(ranking: Ranking, domain: str, groups: int = 1) -> tuple[Groups, ...]:
    """Return for each layer and group of experts their ids, those to keep first first.

    Critical experts come before all others; of equal ones the lower id is first.

    Args:
        ranking: Where the weights are.
        domain: Name of one of its domains.
        groups: Groups of consecutive experts between which the model's router chooses first; the
            number of experts must be divisible by it.

    Raises:
        KeyError: There is no such domain: our own bug.
    """
    assert ranking.experts % groups == 0, "groups are equal"
    width = ranking.experts // groups
    weights = dict(ranking.domains)[domain]
    return tuple(
        tuple(
            tuple(sorted(range(at, at + width), key=lambda e: (e not in core, -layer[e], e)))
            for at in range(0, ranking.experts, width)
        )
        for layer, core in (
            (layer, frozenset(core)) for layer, core in zip(weights, ranking.critical, strict=True)
        )
    )


def kept_experts(
    ranking: Ranking, domain: str, count: int, groups: int = 1
) -> tuple[tuple[int, ...], ...]:
    """Return for each layer the `count` experts that matter most, ascending.

    Every group gives the same number, as the model's router needs it.

    Args:
        ranking: Where the weights are.
        domain: Name of one of its domains.
        count: How many are kept in each layer; divisible by `groups`.
        groups: As in `ordered`.
    """
    assert count % groups == 0, "groups are equal"
    assert 0 < count <= ranking.experts
    return tuple(
        tuple(sorted(expert for group in layer for expert in group[: count // groups]))
        for layer in ordered(ranking, domain, groups)
    )


def coverage(ranking: Ranking, domain: str, kept: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return for each layer how much of the importance its kept experts have, in millionths.

    A layer that no token reached has equal experts.

    Args:
        ranking: Where the weights are.
        domain: Name of one of its domains.
        kept: For each layer, ids without repetition.
    """
    weights = dict(ranking.domains)[domain]
    shares = []
    for layer, experts in zip(weights, kept, strict=True):
        usual = layer if any(layer) else (1,) * len(layer)
        shares.append(sum(usual[expert] for expert in set(experts)) * MILLION // sum(usual))
    return tuple(shares)


def _weights(scores: Sequence[float]) -> LayerWeights:
    """Return scores of one layer as whole numbers, the largest `WEIGHT_MAX`."""
    largest = max(scores)
    assert all(0 <= score < math.inf for score in scores), "scores are finite and not negative"
    if largest == 0:
        return (0,) * len(scores)
    return tuple(int(score / largest * WEIGHT_MAX) for score in scores)


def _shares(weights: LayerWeights) -> tuple[int, ...]:
    total = sum(weights)
    return tuple(weight * 2**32 // total if total else 0 for weight in weights)


def _pack(weights: LayerWeights) -> bytes:
    return struct.pack(f">{len(weights)}H", *weights)


def _domain(row: list[Any], layers: int, experts: int) -> Domain:
    match row:
        case [str(name), bytes(packed)] if 0 < len(name) <= NAME_CHARACTERS_MAX:
            if len(packed) != 2 * layers * experts:
                raise PeerError("a ranking with too many or too few weights")
            rows = struct.iter_unpack(f">{experts}H", packed)
            return Domain(name, tuple(rows))
    raise PeerError("a ranking with something that is no domain")


def _ids(row: list[Any], experts: int) -> tuple[int, ...]:
    if any(type(expert) is not int or not 0 <= expert < experts for expert in row):
        raise PeerError("a ranking with critical experts that are none")
    if row != sorted(set(row)):
        raise PeerError("a ranking with critical experts out of order")
    return tuple(row)


def _neurons(row: list[Any]) -> Neurons | None:
    match row:
        case []:
            return None
        case [str(digest), int(width)] if _DIGEST.fullmatch(digest) and 0 < width <= NEURONS_MAX:
            return Neurons(digest, width)
    raise PeerError("a ranking that names no file of neurons")

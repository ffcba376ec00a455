"""Expert shards: which node holds which experts of a model that fits on none of them whole. Pure.

Each shard answers alone: nothing passes between nodes while tokens are made. There are two kinds.
A thin shard holds all experts and of each the most important neurons. A shard of whole experts
holds the critical experts of each layer, which are the first places of a ranking, and a share of
the others, so that together the shards hold every expert. How much is critical is chosen by
quality: the least with which a shard is known to be good enough even if it holds nothing else. So
no shard of the set is worse, whoever joins or leaves, and a further node makes the shares smaller
and never bigger. Of the sets that are possible the one with the smallest shards is taken.

The others are dealt out in the order of the ranking by the method of D'Hondt, a place to the node
with the largest quotient of its spare places and its places so far plus one. Nodes get shares in
proportion to their memory, the important experts are spread evenly, no node gets more than it has
room for, and with one node more each other gets a share that is no larger.

A shard that runs stays as it is while it fits. A node that joins gets the share that it would have
in a new set, and nobody else changes. When a node has left and its experts are nowhere else, a node
that joins takes them if it has the room; else those that stayed take their shares of the new set
one after the other, so that some of them answer all the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import Shard, ShardKind, ShardQuality
from p2pmesh.placement.assignment import ShardRefusal
from p2pmesh.placement.layout import Experts, PlacedShard
from p2pmesh.sharing import COVERAGE_LEAST, COVERAGE_MIN, MILLION

SHARDS_MAX = 8  # more of them cost files and memory, and each is one more place for conversations
SHARDS_MIN = 2  # of whole experts
SETS_MAX = 16  # that are compared: each takes a millisecond, and any holder may claim qualities


class Host(NamedTuple):
    """A node that has a model's file.

    Attributes:
        room_bytes: Free for a shard, what its own one takes among them.
        need_bytes: What the whole model takes there.
        expert_bytes: Of that, what the experts take.
        running: The shard that runs there.
        is_ready: Whether that answers.
    """

    node: NodeId
    room_bytes: int
    need_bytes: int
    expert_bytes: int
    running: Shard | None = None
    is_ready: bool = False

    def capacity(self, places: int) -> int:
        """How many places a shard here can hold; 0 for none, or where there are no experts."""
        each = self.expert_bytes // max(places, 1)
        if not each:
            return 0
        lacking = max(self.need_bytes - self.room_bytes, 0)
        return max(places - -(-lacking // each), 0)


def shard_bytes(need_bytes: int, expert_bytes: int, shard: Shard) -> int:
    """Return the memory of a shard in bytes.

    Args:
        need_bytes: What the whole model takes.
        expert_bytes: Of that, what the experts take.
        shard: What it holds.
    """
    return need_bytes - expert_bytes // shard.places * (shard.places - shard.size)


# --- quality ------------------------------------------------------------------------------------


def good_enough(
    qualities: Iterable[ShardQuality], divergence_max: int, *, measured: bool = True
) -> list[ShardQuality]:
    """Return what is known to be good enough, that with the smallest shards first.

    Args:
        qualities: All that is known.
        divergence_max: The largest divergence, in millionths of a nat.
        measured: Whether a measured divergence counts; else the coverage by rankings of which no
            shards were measured.
    """
    known = tuple(qualities)
    seen = {one[:2] for one in known if one.is_measured}

    def is_good(one: ShardQuality) -> bool:
        if measured:
            is_likely = one.coverage >= COVERAGE_LEAST
            return one.is_measured and is_likely and one.divergence <= divergence_max
        return one[:2] not in seen and one.coverage >= COVERAGE_MIN

    return sorted(filter(is_good, known), key=_size)


def _size(one: ShardQuality) -> tuple[int, int, ShardQuality]:
    return one.critical * MILLION // one.places, one.divergence, one


def _any_good(qualities: Iterable[ShardQuality], divergence_max: int) -> list[ShardQuality]:
    """Return what is good enough in any way, the measured ones first."""
    known = tuple(qualities)
    guessed = good_enough(known, divergence_max, measured=False)
    return good_enough(known, divergence_max) + guessed


# --- sets ---------------------------------------------------------------------------------------


def new_set(
    digest: ModelDigest, good: Iterable[ShardQuality], hosts: Iterable[Host]
) -> Experts | None:
    """Return the set whose largest shard is the smallest; None when there can be none.

    Args:
        digest: Of the model.
        good: What is good enough, that with the smallest shards first.
        hosts: Each node once.
    """
    here = tuple(hosts)
    found = ((quality, shards_of(quality, here)) for quality in islice(good, SETS_MAX))
    sets = [_placed(digest, quality, shards, here) for quality, shards in found if shards]
    return min(sets, key=_cost, default=None)


def _cost(one: Experts) -> tuple[int, int, ShardQuality]:
    """Return the order among sets: by their largest shard, as a share of all, then by quality.

    So the two kinds compete by what was measured of them.
    """
    largest = max(placed.shard.size for placed in one.shards)
    return largest * MILLION // one.quality.places, one.quality.divergence, one.quality


def kept_set(
    digest: ModelDigest,
    qualities: Iterable[ShardQuality],
    divergence_max: int,
    hosts: Iterable[Host],
) -> Experts | None:
    """Return the shards that run, as far as they fit and are good enough; None for none."""
    here = tuple(hosts)
    running = {one.running[:4] for one in here if one.running is not None}
    for quality in _any_good(qualities, divergence_max):
        if quality[:4] not in running:
            continue
        kept = {
            one.node: one.running
            for one in here
            if one.running is not None
            and one.running[:4] == quality[:4]
            and one.running.size <= one.capacity(quality.places)
        }
        if kept:
            return _placed(digest, quality, kept, here)
    return None


def extended_set(kept: Experts, hosts: Iterable[Host]) -> Experts:
    """Return the set that a running one becomes; shards of other sets count as none."""
    running = {one.node: one.shard for one in kept.shards}
    here = tuple(one._replace(running=running.get(one.node)) for one in hosts)
    return _placed(kept.digest, kept.quality, extended(kept.quality, here), here)


def why_no_set(
    digest: ModelDigest,
    qualities: Iterable[ShardQuality],
    divergence_max: int,
    hosts: Iterable[Host],
) -> ShardRefusal:
    """Return why a model is not in shards: nothing is good enough, or there is no room."""
    known = tuple(qualities)
    good, here = _any_good(known, divergence_max), tuple(hosts)
    if not good or not here:
        measured = [one for one in known if one.is_measured] or known
        best = min(measured, key=lambda one: (one.divergence, -one.coverage), default=None)
        return ShardRefusal(best, divergence_max)
    [smallest, *_] = good
    least = Shard(*smallest[:4], (1 << smallest.critical) - 1)
    first = max(here, key=lambda one: (one.capacity(smallest.places), one.node))
    return ShardRefusal(
        smallest,
        divergence_max,
        is_possible=new_set(digest, good_enough(known, divergence_max), here) is not None,
        need_bytes=shard_bytes(first.need_bytes, first.expert_bytes, least),
        room_bytes=max(first.room_bytes, 0),
        hosts=sum(one.capacity(smallest.places) >= least.size for one in here),
    )


def _placed(
    digest: ModelDigest,
    quality: ShardQuality,
    shards: Mapping[NodeId, Shard],
    hosts: Iterable[Host],
) -> Experts:
    sizes = {one.node: (one.need_bytes, one.expert_bytes) for one in hosts}
    placed = tuple(
        PlacedShard(node, shard, shard_bytes(*sizes[node], shard))
        for node, shard in sorted(shards.items())
    )
    return Experts(digest=digest, quality=quality, shards=placed)


def shards_of(quality: ShardQuality, hosts: Iterable[Host]) -> dict[NodeId, Shard]:
    """Return new shards on all hosts that have room for one; none where they would not do.

    Args:
        quality: The ranking, and how many of its places are critical.
        hosts: Each node once.
    """
    places, critical = quality.places, quality.critical
    is_thin = quality.kind is ShardKind.THIN
    able = [(one, one.capacity(places) - critical) for one in hosts]
    able = [pair for pair in able if pair[1] >= 0]
    able.sort(key=lambda pair: (pair[0].running is None, -pair[1], pair[0].node))
    del able[SHARDS_MAX:]
    kept = {one.node: (1 << critical) - 1 for one, _ in able}
    if not is_thin:
        others = range(critical, places)
        if len(able) < SHARDS_MIN or sum(spare for _, spare in able) < len(others):
            return {}
        spare = {one.node: more for one, more in able}
        for place, node in zip(others, _dealt(spare, len(others)), strict=True):
            kept[node] |= 1 << place
    return {node: Shard(*quality[:4], mask) for node, mask in kept.items()}


def _dealt(spare: Mapping[NodeId, int], count: int) -> Iterable[NodeId]:
    """The nodes that get one place after the other (D'Hondt); the smaller id where two are equal.

    Invariant: none gets more than it has to spare, as there are `count` quotients of at least 1.
    """
    got = dict.fromkeys(sorted(spare), 0)
    for _ in range(count):
        best: NodeId | None = None
        for node in got:
            if best is None or spare[node] * (got[best] + 1) > spare[best] * (got[node] + 1):
                best = node
        assert best is not None, "there is a node"
        got[best] += 1
        yield best


def extended(quality: ShardQuality, hosts: Sequence[Host]) -> dict[NodeId, Shard]:
    """Return the shards that running ones become: see the module.

    Args:
        quality: What the shards that run are of.
        hosts: Each node once; those that run a shard of another set count as running none.
    """
    fresh = shards_of(quality, hosts)
    running = {one.node: one.running for one in hosts if one.running is not None}
    result = {**fresh, **running}
    missing = (1 << quality.places) - 1 if quality.kind is ShardKind.EXPERTS else 0
    for shard in result.values():
        missing &= ~shard.kept
    if not missing:
        return result
    for one in sorted(hosts):
        if one.node in fresh and one.running is None:
            share = fresh[one.node].kept | missing
            if share.bit_count() <= one.capacity(quality.places):
                return {**result, one.node: fresh[one.node]._replace(kept=share)}
    # One that stops to change, or has yet to start, does not answer: the others wait for it.
    if all(one.running is not None and one.is_ready for one in hosts if one.node in result):
        for node in sorted(running):
            if node in fresh and fresh[node].kept & ~running[node].kept:
                return {**result, node: fresh[node]}
    return result

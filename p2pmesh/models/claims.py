"""What several nodes say about the shards of one model, made one.

Pure. Anybody may say anything. So shards by a ranking count only once more than one holder of the
model has what it takes to make them, and of what is said about equal shards the middle counts,
which no single one of three can move.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from statistics import median_high, median_low
from typing import Any

from p2pmesh.models.parts import ShardKind, ShardQuality

VOUCHERS_MIN = 2

Claims = Collection[ShardQuality]  # of one node


def agreed(said: Iterable[Claims]) -> tuple[ShardQuality, ...]:
    """Return one claim for equal shards: the median, of two in the middle the worse one.

    What is measured and what is not are told apart.

    Args:
        said: By each node, whose own last word on equal shards counts.
    """
    found: defaultdict[tuple[Any, ...], list[ShardQuality]] = defaultdict(list)
    for claims in said:
        for key, one in {(*one[:4], one.is_measured): one for one in claims}.items():
            found[key].append(one)
    return tuple(
        one._replace(
            divergence=median_high(each.divergence for each in alike),
            coverage=median_low(each.coverage for each in alike),
        )
        for alike in found.values()
        for one in alike[:1]
    )


def vouched(said: Collection[Claims]) -> frozenset[tuple[ShardKind, str]]:
    """Return the kinds and rankings that can be had: several nodes have them, or all there are.

    Args:
        said: By each node that has the model; () for one that says nothing.
    """
    counts = Counter(each for claims in said for each in {one[:2] for one in claims})
    least = min(VOUCHERS_MIN, len(said))
    return frozenset(each for each, count in counts.items() if count >= least)

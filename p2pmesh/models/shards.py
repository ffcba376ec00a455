"""From a ranking to shards: which experts the places hold, and how good shards are.

Pure. A place of a ranking is one expert of each layer, where experts are in groups one of each
group: the most important first, by the mean of the domains, after those that every shard needs.
One list serves all prompts; shards that specialise would be sets of their own. The places of thin
shards are in thin_places.py; both kinds are used alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import ClassVar

from p2pmesh.errors import ModelError
from p2pmesh.models.experts import KEPT_MIN, KEPT_PER_GROUP_MIN, ExpertLayout, ExpertLists
from p2pmesh.models.importance import Ranking, coverage, digest_of, merged, ordered
from p2pmesh.models.parts import UNMEASURED, Shard, ShardKind, ShardQuality
from p2pmesh.models.shard_file import Plan, shard_file
from p2pmesh.sharing import COVERAGE_MIN


class RankedPlaces(ABC):
    """The places of one ranking of one model, of either kind.

    Attributes:
        kind: Of the shards.
        ranking: Of that model.
        count: How many places there are.
        critical_min: How many of them the smallest shard has.
    """

    kind: ClassVar[ShardKind]
    ranking: Ranking
    count: int
    critical_min: int

    @abstractmethod
    def holds(self, critical: int) -> str:
        """Return what a shard holds that has the first places, for people."""

    @abstractmethod
    def plan(self, critical: int) -> Plan:
        """Return the plan of a shard that holds the first places and no others."""

    @abstractmethod
    def plan_of(self, shard: Shard) -> Plan:
        """Return the plan of a shard.

        Raises:
            ModelError: The shard is not one of this ranking.
        """

    @abstractmethod
    def coverage(self, critical: int) -> int:
        """Return how much of the importance the first places have, in millionths.

        That of the layer and the domain where it is least.
        """

    def quality(self, critical: int, divergence: int = UNMEASURED) -> ShardQuality:
        """Return what is known of shards that hold the first places."""
        return ShardQuality(
            kind=self.kind,
            ranking=digest_of(self.ranking),
            places=self.count,
            critical=critical,
            divergence=divergence,
            coverage=self.coverage(critical),
        )

    def predicted(self) -> ShardQuality | None:
        """Return the smallest shards whose coverage will do where nothing can be measured."""
        fits = (n for n in range(self.critical_min, self.count) if self.coverage(n) >= COVERAGE_MIN)
        critical = next(fits, None)
        return None if critical is None else self.quality(critical)

    def check(self, shard: Shard) -> None:
        """Raise ModelError unless a shard is one of this ranking."""
        if (shard.kind, shard.ranking) != (self.kind, digest_of(self.ranking)) or (
            shard.places != self.count or not self.critical_min <= shard.size <= self.count
        ):
            raise ModelError("the shard is one of another ranking")


class Places(RankedPlaces):
    """The places of shards of whole experts.

    Args:
        ranking: Of the model.
        layout: Of the same model.

    Raises:
        ModelError: The ranking is of another model.
    """

    kind = ShardKind.EXPERTS

    def __init__(self, ranking: Ranking, layout: ExpertLayout) -> None:
        # Layers that predict further tokens have experts and no ranking: nothing runs them.
        if ranking.experts != layout.count or not set(ranking.layers) <= set(layout.layers):
            raise ModelError("the ranking is of a model with other experts; rank this one anew")
        self.ranking, self._layout = ranking, layout
        self.count = layout.count // layout.groups
        self._order = dict(
            zip(
                ranking.layers, ordered(merged(ranking, "mean"), "mean", layout.groups), strict=True
            )
        )
        self.critical_min = max(self._fewest(), *map(self._last_critical, ranking.layers))

    def lists(self, kept: Iterable[int]) -> ExpertLists:
        """Return the experts of each layer at some places, those of a group by their ids."""
        places = sorted(kept)
        first = [range(at, at + self.count) for at in range(0, self._layout.count, self.count)]
        return {
            layer: tuple(
                expert
                for group in self._order.get(layer, first)
                for expert in sorted(group[place] for place in places)
            )
            for layer in self._layout.layers
        }

    def of(self, shard: Shard) -> ExpertLists:
        """Return the experts of a shard.

        Raises:
            ModelError: The shard is not one of this ranking.
        """
        self.check(shard)
        return self.lists(place for place in range(self.count) if shard.kept >> place & 1)

    def holds(self, critical: int) -> str:
        """Return how many experts a shard has of each layer."""
        groups = self._layout.groups
        return f"{critical * groups} of {self._layout.count} experts"

    def plan(self, critical: int) -> Plan:
        """Return the plan of a shard that holds the first places and no others."""
        return partial(shard_file, lists=self.lists(range(critical)))

    def plan_of(self, shard: Shard) -> Plan:
        """Return the plan of a shard; raises what `of` does."""
        return partial(shard_file, lists=self.of(shard))

    def coverage(self, critical: int) -> int:
        """Return how much of the importance the first places have, in millionths."""
        lists = self.lists(range(critical))
        kept = [lists[layer] for layer in self.ranking.layers]
        domains = self.ranking.domains
        return min(min(coverage(self.ranking, domain.name, kept)) for domain in domains)

    def _fewest(self) -> int:
        """Return the fewest places with which the model runs as it is meant to."""
        layout = self._layout
        used = max(layout.used) if isinstance(layout.used, tuple) else layout.used
        if layout.groups == 1:
            return max(KEPT_MIN, used)
        return max(KEPT_PER_GROUP_MIN, -(-used // layout.groups_used))

    def _last_critical(self, layer: int) -> int:
        """Return how many places it takes to hold the experts that every shard needs."""
        needed = set(self.ranking.critical[self.ranking.layers.index(layer)])
        return max(len(needed.intersection(group)) for group in self._order[layer])


def sizes_to_measure(places: RankedPlaces) -> range:
    """Return how many critical places may be measured: from half of all to all but one."""
    return range(max(places.critical_min, places.count // 2), places.count)

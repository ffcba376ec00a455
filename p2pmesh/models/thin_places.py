"""From the scores of neurons to thin shards: which neurons the places hold, and how good that is.

Pure. A place is a step of neurons of every expert, the best first: by the mean over the domains of
their shares of a layer's scores, so that a domain with larger numbers does not outvote the others.
One shard serves all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from p2pmesh.errors import ModelError
from p2pmesh.models.gguf import Header
from p2pmesh.models.importance import Ranking
from p2pmesh.models.parts import Shard, ShardKind
from p2pmesh.models.shard_file import Plan, ShardFile
from p2pmesh.models.shards import RankedPlaces
from p2pmesh.models.thin import ThinLayout, is_of, thin_file
from p2pmesh.sharing import MILLION

if TYPE_CHECKING:
    from p2pmesh.models.shard_file import Indices

Floats: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class ThinPlaces(RankedPlaces):
    """The places of thin shards.

    Args:
        ranking: Of the model.
        neurons: Its scores of neurons, [layers, domains, experts, width]; they may lie on a disk,
            since only one layer of them is used at a time.
        layout: Of the same model.

    Raises:
        ModelError: The ranking or the scores are of another model.
    """

    kind = ShardKind.THIN
    critical_min = 1

    def __init__(self, ranking: Ranking, neurons: Floats, layout: ThinLayout) -> None:
        shape = (len(ranking.layers), len(ranking.domains), layout.experts, layout.width)
        if neurons.shape != shape or not is_of(ranking, layout):
            raise ModelError("the ranking is of a model with other experts; rank this one anew")
        self.ranking, self.layout, self._neurons = ranking, layout, neurons
        self.count = layout.count

    def kept(self, layer: int, critical: int) -> Indices:
        """Return the neurons of each expert that the first places hold, ascending.

        Args:
            layer: Its number. One that predicts further tokens has no scores, as nothing runs it,
                and gives its first neurons.
            critical: Places.

        Returns:
            [experts, critical * step].
        """
        block, width = self.layout.blocks[layer], critical * self.layout.step
        if layer in self.ranking.layers:
            shares = self._shares(self.ranking.layers.index(layer))
            best = _descending(shares)[:, : width // block]
            blocks = np.sort(best, axis=1)
        else:
            first = np.arange(width // block)
            blocks = np.broadcast_to(first, (self.layout.experts, width // block))
        neurons = blocks[:, :, None] * block + np.arange(block)
        return neurons.reshape(self.layout.experts, width)

    def holds(self, critical: int) -> str:
        """Return how many neurons a shard has of each expert."""
        return f"{critical * self.layout.step} of {self.layout.width} neurons"

    def plan(self, critical: int) -> Plan:
        """Return the plan of a shard that holds the first places."""
        return partial(self._file, critical)

    def plan_of(self, shard: Shard) -> Plan:
        """Return the plan of a shard; raises ModelError when it is one of another ranking."""
        self.check(shard)
        return self.plan(shard.size)

    def coverage(self, critical: int) -> int:
        """Return how much of the scores the first places have, in millionths."""
        return self._coverages[critical]

    def _file(self, critical: int, headers: Sequence[Header]) -> ShardFile:
        return thin_file(
            headers,
            layout=self.layout,
            width=critical * self.layout.step,
            kept=partial(self.kept, critical=critical),
        )

    def _shares(self, at: int) -> Floats:
        """Return for each domain, expert and block of a layer its share of the domain's scores.

        A domain of which no token reached the layer has zeros.
        """
        block = self.layout.blocks[self.ranking.layers[at]]
        scores = np.asarray(self._neurons[at])
        blocks = scores.reshape(*scores.shape[:-1], -1, block).sum(axis=-1)
        totals = blocks.sum(axis=(1, 2), dtype=np.float64)
        divisors = np.where(totals > 0, totals, 1)[:, None, None].astype(np.float32)
        return np.asarray(blocks / divisors, np.float32)

    @cached_property
    def _coverages(self) -> tuple[int, ...]:
        """The coverage of 0, 1, 2, ... places, in the layer and the domain where it is least."""
        # A layer that no token reached has equal neurons.
        usual = np.arange(1, self.count + 1) / self.count
        least = np.ones(self.count)
        for at, layer in enumerate(self.ranking.layers):
            shares = self._shares(at)
            order = _descending(shares)[None]
            each = np.take_along_axis(shares, order, axis=2).sum(axis=1, dtype=np.float64)
            sums = each.cumsum(axis=1)
            per_place = self.layout.step // self.layout.blocks[layer]
            reached = sums[:, per_place - 1 :: per_place]
            totals = sums[:, -1:]
            covered = np.where(totals > 0, reached / np.where(totals > 0, totals, 1), usual)
            least = np.minimum(least, covered.min(axis=0))
        return (0, *(least * MILLION).astype(int).tolist())


def _descending(shares: Floats) -> Indices:
    """Return the blocks of each expert, the best first and of equal ones the first first.

    Args:
        shares: [domains, experts, blocks].
    """
    return np.argsort(-shares.sum(axis=0), axis=1, kind="stable")

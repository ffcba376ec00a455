"""How a model of experts may be shared by nodes of which none has room for all of it.

Pure.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

MILLION = 1_000_000
DIVERGENCE_MAX = MILLION // 10  # what shards may diverge where nobody says otherwise
COVERAGE_MIN = 9 * MILLION // 10  # of the importance; where no divergence can be measured
# Less than this makes no shard that anybody would want, whatever somebody says of its divergence.
COVERAGE_LEAST = 4 * MILLION // 10
DIVERGENCE_LIMIT = 100 * MILLION  # as far as a model of 10^43 tokens that answers at random


class Sharing(StrEnum):
    """How nodes may share a model of experts that fits on none of them."""

    AUTO = "auto"
    EXPERTS = "experts"
    LAYERS = "layers"

    @classmethod
    def strictest(cls, asked: Collection[Sharing]) -> Sharing:
        """Return what all who asked can live with best: layers answer as the whole model does."""
        return next((one for one in (cls.LAYERS, cls.EXPERTS) if one in asked), cls.AUTO)

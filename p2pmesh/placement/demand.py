"""Demands: the models that are wanted, each with what all wants for it come to. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from p2pmesh.placement.facts import ModelFacts
from p2pmesh.sharing import DIVERGENCE_MAX, Sharing


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A wanted model: what all wants for it come to."""

    model: ModelFacts
    copies: int
    priority: int
    split: int = 0
    moe: Sharing = Sharing.AUTO
    divergence_max: int = DIVERGENCE_MAX

    @property
    def sharing(self) -> Sharing:
        """Return how nodes may share it: what owners say of experts is nothing to other models."""
        return self.moe if self.model.expert_bytes else Sharing.AUTO

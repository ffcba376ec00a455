"""How else a model of experts could be served: in shards, as a pipeline, or in fewer bits. Pure.

The first two are what the plan would be if the owners of the model had asked for them, and nothing
of it ran yet. For the third it is said how large a quantisation may be that fits whole on a node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import Card, ModelDigest
from p2pmesh.placement.assignment import Assignment
from p2pmesh.placement.facts import ModelFacts, PlacementInputs
from p2pmesh.placement.plan import plan
from p2pmesh.sharing import Sharing

# Thousandths of a bit per weight that whole models have, as llama.cpp makes them.
QUANTISATIONS = (
    ("Q8_0", 8500),
    ("Q6_K", 6570),
    ("Q5_K_M", 5700),
    ("Q4_K_M", 4900),
    ("IQ4_XS", 4300),
    ("Q3_K_M", 3900),
    ("Q2_K", 3000),
    ("IQ2_XS", 2400),
    ("IQ1_M", 1900),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A quantisation that a node has room for, at the context that the model has.

    Attributes:
        node: Of those that have the file, the one with the largest budget for it.
        size_bytes: How large the file may be.
        name: The finest quantisation that is no larger, by its usual bits per weight.
    """

    node: NodeId
    size_bytes: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    """Other ways to serve one model of experts.

    Attributes:
        experts: As shards; an assignment without nodes says why not.
        layers: As a pipeline; likewise.
        smaller: The model's smaller quantisations in the mesh.
        fits: The largest quantisation that would fit whole on a node; None when none would.
    """

    experts: Assignment
    layers: Assignment
    smaller: tuple[ModelDigest, ...]
    fits: Fit | None


def alternatives(
    facts: PlacementInputs, digest: ModelDigest, card: Card | None
) -> Alternatives | None:
    """Return how else a model could be served; None for one without experts, or not wanted.

    Args:
        facts: What the plan was made from.
        digest: A model of the plan.
        card: Its card, as far as one is known.
    """
    model = next((one for one in facts.models if one.digest == digest), None)
    if model is None or not model.expert_bytes:
        return None
    return Alternatives(
        experts=_served(facts, digest, Sharing.EXPERTS),
        layers=_served(facts, digest, Sharing.LAYERS),
        smaller=model.smaller,
        fits=None if card is None else _fit(facts, model, card),
    )


def _served(facts: PlacementInputs, digest: ModelDigest, moe: Sharing) -> Assignment:
    """Return what the plan would be if all owners had asked for one way of sharing."""
    changed = replace(
        facts,
        wants=tuple(replace(one, moe=moe) if one.digest == digest else one for one in facts.wants),
        residents=tuple(one for one in facts.residents if one.digest != digest),
    )
    return next(one for one in plan(changed).assignments if one.digest == digest)


def _fit(facts: PlacementInputs, model: ModelFacts, card: Card) -> Fit | None:
    """Return the largest quantisation that fits into the budget of a node that has the file."""
    budgets = {one.node: one.budget_bytes for one in facts.nodes}
    beside = {node: model.need_on(node) - card.size_bytes for node in model.holders}
    rooms = [(budgets[node] - beside[node], node) for node in model.holders if node in budgets]
    if not rooms or not card.parameters:
        return None
    size_bytes, node = max(rooms)
    for name, millibits in QUANTISATIONS:
        if card.parameters * millibits // 8000 <= min(size_bytes, card.size_bytes - 1):
            return Fit(node=node, size_bytes=size_bytes, name=name)
    return None

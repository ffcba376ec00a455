"""The inputs of a plan as they would be with other nodes. Pure.

A removed node is left out as `InputsReader` leaves out a dead one: the plan is the one that the
mesh would make without it. Its wishes stay, because wishes outlive their owners. An imagined node
has the file of every model, because the question is whether its memory helps, and files can be
copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from statistics import median_low

from p2pmesh.identity.keys import ID_BYTES, NodeId
from p2pmesh.placement.facts import ModelFacts, NodeFacts, PlacementInputs


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ImaginedNode:
    """A node that is not there, with the engine of most others and the right to head a pipeline.

    Attributes:
        budget_bytes: Memory that it gives to models.
        memory_mib_per_s: How fast it reads memory; 0 for the constant of an unknown node.
    """

    budget_bytes: int
    memory_mib_per_s: int = 0


def imagined_id(number: int) -> NodeId:
    """Return the id of an imagined node, counted from 1; no key has it."""
    return NodeId(blake2b(b"p2pmesh imagined node %d" % number, digest_size=ID_BYTES).digest())


def change(
    facts: PlacementInputs,
    *,
    removed: Iterable[NodeId] = (),
    added: Iterable[ImaginedNode] = (),
) -> PlacementInputs:
    """Return the inputs without some nodes and with others; the order of either means nothing.

    Args:
        facts: The present inputs.
        removed: Nodes to do without.
        added: Nodes to imagine; the smallest gets number 1.
    """
    # Added first: an imagined node in place of the only holder of a model has its file too.
    return _remove(_add(facts, sorted(added)), frozenset(removed))


def _remove(facts: PlacementInputs, gone: frozenset[NodeId]) -> PlacementInputs:
    models = (_without(model, gone) for model in facts.models)
    return replace(
        facts,
        nodes=tuple(one for one in facts.nodes if one.node not in gone),
        models=tuple(model for model in models if model is not None),
        residents=tuple(one for one in facts.residents if one.node not in gone),
    )


def _without(model: ModelFacts, gone: frozenset[NodeId]) -> ModelFacts | None:
    """Return the facts by the holders that stay; None when nobody describes the model any more."""
    if gone.isdisjoint(model.holders):
        return model
    needs = {node: model.need_on(node) for node in model.holders if node not in gone}
    if not needs:
        return None
    return replace(
        model,
        need_bytes=median_low(needs.values()),
        holders=tuple(needs),
        own_needs=tuple(needs.items()),
        shapes=tuple((node, shape) for node, shape in model.shapes if node in needs),
        expert_bytes=tuple((node, size) for node, size in model.expert_bytes if node in needs),
    )


def _add(facts: PlacementInputs, added: list[ImaginedNode]) -> PlacementInputs:
    rpc = _usual_rpc(facts.nodes)
    alike = [one.confined for one in facts.nodes if one.rpc == rpc]
    nodes = tuple(
        NodeFacts(
            node=imagined_id(number),
            budget_bytes=one.budget_bytes,
            rpc=rpc,
            may_head=True,
            memory_mib_per_s=one.memory_mib_per_s,
            confined=2 * sum(alike) > len(alike),
        )
        for number, one in enumerate(added, 1)
    )
    ids = tuple(one.node for one in nodes)
    return replace(
        facts,
        nodes=facts.nodes + nodes,
        models=tuple(_given_to(model, ids) for model in facts.models),
    )


def _given_to(model: ModelFacts, ids: tuple[NodeId, ...]) -> ModelFacts:
    """Return the facts of a model whose file these nodes have too."""
    shapes, experts = model.shapes, model.expert_bytes
    if shapes:
        shapes += tuple((node, shapes[0][1]) for node in ids)
    if experts:
        experts += tuple((node, experts[0][1]) for node in ids)
    return replace(model, holders=model.holders + ids, shapes=shapes, expert_bytes=experts)


def _usual_rpc(nodes: Iterable[NodeFacts]) -> str:
    counts = Counter(one.rpc for one in nodes if one.rpc)
    return max(counts, key=lambda rpc: (counts[rpc], rpc), default="")

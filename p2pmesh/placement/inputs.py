"""From what the mesh says to the facts that placement may depend on.

Pure. Everything here comes from signed records, but for one thing: which nodes are dead is, in
this version, what each node sees itself. Nodes that see the same have the same facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import Card, ModelDigest, need_bytes
from p2pmesh.placement.facts import Facts, ModelFacts, NodeFacts, Resident, Want
from p2pmesh.state.bodies import Wanted
from p2pmesh.state.views import MeshView

CONTEXT_DEFAULT_MAX = 32768  # more is a wish: it costs memory that few conversations need


def default_context(card: Card) -> int:
    """Tokens of context when nobody asked for another number."""
    return min(card.context, CONTEXT_DEFAULT_MAX)


def agreed(view: MeshView) -> dict[ModelDigest, Wanted]:
    """One wish per model: of several, the largest of each number, so that it serves them all."""
    merged: dict[ModelDigest, Wanted] = {}
    for want in view.wants:
        one = want.wanted
        other = merged.get(one.digest, one)
        merged[one.digest] = Wanted(
            digest=one.digest,
            stem=min(one.stem, other.stem),
            replicas=max(one.replicas, other.replicas),
            priority=max(one.priority, other.priority),
            context=max(one.context, other.context),
            slots=max(one.slots, other.slots),
        )
    return merged


def launch_context(view: MeshView, digest: ModelDigest) -> int:
    """Tokens of context that an engine for this model gets, for all its slots together.

    Never more than the model was made for, so that no single wish makes it too large for all.
    """
    card = view.cards[digest]
    wanted = agreed(view).get(digest)
    if wanted is not None and wanted.context:
        return min(wanted.context, card.context)
    return default_context(card)


def facts_of(view: MeshView, dead: Iterable[NodeId]) -> Facts:
    """The facts behind a plan.

    Args:
        view: What the records say.
        dead: Nodes to do without.
    """
    gone = frozenset(dead)
    alive = {node: one for node, one in view.nodes.items() if node not in gone}
    holders: dict[ModelDigest, list[NodeId]] = {}
    for node, one in alive.items():
        for digest in one.held:
            holders.setdefault(digest, []).append(node)
    return Facts(
        nodes=tuple(
            NodeFacts(node=node, budget_bytes=one.caps.budget_bytes)
            for node, one in alive.items()
            if one.caps is not None
        ),
        models=tuple(
            ModelFacts(
                digest=digest,
                need_bytes=need_bytes(card, context=launch_context(view, digest)),
                holders=tuple(holders.get(digest, ())),
                fallback=digest in view.demos,
            )
            for digest, card in view.cards.items()
        ),
        wants=tuple(
            Want(
                owner=want.owner,
                digest=want.wanted.digest,
                replicas=want.wanted.replicas,
                priority=want.wanted.priority,
            )
            for want in view.wants
        ),
        residents=tuple(_residents(view, alive)),
    )


def _residents(view: MeshView, alive: Mapping[NodeId, object]) -> Iterator[Resident]:
    for node in alive:
        for one in view.nodes[node].serves.values():
            if one.state in ("loading", "ready"):
                yield Resident(
                    node=node,
                    digest=one.digest,
                    state="ready" if one.state == "ready" else "loading",
                )

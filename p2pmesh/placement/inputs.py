"""From what the mesh says to the facts that placement may depend on.

Pure. Everything here comes from signed records, so nodes with the same records have the same
facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from statistics import median_low

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import Card, ModelDigest, need_bytes
from p2pmesh.placement.facts import Facts, ModelFacts, NodeFacts, Resident, Want
from p2pmesh.state.bodies import Wanted
from p2pmesh.state.views import MeshView

CONTEXT_DEFAULT_MAX = 32768  # more is a wish: it costs memory that few conversations need
CONTEXT_MIN = 512  # fewer tokens than a system prompt has are of no use to anybody else
SLOTS_FOR_OTHERS_MAX = 16  # each costs threads and buffers of the node that serves


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


def launch_context(wanted: Wanted | None, card: Card, budget_bytes: int) -> int:
    """Tokens of context that a node's engine gives to a model, for all its slots together.

    Never more than the model was made for, nor so much that the model would not fit for that alone,
    nor so little that only who asked for it could use the model.

    Args:
        wanted: What the wishes for the model come to, if there are any.
        card: The model, as the node that serves it describes it.
        budget_bytes: Memory that this node gives to models.
    """
    default = default_context(card)
    if wanted is None or not wanted.context:
        return default
    context = min(max(wanted.context, CONTEXT_MIN), card.context)
    if context > default and need_bytes(card, context=context) > budget_bytes:
        return default
    return context


def launch_slots(wanted: Wanted | None, own: Wanted | None, default: int) -> int:
    """Requests that the engine of a model works on at once.

    Args:
        wanted: What the wishes for the model come to, if there are any; bounded here.
        own: The wish of the node that runs it, which it meets in full.
        default: Where no wish says otherwise.
    """
    if wanted is None or not wanted.slots:
        return default
    return max(min(wanted.slots, SLOTS_FOR_OTHERS_MAX), own.slots if own else 0)


def facts_of(view: MeshView, dead: Iterable[NodeId]) -> Facts:
    """The facts behind a plan.

    A claim about a model counts for the node that makes it: what a copy takes on a node follows
    from that node's own card. Where one figure is needed for the model, it is the low median of
    its holders', which no single one of three can move. Of one owner's wish only one copy counts,
    and no wish goes before another: who may ask for more is a matter of roles.

    Args:
        view: What the records say.
        dead: Nodes to do without.
    """
    gone = view.removed.union(dead)
    alive = {node: one for node, one in view.nodes.items() if node not in gone}
    needs: dict[ModelDigest, dict[NodeId, int]] = {}
    wishes = agreed(view)
    for node, one in alive.items():
        budget = one.caps.budget_bytes if one.caps else 0
        for digest, held in one.held.items():
            context = launch_context(wishes.get(digest), held.card, budget)
            needs.setdefault(digest, {})[node] = need_bytes(held.card, context=context)
    owners = Counter(want.wanted.digest for want in view.wants)
    return Facts(
        nodes=tuple(
            NodeFacts(node=node, budget_bytes=one.caps.budget_bytes)
            for node, one in alive.items()
            if one.caps is not None
        ),
        models=tuple(
            ModelFacts(
                digest=digest,
                need_bytes=median_low(by_holder.values()),
                holders=tuple(by_holder),
                fallback=digest in view.demos,
                own_needs=tuple(by_holder.items()),
            )
            for digest, by_holder in needs.items()
        ),
        wants=tuple(
            Want(
                owner=want.owner,
                digest=want.wanted.digest,
                replicas=min(want.wanted.replicas, owners[want.wanted.digest]),
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

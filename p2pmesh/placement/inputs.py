"""From what the mesh says to the facts that placement may depend on.

Pure. Everything here comes from signed records, so nodes with the same records have the same
facts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median_low

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import Card, Family, ModelDigest, family_of, need_bytes
from p2pmesh.models.claims import Claims, agreed, vouched
from p2pmesh.models.parts import WHOLE
from p2pmesh.placement.distance import FARTHEST
from p2pmesh.placement.facts import (
    ModelFacts,
    NodeFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
)
from p2pmesh.placement.shape import Shape, shape_of
from p2pmesh.state.registers import ModelRequest
from p2pmesh.state.views import MeshView, ModelView, NodeView

CONTEXT_DEFAULT_MAX = 32768  # more is a wish: it costs memory that few conversations need
CONTEXT_MIN = 512  # fewer tokens than a system prompt has are of no use to anybody else
SLOTS_FOR_OTHERS_MAX = 16  # each costs threads and buffers of the node that serves


def default_context(card: Card) -> int:
    """Tokens of context when nobody asked for another number."""
    return min(card.context, CONTEXT_DEFAULT_MAX)


def launch_context(wanted: ModelRequest | None, card: Card, budget_bytes: int) -> int:
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


def pipeline_context(wanted: ModelRequest | None, card: Card) -> int:
    """Tokens of context of a pipeline: `launch_context`, but never more than the default.

    How much would still fit depends on which nodes share it, and they on how much it takes.
    """
    return launch_context(wanted, card, 0)


def part_context(name: str, wanted: ModelRequest | None, card: Card, budget_bytes: int) -> int:
    """Tokens of context of a part by its name: `launch_context` or `pipeline_context`."""
    if name == WHOLE:
        return launch_context(wanted, card, budget_bytes)
    return pipeline_context(wanted, card)


def launch_slots(wanted: ModelRequest | None, own: ModelRequest | None, default: int) -> int:
    """Requests that the engine of a model works on at once.

    Args:
        wanted: What the wishes for the model come to, if there are any; bounded here.
        own: The wish of the node that runs it, which it meets in full.
        default: Where no wish says otherwise.
    """
    if wanted is None or not wanted.slots:
        return default
    return max(min(wanted.slots, SLOTS_FOR_OTHERS_MAX), own.slots if own else 0)


class InputsReader:
    """Makes the inputs of placement out of views, one model and one node at a time.

    A claim about a model counts for the node that makes it: what a copy takes on a node follows
    from that node's own card. Where one figure is needed for the model, it is the low median of
    its holders', which no single one of three can move. Of one owner's wish only one copy counts,
    and no wish goes before another: who may ask for more is a matter of roles.
    """

    def __init__(self) -> None:
        self._gone: frozenset[NodeId] = frozenset()
        self._nodes: dict[NodeId, tuple[NodeView, NodeFacts]] = {}
        self._models: dict[ModelDigest, tuple[ModelView, bool, _OfModel]] = {}

    def read(self, view: MeshView, dead: Iterable[NodeId]) -> PlacementInputs:
        """Return the inputs behind a plan; what did not change is what was returned before.

        Args:
            view: What the records say.
            dead: Nodes to do without.
        """
        gone = view.removed.union(dead)
        if gone != self._gone:
            self._gone = gone
            self._models.clear()
        models = [
            self._model(one, demo=digest in view.demos) for digest, one in view.models.items()
        ]
        models = _with_smaller(models)
        for cache, current in ((self._nodes, view.nodes), (self._models, view.models)):
            if len(cache) > 2 * len(current):
                cache.clear()
        return PlacementInputs.sorted(
            nodes=tuple(
                self._node(node)
                for node in view.nodes.values()
                if node.caps is not None and node.node not in gone
            ),
            models=tuple(one.facts for one in models if one.facts is not None),
            wants=tuple(want for one in models for want in one.wants),
            residents=tuple(resident for one in models for resident in one.residents),
        )

    def _node(self, node: NodeView) -> NodeFacts:
        known = self._nodes.get(node.node)
        if known is None or known[0] is not node:
            known = self._nodes[node.node] = node, _read_node(node)
        return known[1]

    def _model(self, model: ModelView, *, demo: bool) -> _OfModel:
        known = self._models.get(model.digest)
        if known is None or known[0] is not model or known[1] != demo:
            made = _read_model(model, self._gone, demo=demo)
            known = self._models[model.digest] = model, demo, made
        return known[2]


@dataclass(frozen=True, slots=True)
class _OfModel:
    """The part of the inputs that is about one model."""

    facts: ModelFacts | None
    wants: tuple[PlacementRequest, ...]
    residents: tuple[Resident, ...]
    family: Family | None


def facts_of(view: MeshView, dead: Iterable[NodeId]) -> PlacementInputs:
    """The inputs of placement, for one look; see `InputsReader`."""
    return InputsReader().read(view, dead)


def _read_node(node: NodeView) -> NodeFacts:
    assert node.caps is not None, "a node gives nothing before it has said what"
    return NodeFacts(
        node=node.node,
        budget_bytes=node.caps.budget_bytes,
        rpc=node.caps.rpc,
        may_head=node.credential is None or node.credential.stage,
        memory_mib_per_s=node.caps.memory_mib_per_s,
        confined=node.caps.confined,
        stage_bytes=node.caps.stage_bytes,
        measured=node.caps.measured,
        far=tuple((other, min(link, FARTHEST)) for other, link in node.caps.far),
    )


def _read_model(model: ModelView, gone: Collection[NodeId], *, demo: bool) -> _OfModel:
    owners = len(model.wishes)
    return _OfModel(
        _read_facts(model, gone, demo=demo),
        tuple(
            PlacementRequest(
                owner=one.owner,
                digest=model.digest,
                replicas=min(one.wanted.replicas, owners),
                split=one.wanted.split,
                moe=one.wanted.moe,
                divergence_max=one.wanted.divergence_max,
            )
            for one in model.wishes
        ),
        tuple(
            Resident(
                node=node.node,
                digest=model.digest,
                state="ready" if served.state == "ready" else "loading",
                name=served.name,
                stages=served.stages,
                shard=served.shard,
            )
            for node, served in model.replicas
            if node.node not in gone and served.state in ("ready", "loading")
        ),
        _family(model, gone),
    )


def _read_facts(model: ModelView, gone: Collection[NodeId], *, demo: bool) -> ModelFacts | None:
    """Return what holders say of a model; None when none is here."""
    digest = model.digest
    needs: dict[NodeId, int] = {}
    shapes: dict[NodeId, Shape] = {}
    experts: dict[NodeId, int] = {}
    said: list[Claims] = []
    # A model that fits on no node may be shared by several, and which fit is up to the plan.
    is_shared = model.wanted is not None or any(
        served.name != WHOLE for _, served in model.replicas
    )
    for node in model.holders:
        if node.node not in gone:
            card = node.held[digest].card
            context = launch_context(model.wanted, card, node.budget_bytes)
            needs[node.node] = need_bytes(card, context=context)
            if is_shared:
                context = pipeline_context(model.wanted, card)
                shapes[node.node] = shape_of(card, context=context)
                experts[node.node] = min(card.expert_bytes, card.size_bytes)
                said.append(node.held[digest].qualities)
    if not needs:
        return None
    known, sure = agreed(said), vouched(said)
    return ModelFacts(
        digest=digest,
        need_bytes=median_low(needs.values()),
        holders=tuple(needs),
        fallback=demo,
        own_needs=tuple(needs.items()),
        shapes=tuple(shapes.items()),
        expert_bytes=tuple(experts.items()) if any(experts.values()) else (),
        qualities=tuple(one for one in known if one[:2] in sure),
        hearsay=tuple(one for one in known if one[:2] not in sure),
        failing=tuple(
            node.node
            for node, served in model.replicas
            if served.state == "failed" and node.node not in gone
        ),
    )


def _family(model: ModelView, gone: Collection[NodeId]) -> Family | None:
    """Return the family of a model by its first holder; None without experts."""
    cards = (one.held[model.digest].card for one in model.holders if one.node not in gone)
    card = next(cards, None)
    return None if card is None else family_of(card)


def _with_smaller(models: list[_OfModel]) -> list[_OfModel]:
    """Tell each wanted model of experts which smaller quantisations of it are there."""
    families: dict[Family, list[ModelFacts]] = {}
    for one in models:
        if one.family is not None and one.facts is not None:
            families.setdefault(one.family, []).append(one.facts)
    if all(len(members) == 1 for members in families.values()):
        return models
    return [_told_smaller(one, families) for one in models]


def _told_smaller(one: _OfModel, families: Mapping[Family, list[ModelFacts]]) -> _OfModel:
    if one.family is None or one.facts is None or not one.wants:
        return one
    need_bytes = one.facts.need_bytes
    smaller = [other for other in families[one.family] if other.need_bytes < need_bytes]
    smaller.sort(key=lambda other: (-other.need_bytes, other.digest))
    digests = tuple(other.digest for other in smaller if not other.fallback)
    return replace(one, facts=replace(one.facts, smaller=digests))

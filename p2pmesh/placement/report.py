"""A plan with the figures that people ask about: who runs what, what it takes, how fast it is.

Pure. Speeds are predictions by the cost that pipelines are chosen by (`pipeline.token_us`): the
weights of the layers read once per token, and the hops between stages. Attention, the output layer
and the engine's own work come on top, so a prediction is an upper estimate of the speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import Shard
from p2pmesh.placement.assignment import Assignment, Reason
from p2pmesh.placement.distance import Distances
from p2pmesh.placement.facts import ModelFacts, NodeFacts, PlacementInputs
from p2pmesh.placement.layout import Experts, Pipeline
from p2pmesh.placement.pipeline import Candidate, token_us
from p2pmesh.placement.plan import Plan
from p2pmesh.placement.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """A part of a layout.

    Attributes:
        name: Of the part; `part` in the records.
        first_layer: Counted from 0; a whole model begins there too.
        last_layer: Is one of them; -1 where the model does not tell its layers.
        need_bytes: Memory that the part takes.
        read_us: Time to read its weights once, for each token; 0 when it is not known.
        shard: What it holds of the experts; None where that is all.
    """

    node: NodeId
    name: str
    first_layer: int
    last_layer: int
    need_bytes: int
    read_us: int
    shard: Shard | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """A model as the plan has it served.

    Attributes:
        parts: In the order of the layout; whole copies work beside each other.
        link_us: Time that a token spends between the stages of a pipeline.
        token_us: Predicted time of a token, of the fastest copy; 0 when it is not known.
        token_us_max: The same of the slowest copy.
    """

    assignment: Assignment
    parts: tuple[PartReport, ...]
    link_us: int
    token_us: int
    token_us_max: int

    @property
    def digest(self) -> ModelDigest:
        """Return which model it is."""
        return self.assignment.digest

    @property
    def is_pipeline(self) -> bool:
        """Whether its parts are stages of one pipeline."""
        return isinstance(self.assignment.layout, Pipeline)

    @property
    def layout(self) -> str:
        """Return `whole`, `pipeline` or `experts`; `none` without a place."""
        return str(self.assignment.layout.decision()[0]) if self.parts else "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """A node as the plan uses it.

    Attributes:
        used_bytes: Memory that its parts take.
        parts: With the models that they are parts of, the most important first.
    """

    facts: NodeFacts
    used_bytes: int
    parts: tuple[tuple[ModelDigest, PartReport], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole plan.

    Attributes:
        models: In the order of the plan.
        nodes: Sorted by id.
    """

    plan: Plan
    models: tuple[ModelReport, ...]
    nodes: tuple[NodeReport, ...]


class Lack(StrEnum):
    """A thing that keeps a node from running a model, or a stage of it."""

    FILE = "file"
    MEMORY = "memory"
    ENGINE = "engine"
    RIGHT = "right"
    LOAD = "load"  # one that does not fail


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidacy:
    """A node as a place for one model.

    Attributes:
        need_bytes: What a copy takes there, or the smallest stage where a pipeline is wanted.
        free_bytes: What the other models of the plan leave there.
        lacks: What is missing; empty for a node that could run it, or does.
    """

    node: NodeId
    holds: bool
    runs: bool
    need_bytes: int
    free_bytes: int
    lacks: tuple[Lack, ...]

    @property
    def missing_bytes(self) -> int:
        """Return how much memory it lacks."""
        return max(self.need_bytes - self.free_bytes, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A model that is served in another way by another plan; None where a plan has no such."""

    digest: ModelDigest
    before: ModelReport | None
    after: ModelReport | None


def report(facts: PlacementInputs, plan: Plan, shapes: Mapping[ModelDigest, Shape]) -> Report:
    """Return the figures of a plan.

    Args:
        facts: What the plan was made from.
        plan: The plan.
        shapes: What a token reads of each model, as far as that is known.
    """
    nodes = {one.node: one for one in facts.nodes}
    described = {one.digest: one for one in facts.models}
    models = tuple(
        _model(one, described.get(one.digest), nodes, shapes.get(one.digest))
        for one in plan.assignments
    )
    parts: dict[NodeId, list[tuple[ModelDigest, PartReport]]] = {node: [] for node in nodes}
    for model in models:
        for part in model.parts:
            parts[part.node].append((model.digest, part))
    return Report(
        plan=plan, models=models, nodes=tuple(_node(one, parts[one.node]) for one in facts.nodes)
    )


def differences(before: Report, after: Report) -> tuple[Difference, ...]:
    """Return the models that two plans serve in different ways, in the order of the first plan."""
    old = {one.digest: one for one in before.models}
    new = {one.digest: one for one in after.models}
    return tuple(
        Difference(digest=digest, before=old.get(digest), after=new.get(digest))
        for digest in {**old, **new}
        if _decision(old.get(digest)) != _decision(new.get(digest))
    )


def candidates(
    facts: PlacementInputs, made: Report, digest: ModelDigest, *, in_stages: bool | None = None
) -> list[Candidacy]:
    """Return every node as a place for a model, those that run it first, then by what they lack.

    Args:
        facts: What the plan was made from.
        made: The report of the plan.
        digest: A model of the plan.
        in_stages: Whether nodes are to run stages of it; None for what the plan has it do.
    """
    [model] = (one for one in made.models if one.digest == digest)
    described = next((one for one in facts.models if one.digest == digest), None)
    if described is None:
        described = ModelFacts(digest=digest, need_bytes=0, holders=())
    if in_stages is None:
        in_stages = model.is_pipeline or model.assignment.split > 1
    rpc = _head_rpc(facts, described) if in_stages else ""
    confined = frozenset(one.node for one in facts.nodes if one.confined and one.rpc == rpc)
    found = [
        _candidacy(one, described, digest, in_stages=in_stages, rpc=rpc, confined=confined)
        for one in made.nodes
    ]
    return sorted(found, key=lambda c: (not c.runs, len(c.lacks), c.missing_bytes, c.node))


def helps(
    facts: PlacementInputs, made: Report, digest: ModelDigest
) -> list[tuple[Lack, Candidacy]]:
    """Return what would help a model that is not served as it is wanted; arguments as above.

    That are nodes which lack one thing only, for each thing the node that lacks the least of it.
    """
    [assignment] = (one.assignment for one in made.models if one.digest == digest)
    if assignment.reason in (Reason.PLACED, Reason.UNWANTED, Reason.STANDBY):
        return []
    best = _single_lacks(candidates(facts, made, digest))
    if assignment.refusal is not None:  # a pipeline was looked for as well
        best = _single_lacks(candidates(facts, made, digest, in_stages=True)) | best
    return sorted(best.items())


def _single_lacks(found: Iterable[Candidacy]) -> dict[Lack, Candidacy]:
    best: dict[Lack, Candidacy] = {}
    for one in found:
        if len(one.lacks) == 1:
            best.setdefault(one.lacks[0], one)
    return best


def _model(
    assignment: Assignment,
    described: ModelFacts | None,
    nodes: Mapping[NodeId, NodeFacts],
    shape: Shape | None,
) -> ModelReport:
    parts = tuple(_parts(assignment, described, nodes, shape))
    reads = [one.read_us for one in parts]
    link_us, fastest, slowest = 0, min(reads, default=0), max(reads, default=0)
    if isinstance(assignment.layout, Pipeline) and shape is not None:
        stages = [
            (_reader(nodes[one.node]), one.first_layer, one.last_layer)
            for one in assignment.layout.stages
        ]
        head, *others = assignment.layout.nodes
        distances = Distances((one.node, one.far) for one in nodes.values())
        links = [distances.between(head, other) for other in others]
        fastest = slowest = token_us(shape, stages, links)
        link_us = fastest - sum(reads)
    return ModelReport(
        assignment=assignment,
        parts=parts,
        link_us=link_us,
        token_us=fastest,
        token_us_max=slowest,
    )


def _parts(
    assignment: Assignment,
    described: ModelFacts | None,
    nodes: Mapping[NodeId, NodeFacts],
    shape: Shape | None,
) -> Iterable[PartReport]:
    layout = assignment.layout
    last = len(shape.layer_reads) - 1 if shape else -1
    if isinstance(layout, Pipeline):
        places = [
            (one.node, one.first_layer, one.last_layer, one.need_bytes) for one in layout.stages
        ]
    elif isinstance(layout, Experts):
        places = [(one.node, 0, last, one.need_bytes) for one in layout.shards]
    else:
        need = described.need_on if described else lambda _: assignment.need_bytes
        places = [(node, 0, last, need(node)) for node in layout.nodes]
    for node, first, last, need_bytes in places:
        name = layout.part_on(node)
        assert name is not None, "a layout has a part for each of its nodes"
        yield PartReport(
            node=node,
            name=name,
            first_layer=first,
            last_layer=last,
            need_bytes=need_bytes,
            read_us=token_us(shape, [(_reader(nodes[node]), first, last)]) if shape else 0,
            shard=layout.shard_on(node) if isinstance(layout, Experts) else None,
        )


def _reader(node: NodeFacts) -> Candidate:
    """Return a node as far as the cost of a token depends on it."""
    return Candidate(
        node=node.node,
        budget_bytes=node.budget_bytes,
        room_bytes=node.budget_bytes,
        rpc=node.rpc,
        memory_mib_per_s=node.memory_mib_per_s,
    )


def _node(facts: NodeFacts, parts: Iterable[tuple[ModelDigest, PartReport]]) -> NodeReport:
    own = tuple(parts)
    return NodeReport(facts=facts, used_bytes=sum(p.need_bytes for _, p in own), parts=own)


def _candidacy(
    node: NodeReport,
    model: ModelFacts,
    digest: ModelDigest,
    *,
    in_stages: bool,
    rpc: str,
    confined: frozenset[NodeId],
) -> Candidacy:
    facts = node.facts
    mine = [part.need_bytes for other, part in node.parts if other == digest]
    free_bytes = facts.budget_bytes - node.used_bytes + sum(mine)
    holds = facts.node in model.holders
    need_bytes = _smallest_stage(model) if in_stages else model.need_on(facts.node)
    missing = {
        # A stage needs no file: the head sends it.
        Lack.FILE: not holds and not in_stages,
        Lack.MEMORY: free_bytes < need_bytes,
        Lack.ENGINE: in_stages and (not facts.rpc or facts.rpc != rpc),
        # Nodes that confine stages take those of any head.
        Lack.RIGHT: in_stages and holds and not facts.may_head and not confined - {facts.node},
        Lack.LOAD: facts.node in model.failing,
    }
    return Candidacy(
        node=facts.node,
        holds=holds,
        runs=bool(mine),
        need_bytes=need_bytes,
        free_bytes=free_bytes,
        lacks=() if mine else tuple(lack for lack, lacks in missing.items() if lacks),
    )


def _smallest_stage(model: ModelFacts) -> int:
    """Return what the smallest stage takes that is not the head, by the first card."""
    shapes = [shape for _, shape in model.shapes if shape.layer_bytes]
    return shapes[0].stage_bytes + min(shapes[0].layer_bytes) if shapes else model.need_bytes


def _head_rpc(facts: PlacementInputs, model: ModelFacts) -> str:
    """Return the RPC build that most nodes share with a holder of the model, or with each other."""
    builds = [one.rpc for one in facts.nodes if one.rpc]
    of_holders = {one.rpc for one in facts.nodes if one.rpc and one.node in model.holders}
    return max(of_holders or builds, key=lambda rpc: (builds.count(rpc), rpc), default="")


def _decision(model: ModelReport | None) -> object:
    return None if model is None else model.assignment.decision()

"""The plan of the mesh as plain values: what was decided, why, and what other nodes would change.

Answers come from what the plan itself was made of. They are computed in a thread, because those of
a large mesh take longer than the event loop may stand still, and change nothing.
All sizes are bytes and all times microseconds, with the unit in the name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import trio

from p2pmesh.config import parse_size
from p2pmesh.engine.speed import read_speed
from p2pmesh.errors import ConfigError
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.catalogue import AmbiguousModel, UnknownModel
from p2pmesh.models.parts import PartId, ReplicaKey
from p2pmesh.node.authority import find_id
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.reconciler import Reconciler
from p2pmesh.placement.alternatives import Alternatives, alternatives
from p2pmesh.placement.explain import explain, explain_layers, explain_shards
from p2pmesh.placement.facts import PlacementInputs
from p2pmesh.placement.inputs import default_context
from p2pmesh.placement.plan import Plan, plan
from p2pmesh.placement.report import (
    Candidacy,
    Difference,
    ModelReport,
    NodeReport,
    PartReport,
    Report,
    candidates,
    differences,
    helps,
    report,
)
from p2pmesh.placement.shape import Shape, shape_of
from p2pmesh.placement.what_if import ImaginedNode, change, imagined_id
from p2pmesh.state.registers import MEMORY_MIB_PER_S_MAX
from p2pmesh.state.views import MeshView

WHAT_IF_MAX = 16
NAMED_MAX = 12  # models in an error
MIB = 2**20
US_PER_S = 1_000_000
WRITING = frozenset({"chat", "completion"})  # what models give that generate tokens
_HOW = "write remove=NODE, add=64GiB or add=64GiB:200GB/s"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What-ifs, as they were read.

    Attributes:
        sentences: What each asks, for a person.
    """

    removed: tuple[NodeId, ...] = ()
    added: tuple[ImaginedNode, ...] = ()
    sentences: tuple[str, ...] = ()


def parse_changes(texts: Iterable[str], names: Mapping[NodeId, str]) -> Changes:
    """Read what-ifs.

    Args:
        texts: Each `remove=NODE`, `add=SIZE` or `add=SIZE:SIZE/s`.
        names: Of the nodes that the plan counts on.

    Raises:
        ConfigError: One of them cannot be understood; the sentence says what is possible.
    """
    left, added, sentences = dict(names), list[ImaginedNode](), list[str]()
    removed: list[NodeId] = []
    for text in texts:
        what, _, value = text.partition("=")
        match what.strip():
            case "remove":
                labels = {bytes(node): name for node, name in left.items()}
                node = NodeId(find_id(value, labels, "node in the plan"))
                removed.append(node)
                sentences.append(f"without {left.pop(node)}")
            case "add":
                added.append(_parse_node(text, value))
                sentences.append(f"with another node of {value.strip()}")
            case _:
                raise ConfigError(f"--what-if {text!r} is not understood: {_HOW}")
    return Changes(removed=tuple(removed), added=tuple(added), sentences=tuple(sentences))


def _parse_node(text: str, value: str) -> ImaginedNode:
    size, colon, speed = value.partition(":")
    try:
        budget_bytes = parse_size(size)
        if not colon:
            return ImaginedNode(budget_bytes=budget_bytes)
        if not speed.strip().endswith("/s"):
            raise ValueError(f"{speed!r} is no speed")
        mib_per_s = parse_size(speed.strip().removesuffix("/s")) // MIB
        if not 0 < mib_per_s <= MEMORY_MIB_PER_S_MAX:
            raise ValueError(f"{speed!r} is no speed that memory can have")
    except ValueError as exc:
        raise ConfigError(f"--what-if {text!r}: {exc}; {_HOW}") from exc
    return ImaginedNode(budget_bytes=budget_bytes, memory_mib_per_s=mib_per_s)


class PlanReporter:
    """Answers questions about the plan of one mesh.

    Args:
        mesh: Which one.
        reconciler: Has the plan.
        engines: What runs on this node.
    """

    def __init__(self, mesh: Mesh, reconciler: Reconciler, engines: EngineManager) -> None:
        self._mesh, self._reconciler, self._engines = mesh, reconciler, engines

    async def answer(self, *, explained: str | None, what_if: Sequence[str]) -> dict[str, Any]:
        """Return the plan, one model in full where asked, and what changes would lead to.

        Args:
            explained: A model by id, name or digest; None for none.
            what_if: See `parse_changes`.

        Raises:
            ConfigError: The model is not known, or a what-if cannot be understood.
        """
        view, facts, made = self._mesh.view, self._reconciler.facts, self._reconciler.plan
        known = self._mesh.names
        names = {one.node: known.get(one.node) or show_id(one.node) for one in facts.nodes}
        shapes, present = await trio.to_thread.run_sync(
            partial(_report, view, facts, made), abandon_on_cancel=True
        )
        digest = None if explained is None else _find_model(view, explained, present)
        changes = parse_changes(what_if, names)
        measured = await self._measured(present)
        shown = _Shown(view, names, self._mesh.me, measured)
        agreement = self._mesh.agreement
        answer = {
            "plan": {
                "digest": made.digest.hex(),
                "algorithm": made.algorithm,
                "agreed": agreement.same == agreement.asked,
                "asked_nodes": agreement.asked,
                "same_nodes": agreement.same,
            },
            "models": [shown.model(one) for one in present.models],
            "nodes": [shown.node(one) for one in present.nodes],
            "explained": None,
            "what_if": None,
        }
        if digest is not None:
            one = view.models.get(digest)
            others = await trio.to_thread.run_sync(
                partial(alternatives, facts, digest, one.card if one else None),
                abandon_on_cancel=True,
            )
            answer["explained"] = shown.explained(facts, present, digest, others)
        if what_if:
            answer["what_if"] = await self._changed(facts, present, changes, shapes, names)
        return answer

    async def _changed(
        self,
        facts: PlacementInputs,
        present: Report,
        changes: Changes,
        shapes: Mapping[ModelDigest, Shape],
        names: Mapping[NodeId, str],
    ) -> dict[str, Any]:
        """Return the differences that changes make to the present plan."""
        added = sorted(changes.added)
        imagined = {imagined_id(n): f"imagined-{n}" for n in range(1, len(added) + 1)}
        changed = change(facts, removed=changes.removed, added=added)
        other = await trio.to_thread.run_sync(plan, changed, abandon_on_cancel=True)
        after = await trio.to_thread.run_sync(report, changed, other, shapes)
        shown = _Shown(self._mesh.view, {**names, **imagined}, self._mesh.me, {})
        was = {one.facts.node: one for one in present.nodes}
        return {
            "changes": list(changes.sentences),
            "digest": other.digest.hex(),
            "models": [shown.difference(one) for one in differences(present, after)],
            "nodes": [
                {
                    **shown.node(one),
                    "used_bytes_before": was[one.facts.node].used_bytes
                    if one.facts.node in was
                    else 0,
                }
                for one in after.nodes
            ],
        }

    async def _measured(self, present: Report) -> dict[ReplicaKey, float]:
        """Return how many tokens per second engines wrote, by node and part.

        Those of this node are asked for the present figure, the others tell theirs now and then.
        """
        found = {
            ReplicaKey(node.node, part): _two_digits(US_PER_S / one.token_us)
            for node in self._mesh.view.nodes.values()
            for part, one in node.serves.items()
            if one.token_us
        }
        paths = {
            (part := PartId(model.digest, one.name)): self._engines.log_path(part)
            for model in present.models
            for one in model.parts
            if one.node == self._mesh.me
        }
        for part, path in paths.items():
            if path is None:
                continue
            try:
                speed = await trio.to_thread.run_sync(read_speed, path)
            except OSError as exc:
                log.warning("engine_log_unreadable", path=str(path), reason=str(exc))
                continue
            if speed is not None:
                found[ReplicaKey(self._mesh.me, part)] = _two_digits(speed)
        return found


class _Shown:
    """Makes plain values of reports, with the names that people use."""

    def __init__(
        self,
        view: MeshView,
        names: Mapping[NodeId, str],
        me: NodeId,
        measured: Mapping[ReplicaKey, float],
    ) -> None:
        self._view, self._names, self._me, self._measured = view, names, me, measured

    def model(self, one: ModelReport) -> dict[str, Any]:
        """Return a model with its layout, the reason for it, and its speed."""
        assignment = one.assignment
        writes = self._writes(one.digest)
        return {
            "id": self._id(one.digest),
            "digest": one.digest,
            "layout": one.layout,
            "reason": assignment.reason.value,
            "sentence": explain(assignment, self._name),
            "copies": assignment.copies,
            "split_nodes": assignment.split,
            "need_bytes": assignment.need_bytes,
            "parts": [self._part(one.digest, part) for part in one.parts],
            "link_us": one.link_us,
            "token_us": one.token_us,
            "predicted_tokens_per_s": _rate(one.token_us) if writes else None,
            "predicted_tokens_per_s_min": _rate(one.token_us_max) if writes else None,
        }

    def node(self, one: NodeReport) -> dict[str, Any]:
        """Return a node with its memory and its parts."""
        facts = one.facts
        return {
            "id": show_id(facts.node),
            "name": self._name(facts.node),
            "self": facts.node == self._me,
            "imagined": facts.node not in self._view.nodes,
            "budget_bytes": facts.budget_bytes,
            "used_bytes": one.used_bytes,
            "memory_mib_per_s": facts.memory_mib_per_s,
            "rpc": facts.rpc,
            "may_head": facts.may_head,
            "confined": facts.confined,
            "parts": [
                {"model": self._id(digest), **self._part(digest, part)}
                for digest, part in one.parts
            ],
        }

    def explained(
        self,
        facts: PlacementInputs,
        present: Report,
        digest: ModelDigest,
        others: Alternatives | None,
    ) -> dict[str, Any]:
        """Return everything about one model."""
        [model] = (one for one in present.models if one.digest == digest)
        found = candidates(facts, present, digest)
        return {
            **self.model(model),
            "candidates": [self._candidate(one) for one in found],
            "helps": [
                {"lack": lack.value, **self._candidate(one)}
                for lack, one in helps(facts, present, digest)
            ],
            "alternatives": None if others is None else self._alternatives(others),
        }

    def _alternatives(self, others: Alternatives) -> dict[str, Any]:
        """Return how else a model of experts could be served."""
        fits = others.fits
        return {
            "experts": explain_shards(others.experts, self._name),
            "layers": explain_layers(others.layers, self._name),
            "smaller": [self._id(one) for one in others.smaller],
            "fits": None
            if fits is None
            else {
                "name": self._name(fits.node),
                "size_bytes": fits.size_bytes,
                "quantisation": fits.name,
            },
        }

    def difference(self, one: Difference) -> dict[str, Any]:
        """Return how a model is served before and after."""
        return {
            "id": self._id(one.digest),
            "digest": one.digest,
            "before": None if one.before is None else self.model(one.before),
            "after": None if one.after is None else self.model(one.after),
        }

    def _part(self, digest: ModelDigest, one: PartReport) -> dict[str, Any]:
        return {
            "node": show_id(one.node),
            "name": self._name(one.node),
            "part": one.name,
            "first_layer": one.first_layer,
            "last_layer": one.last_layer,
            "experts": None if one.shard is None else one.shard.described(),
            "need_bytes": one.need_bytes,
            "read_us": one.read_us,
            "measured_tokens_per_s": self._measured.get(
                ReplicaKey(one.node, PartId(digest, one.name))
            ),
        }

    def _candidate(self, one: Candidacy) -> dict[str, Any]:
        return {
            "node": show_id(one.node),
            "name": self._name(one.node),
            "holds": one.holds,
            "runs": one.runs,
            "need_bytes": one.need_bytes,
            "free_bytes": one.free_bytes,
            "missing_bytes": one.missing_bytes,
            "lacks": [lack.value for lack in one.lacks],
        }

    def _writes(self, digest: ModelDigest) -> bool:
        """Whether the model generates tokens, so that it has a speed."""
        model = self._view.models.get(digest)
        card = model.card if model else None
        return card is None or not card.gives.isdisjoint(WRITING)

    def _id(self, digest: ModelDigest) -> str:
        model = self._view.models.get(digest)
        named = model is not None and (model.card or model.wishes)
        return self._view.catalogue.id_of(digest) if named else digest

    def _name(self, node: NodeId) -> str:
        return self._names.get(node) or show_id(node)


def _report(
    view: MeshView, facts: PlacementInputs, made: Plan
) -> tuple[dict[ModelDigest, Shape], Report]:
    shapes = _shapes(view)
    return shapes, report(facts, made, shapes)


def _shapes(view: MeshView) -> dict[ModelDigest, Shape]:
    return {
        digest: shape_of(model.card, context=default_context(model.card))
        for digest, model in view.models.items()
        if model.card is not None
    }


def _find_model(view: MeshView, text: str, present: Report) -> ModelDigest:
    """Return the model of the plan that a person means; raises as `PlanReporter.answer`."""
    planned = {one.digest for one in present.models} & view.models.keys()
    try:
        digest = view.catalogue.resolve(text)
    except AmbiguousModel as exc:
        raise ConfigError(str(exc)) from exc
    except UnknownModel as exc:
        raise ConfigError(f"no model here is called {text!r}; {_some(view, planned)}") from exc
    if digest not in planned:
        raise ConfigError(f"{text!r} is in no plan yet; {_some(view, planned)}")
    return digest


def _some(view: MeshView, planned: Iterable[ModelDigest]) -> str:
    """Name models of the plan, not more than a person reads."""
    ids = sorted(map(view.catalogue.id_of, planned))
    more = f" and {len(ids) - NAMED_MAX} more" if len(ids) > NAMED_MAX else ""
    return f"the plan has {', '.join(ids[:NAMED_MAX])}{more}" if ids else "the plan has no model"


def _rate(token_us: int) -> float | None:
    return _two_digits(US_PER_S / token_us) if token_us else None


def _two_digits(value: float) -> float:
    """31.4 -> 31.0: what an estimate is worth, and what does not change all the time."""
    return float(f"{value:.2g}")

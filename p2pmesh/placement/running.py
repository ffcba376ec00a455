"""What runs by the facts, by model: whole copies, pipelines and shards. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import WHOLE, StageRange, parse_stage, unit_id
from p2pmesh.placement.facts import NodeFacts, PlacementInputs, Resident, ResidentState


class Running:
    """The parts that run on live nodes."""

    def __init__(self, facts: PlacementInputs) -> None:
        live = {part.node for part in facts.nodes}
        self._copies: dict[tuple[ModelDigest, str], list[NodeId]] = {}
        self._units: dict[ModelDigest, dict[tuple[StageRange, ...], list[str]]] = {}
        self._shards: dict[ModelDigest, dict[NodeId, Resident]] = {}
        for part in facts.residents:
            if part.node not in live:
                continue
            if part.name == WHOLE:
                self._copies.setdefault((part.digest, part.state), []).append(part.node)
            elif part.shard is not None:
                # Of two on one node, in the order of the facts, the later one that is ready.
                shards = self._shards.setdefault(part.digest, {})
                if part.node not in shards or part.state == "ready":
                    shards[part.node] = part
            elif _is_own_stage(part):
                units = self._units.setdefault(part.digest, {})
                units.setdefault(part.stages, []).append(part.state)

    def copies(self, digest: ModelDigest, state: ResidentState) -> Sequence[NodeId]:
        """Return the nodes on which a whole copy is in this state."""
        return self._copies.get((digest, state), [])

    def units(self, digest: ModelDigest) -> list[tuple[StageRange, ...]]:
        """Return the pipelines of which a stage runs, that with the most ready stages first."""
        units = self._units.get(digest, {})
        return sorted(
            units, key=lambda u: (-units[u].count("ready"), -len(units[u]), unit_id(digest, u))
        )

    def shards(self, digest: ModelDigest) -> Mapping[NodeId, Resident]:
        """Return the shard that each node runs."""
        return self._shards.get(digest, {})


def _is_own_stage(part: Resident) -> bool:
    """Whether a resident is a stage, of a unit that has it on this very node."""
    stage = parse_stage(part.name)
    if stage is None or stage.number >= len(part.stages):
        return False
    return part.stages[stage.number].node == part.node


def may_share(nodes: Sequence[NodeFacts | None]) -> bool:
    """Whether live nodes, the head first, may be one pipeline."""
    head, *others = nodes
    if head is None or not head.rpc:
        return False
    return all(
        one is not None and one.rpc == head.rpc and (head.may_head or one.confined)
        for one in others
    )

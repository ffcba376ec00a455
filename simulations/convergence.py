"""The differences between the nodes' views and the truth: none, once the mesh has settled.

All that is judged here follows from documents, so of nodes with equal ones only the first is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import StrEnum
from typing import Any

from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from p2pmesh.state.registers import (
    Caps,
    HeldModel,
    held_from_wire,
    serves_from_wire,
    wants_from_wire,
)
from p2pmesh.wire.registers import CAPS, MEMBER, SERVING, WANTS
from simulations.future_protocol import MODALITY, NEWER, newer_words
from simulations.node import Node
from simulations.world import World


class Gap(StrEnum):
    """A kind of difference."""

    STATE = "state"  # two live nodes hold different facts
    TWINS = "twins"  # two nodes still run with one key
    ABSENT = "absent"  # a live node is unknown, or known by an earlier life
    LOST = "lost"  # something that a live node says is not known in its exact bytes
    WRONGED = "wronged"  # a live node is removed
    GHOST = "ghost"  # a dead node is counted on
    FORKED = "forked"  # of a key that was used for two values nobody holds the proof


READERS: dict[str, Callable[[dict[str, Any]], object]] = {
    CAPS: Caps.from_wire,
    SERVING: serves_from_wire,
    WANTS: wants_from_wire,
}

FRESH_S = 20.0  # a proof is kept at least as long as it keeps its owner out of placement


def counts_on(core: Gossip, node: NodeId) -> bool:
    """Whether a core takes part of the mesh to be with `node`."""
    return core.document.get(node, MEMBER) is not None and node not in core.removed


def unsettled(world: World) -> Iterator[tuple[Gap, str]]:
    """Return what still differs, each with where."""
    nodes = world.honest
    first: dict[bytes, tuple[Node, Gossip]] = {}
    for node in nodes:
        if node.core is not None:
            first.setdefault(node.core.document.fingerprint, (node, node.core))
    if len(first) > 1:
        yield Gap.STATE, f"there are {len(first)} different fingerprints"
    living = {node.id: node for node in nodes}
    if len(living) < len(nodes):
        yield Gap.TWINS, "two nodes run with one key"
    down = [node for node in world.down if not node.hostile and node.instance]
    for node, core in first.values():
        for other in living.values():
            yield from _misjudged(node, core, other, _instances(world, other.id))
        for other in down:
            if counts_on(core, other.id):
                text = f"node {node.number} does not know that node {other.number} is gone"
                yield Gap.GHOST, text
        for other_id, at in world.forked.items():
            known = core.document.get(other_id, MEMBER) is not None
            if known and world.schedule.now - at < FRESH_S and not core.document.forks(other_id):
                yield Gap.FORKED, f"node {node.number} has no proof of a fork"


def misread(world: World) -> Iterator[str]:
    """Describe the parts of a newer node's bodies that a node of this version misreads.

    Every register of a newer node has rows, columns, fields and values of its own beside what this
    version knows; all that it knows has to be read from it as from a node of this version.
    """
    for node in world.honest:
        for other in world.honest:
            for register, plain in other.bodies.items() if node.core is not None else ():
                assert node.core is not None
                record = node.core.document.get(other.id, register)
                if NEWER not in other.versions or record is None:
                    continue
                if record.body != newer_words(plain):  # it says something else by now
                    continue
                reader = READERS.get(register, held_from_wire)
                if list(_rows(reader(record.body))) != list(_rows(reader(plain))):
                    yield f"node {node.number} misreads {register} of node {other.number}"


def _rows(read: object) -> Iterator[object]:
    """Return the rows that were read, without a newer node's modality, which is kept."""
    for row in read if isinstance(read, Iterable) else [read]:
        if isinstance(row, HeldModel):
            yield replace(row, card=replace(row.card, takes=row.card.takes - {MODALITY}))
        else:
            yield row


def _misjudged(
    node: Node, core: Gossip, other: Node, instances: set[int]
) -> Iterator[tuple[Gap, str]]:
    record = core.document.get(other.id, MEMBER)
    if record is None or record.instance not in instances:
        yield Gap.ABSENT, f"node {node.number} does not know node {other.number} as it is"
    elif other.id in core.removed:
        yield Gap.WRONGED, f"node {node.number} takes node {other.number} for dead"
    elif other.core is not None and _raws(core.document, other) != _raws(
        other.core.document, other
    ):
        yield Gap.LOST, f"node {node.number} does not know all that node {other.number} says"


def _raws(document: Document, owner: Node) -> list[bytes]:
    return [record.raw for record in document.registers(owner.id)]


def _instances(world: World, node: NodeId) -> set[int]:
    return {other.instance for other in world.running(node)}

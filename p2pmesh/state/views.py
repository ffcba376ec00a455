"""The document as everybody else reads it: who is here, what they hold, serve and want.

Pure. A body that does not read is left out, so one node's nonsense is only its own loss. Views
are values: made anew when the document changes, never changed themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from p2pmesh.errors import PeerError
from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import Card, ModelDigest
from p2pmesh.models.catalogue import Catalogue, Named
from p2pmesh.state.bodies import (
    CAPS,
    HELD_PAGES_MAX,
    MEMBER,
    SERVES,
    WANTS,
    Caps,
    Held,
    Member,
    Served,
    Wanted,
    held_from_wire,
    held_register,
    serves_from_wire,
    wants_from_wire,
)
from p2pmesh.state.document import Document
from p2pmesh.wire.records import Record

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """One node, as it says of itself.

    Attributes:
        member: Its name and addresses.
        caps: What it can give; None until that record came.
        serves: What it runs, by model.
        held: The models whose files it has.
    """

    node: NodeId
    member: Member
    caps: Caps | None
    serves: Mapping[ModelDigest, Served]
    held: Mapping[ModelDigest, Held]


@dataclass(frozen=True, slots=True, kw_only=True)
class WantView:
    """One wish; it counts although its owner is away."""

    owner: NodeId
    wanted: Wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshView:
    """Everything, sorted.

    Attributes:
        nodes: Members that have not said goodbye, by id; also those that a certificate removes,
            which `Document.removed` names.
        wants: Every wish that still counts.
        cards: What is known of each model that somebody holds.
        demos: Which of them are the embedded demonstration model.
        catalogue: What the models are called: all that are held or wanted.
    """

    nodes: Mapping[NodeId, NodeView]
    wants: tuple[WantView, ...]
    cards: Mapping[ModelDigest, Card]
    demos: frozenset[ModelDigest]
    catalogue: Catalogue

    def name_of(self, node: NodeId) -> str:
        """What people call a node; "?" when it is not here."""
        view = self.nodes.get(node)
        return view.member.name if view else "?"


def read(document: Document, *, me: NodeId | None = None) -> MeshView:
    """The view of a document.

    Args:
        document: What is known.
        me: The reader, who is here until it is gone, whatever it has said to others.
    """
    nodes: dict[NodeId, NodeView] = {}
    wants: list[WantView] = []
    cards: dict[ModelDigest, Card] = {}
    demos: set[ModelDigest] = set()
    names: list[Named] = []
    for owner in document.owners:
        for wanted in _read(document.get(owner, WANTS), wants_from_wire) or ():
            wants.append(WantView(owner=owner, wanted=wanted))
            names.append(Named(digest=wanted.digest, stem=wanted.stem))
        member = _read(document.get(owner, MEMBER), Member.from_wire)
        if member is None or (member.left and owner != me):
            continue
        held = {one.digest: one for one in _held(document, owner)}
        served = _read(document.get(owner, SERVES), serves_from_wire) or ()
        nodes[owner] = NodeView(
            node=owner,
            member=member,
            caps=_read(document.get(owner, CAPS), Caps.from_wire),
            serves={one.digest: one for one in served},
            held=held,
        )
        for one in held.values():
            # Owners could describe one digest differently; the first owner's word counts for all.
            cards.setdefault(one.digest, one.card)
            names.append(Named(digest=one.digest, stem=one.stem, name=one.card.name))
            if one.demo:
                demos.add(one.digest)
    return MeshView(
        nodes=nodes,
        wants=tuple(wants),
        cards=cards,
        demos=frozenset(demos),
        catalogue=Catalogue(names),
    )


def _held(document: Document, owner: NodeId) -> Iterator[Held]:
    for page in range(HELD_PAGES_MAX):
        record = document.get(owner, held_register(page))
        yield from _read(record, lambda body: tuple(held_from_wire(body))) or ()


def _read(record: Record | None, reader: Callable[[dict[str, object]], T]) -> T | None:
    if record is None or not record.body:  # an empty body withdraws the register
        return None
    try:
        return reader(record.body)
    except PeerError:
        return None

"""The document as everybody else reads it: who is here, what they hold, serve and want.

Pure. A body that does not read is left out, so one node's nonsense is only its own loss. Nothing
that a removed node said of models counts, and what a model is, this node takes from its own file
if it has one. Views are values: made anew when the document changes, never changed themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
        instance: Random per start of the node: another one has lost all that the old one had.
        member: Its name and addresses.
        caps: What it can give; None until that record came.
        serves: What it runs, by model.
        held: The models whose files it has.
    """

    node: NodeId
    instance: int
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
        removed: Those of them that a certificate removes.
        wants: Every wish that still counts.
        cards: The description of each model that somebody live holds: the reader's own; else that
            of the node that serves it, else of any that holds it; of several the smallest id's.
            For display and forwarding; placement asks each holder (`placement/inputs.py`).
        demos: The embedded demonstration model, as the reader itself has it.
        names: What live nodes call the models that they hold, and owners those that they want.
        catalogue: The names of them all.
    """

    nodes: Mapping[NodeId, NodeView]
    removed: frozenset[NodeId]
    wants: tuple[WantView, ...]
    cards: Mapping[ModelDigest, Card]
    demos: frozenset[ModelDigest]
    names: tuple[Named, ...]
    catalogue: Catalogue

    @property
    def live(self) -> Iterable[NodeView]:
        """The nodes that no certificate removes, by id."""
        return (one for node, one in self.nodes.items() if node not in self.removed)

    def name_of(self, node: NodeId) -> str:
        """What people call a node; "?" when it is not here."""
        view = self.nodes.get(node)
        return view.member.name if view else "?"


def read(document: Document, *, me: NodeId | None = None) -> MeshView:
    """The view of a document.

    Args:
        document: What is known.
        me: The reader, who is here until it is gone, whatever it has said to others, and who
            believes itself.
    """
    nodes: dict[NodeId, NodeView] = {}
    wants: list[WantView] = []
    for owner in document.owners:
        wanted = _read(document.get(owner, WANTS), wants_from_wire) or ()
        wants += [WantView(owner=owner, wanted=one) for one in wanted]
        record = document.get(owner, MEMBER)
        member = _read(record, Member.from_wire)
        if record is None or member is None or (member.left and owner != me):
            continue
        served = _read(document.get(owner, SERVES), serves_from_wire) or ()
        nodes[owner] = NodeView(
            node=owner,
            instance=record.instance,
            member=member,
            caps=_read(document.get(owner, CAPS), Caps.from_wire),
            serves={one.digest: one for one in served},
            held={one.digest: one for one in _held(document, owner)},
        )
    live = [one for owner, one in nodes.items() if owner not in document.removed]
    own = nodes[me].held if me in nodes else {}
    demos = frozenset(digest for digest, one in own.items() if one.demo)
    names = tuple(_names(live, wants, demos))
    return MeshView(
        nodes=nodes,
        removed=document.removed,
        wants=tuple(wants),
        cards=_cards(live, own),
        demos=demos,
        names=names,
        catalogue=Catalogue(names),
    )


def _cards(live: Iterable[NodeView], own: Mapping[ModelDigest, Held]) -> Mapping[ModelDigest, Card]:
    said: dict[ModelDigest, Card] = {}
    served: dict[ModelDigest, Card] = {}
    for node in live:
        for digest, one in node.held.items():
            said.setdefault(digest, one.card)
            if _is_ready(node, digest):
                served.setdefault(digest, one.card)
    return said | served | {digest: one.card for digest, one in own.items()}


def _names(
    live: Iterable[NodeView], wants: Iterable[WantView], demos: Collection[ModelDigest]
) -> Iterator[Named]:
    """All names, with claims: a model that is wanted before others, then one that is ready.

    Who only says that it has a file, or runs what nobody wants, takes no name from a model in use.
    """
    wanted = {want.wanted.digest for want in wants}.union(demos)
    for want in wants:
        yield Named(digest=want.wanted.digest, stem=want.wanted.stem, claim=2)
    for node in live:
        for digest, one in node.held.items():
            claim = 2 * (digest in wanted) + _is_ready(node, digest)
            yield Named(digest=digest, stem=one.stem, name=one.card.name, claim=claim)


def _is_ready(node: NodeView, digest: ModelDigest) -> bool:
    return digest in node.serves and node.serves[digest].state == "ready"


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

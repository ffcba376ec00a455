"""The document as everybody else reads it: who is here, what they hold, serve and want.

Pure. A body that does not read is left out, so one node's nonsense is only its own loss. Nothing
that a removed node said of models counts, and what a model is, this node takes from its own file
if it has one.

Views are values. When facts of some owners change, `MeshReader` reads those owners again and makes
a new view that shares with the last one all that stayed: whoever keeps something per node or per
model finds out by identity what to make anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from p2pmesh.errors import PeerError
from p2pmesh.identity.credentials import Credential
from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import Card, ModelDigest
from p2pmesh.models.catalogue import Catalogue, Named
from p2pmesh.models.parts import PartId
from p2pmesh.sharing import Sharing
from p2pmesh.state.document import Document
from p2pmesh.state.registers import (
    HELD_PAGES_MAX,
    Caps,
    HeldModel,
    Member,
    ModelRequest,
    Served,
    held_from_wire,
    held_register,
    serves_from_wire,
    wants_from_wire,
)
from p2pmesh.wire.codec import encode
from p2pmesh.wire.records import Record, credential_of
from p2pmesh.wire.registers import CAPS, MEMBER, SERVING, WANTS

T = TypeVar("T")

HELD_REGISTERS = tuple(held_register(page) for page in range(HELD_PAGES_MAX))


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """One node, as it says of itself.

    Attributes:
        instance: Random per start of the node: another one has lost all that the old one had.
        member: Its name and addresses.
        caps: What it can give; None until that record came.
        serves: What it runs.
        held: The models whose files it has.
        credential: What it may do; None in a mesh that asks for no credentials.
    """

    node: NodeId
    instance: int
    member: Member
    caps: Caps | None
    serves: Mapping[PartId, Served]
    held: Mapping[ModelDigest, HeldModel]
    credential: Credential | None = None

    @property
    def budget_bytes(self) -> int:
        """Memory that it gives to models; 0 until it has said so."""
        return self.caps.budget_bytes if self.caps else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """One wish; it counts although its owner is away."""

    owner: NodeId
    wanted: ModelRequest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelView:
    """One model, as live nodes and the owners of wishes speak of it.

    Attributes:
        holders: The live nodes that have its file, by id.
        replicas: What live nodes run of it, in whatever state, by their ids and the parts.
        wishes: By the id of their owners.
        wanted: What the wishes come to: of several the largest of each number; None without any.
        card: The reader's own description; else that of the node that serves it, else of any that
            holds it, of several the smallest id's. For display and forwarding: placement asks each
            holder (`placement/inputs.py`).
        names: What holders and owners call it, with their claims.
    """

    digest: ModelDigest
    holders: tuple[NodeView, ...]
    replicas: tuple[tuple[NodeView, Served], ...]
    wishes: tuple[RequestView, ...]
    wanted: ModelRequest | None
    card: Card | None
    names: frozenset[Named]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeshView:
    """Everything, sorted.

    Attributes:
        nodes: Members that have not said goodbye, by id; also those that a certificate removes,
            which `Document.removed` names.
        removed: Those of them that a certificate removes.
        models: Every model that a live node holds or runs, or that somebody wants, by digest.
        demos: The embedded demonstration model, as the reader itself has it.
        catalogue: What they are called.
    """

    nodes: Mapping[NodeId, NodeView]
    removed: frozenset[NodeId]
    models: Mapping[ModelDigest, ModelView]
    demos: frozenset[ModelDigest]
    catalogue: Catalogue

    def name_of(self, node: NodeId) -> str:
        """Return the name of a node; "?" when it is not here."""
        view = self.nodes.get(node)
        return view.member.name if view else "?"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owner:
    """The parsed records of one owner.

    Attributes:
        records: What was read, by register: an equal body reads the same.
        live: Whether what it says of models counts.
    """

    records: Mapping[str, Record]
    node: NodeView | None
    wants: tuple[ModelRequest, ...]
    live: bool

    def digests(self) -> set[ModelDigest]:
        """The models that it speaks of, where that counts."""
        found = {one.digest for one in self.wants}
        if self.node is not None and self.live:
            found.update(self.node.held, (part.digest for part in self.node.serves))
        return found


_NOBODY = _Owner(records={}, node=None, wants=(), live=False)


@dataclass(slots=True)
class MeshReader:
    """Keeps the view of a document up to date.

    Args:
        document: What is known.
        me: The reader, who is here until it is gone, whatever it has said to others, and who
            believes itself.

    Attributes:
        view: The view as of the last `update`.
    """

    document: Document
    me: NodeId | None = None
    view: MeshView = field(init=False)
    _owners: dict[NodeId, _Owner] = field(init=False, default_factory=dict)
    _speakers: dict[ModelDigest, set[NodeId]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.view = MeshView(
            nodes={},
            removed=frozenset(),
            models={},
            demos=frozenset(),
            catalogue=Catalogue(()),
        )
        self.update(self.document.owners)

    def update(self, owners: Iterable[NodeId]) -> bool:
        """Read owners again whose facts changed; returns whether the view is another one now."""
        changed: dict[NodeId, _Owner] = {}
        touched: set[ModelDigest] = set()
        for owner in owners:
            before = self._owners.get(owner, _NOBODY)
            after = self._read(owner, before)
            if after is not before:
                changed[owner] = after
                touched |= self._index(owner, before, after)
        if changed:
            for owner, one in changed.items():
                if one is _NOBODY:
                    del self._owners[owner]
                else:
                    self._owners[owner] = one
            self.view = self._renewed(changed, touched)
        return bool(changed)

    # --- owners -----------------------------------------------------------------------------------

    def _read(self, owner: NodeId, before: _Owner) -> _Owner:
        """Return what stands of `owner`; `before` itself when that reads as it did."""
        records = {one.register: one for one in self.document.registers(owner)}
        if not records:
            return _NOBODY
        live = owner not in self.document.removed
        record = records.get(MEMBER)
        instance = record.instance if record else 0
        was = before.node.instance if before.node else instance
        if live == before.live and instance == was and _read_the_same(records, before.records):
            return before
        return _Owner(
            records=records,
            node=self._node(owner, records, before),
            wants=_read(records.get(WANTS), wants_from_wire) or (),
            live=live,
        )

    def _node(
        self, owner: NodeId, records: Mapping[str, Record], before: _Owner
    ) -> NodeView | None:
        record = records.get(MEMBER)
        member = _read(record, Member.from_wire)
        if record is None or member is None or (member.left and owner != self.me):
            return None
        served = _read(records.get(SERVING), serves_from_wire) or ()
        pages = {name: records[name] for name in HELD_REGISTERS if name in records}
        known = {name: before.records[name] for name in HELD_REGISTERS if name in before.records}
        if before.node is not None and _read_the_same(pages, known):
            held = before.node.held  # cards are long to read, and most changes are of others
        else:
            held = _held(pages.values())
        return NodeView(
            node=owner,
            instance=record.instance,
            member=member,
            caps=_read(records.get(CAPS), Caps.from_wire),
            serves={one.part: one for one in served},
            held=held,
            credential=credential_of(record),
        )

    def _index(self, owner: NodeId, before: _Owner, after: _Owner) -> set[ModelDigest]:
        """Note of which models `owner` speaks; returns those of which it says something else."""
        old, new = before.digests(), after.digests()
        for digest in old - new:
            self._speakers[digest].discard(owner)
        for digest in new - old:
            self._speakers.setdefault(digest, set()).add(owner)
        return old | new

    # --- the view ---------------------------------------------------------------------------------

    def _renewed(
        self, changed: Mapping[NodeId, _Owner], touched: Collection[ModelDigest]
    ) -> MeshView:
        old = self.view
        nodes = _with(old.nodes, {owner: one.node for owner, one in changed.items()})
        demos = old.demos
        if self.me is not None and self.me in changed:
            own = nodes[self.me].held if self.me in nodes else {}
            demos = frozenset(digest for digest, one in own.items() if one.demo)
        renamed = demos != old.demos
        made = {digest: self._model(digest, demos) for digest in {*touched, *(demos ^ old.demos)}}
        models = _with(old.models, made)
        for digest, model in made.items():
            before = old.models.get(digest)
            names = model.names if model else frozenset()
            renamed = renamed or names != (before.names if before else frozenset())
        return MeshView(
            nodes=nodes,
            removed=self.document.removed,
            models=models,
            demos=demos,
            catalogue=Catalogue(named for model in models.values() for named in model.names)
            if renamed
            else old.catalogue,
        )

    def _model(self, digest: ModelDigest, demos: frozenset[ModelDigest]) -> ModelView | None:
        """Return what is said of a model; None when nobody speaks of it."""
        owners = sorted(self._speakers.get(digest, ()))
        if not owners:
            self._speakers.pop(digest, None)
            return None
        said = [self._owners[owner] for owner in owners]
        live = [one.node for one in said if one.node is not None and one.live]
        holders = tuple(node for node in live if digest in node.held)
        wishes = tuple(
            RequestView(owner=owner, wanted=wanted)
            for owner, one in zip(owners, said, strict=True)
            for wanted in one.wants
            if wanted.digest == digest
        )
        return ModelView(
            digest=digest,
            holders=holders,
            replicas=tuple(
                (node, node.serves[part])
                for node in live
                for part in sorted(node.serves)
                if part.digest == digest
            ),
            wishes=wishes,
            wanted=merge_wants(one.wanted for one in wishes),
            card=self._card(digest, holders),
            names=frozenset(_names(digest, holders, wishes, demo=digest in demos)),
        )

    def _card(self, digest: ModelDigest, holders: Collection[NodeView]) -> Card | None:
        best = sorted(holders, key=lambda node: (node.node != self.me, not _is_ready(node, digest)))
        return best[0].held[digest].card if best else None


def read(document: Document, *, me: NodeId | None = None) -> MeshView:
    """The view of a document, for one look; `MeshReader` keeps one.

    Args:
        document: What is known.
        me: See `MeshReader`.
    """
    return MeshReader(document, me).view


def merge_wants(wishes: Iterable[ModelRequest]) -> ModelRequest | None:
    """One wish for all of one model, that serves them all: the largest of nearly each number."""
    merged: ModelRequest | None = None
    for one in wishes:
        other = merged or one
        merged = ModelRequest(
            digest=one.digest,
            stem=min(one.stem, other.stem),
            replicas=max(one.replicas, other.replicas),
            priority=max(one.priority, other.priority),
            context=max(one.context, other.context),
            slots=max(one.slots, other.slots),
            split=max(one.split, other.split),
            moe=Sharing.strictest((one.moe, other.moe)),
            divergence_max=min(one.divergence_max, other.divergence_max),
        )
    return merged


def _names(
    digest: ModelDigest,
    holders: Iterable[NodeView],
    wishes: Collection[RequestView],
    *,
    demo: bool,
) -> Iterator[Named]:
    """All names, with claims: a model that is wanted before others, then one that is ready.

    Who only says that it has a file, or runs what nobody wants, takes no name from a model in use.
    """
    for wish in wishes:
        yield Named(digest=digest, stem=wish.wanted.stem, claim=2)
    for node in holders:
        held = node.held[digest]
        claim = 2 * (demo or bool(wishes)) + _is_ready(node, digest)
        yield Named(digest=digest, stem=held.stem, name=held.card.name, claim=claim)


def _is_ready(node: NodeView, digest: ModelDigest) -> bool:
    return any(one.state == "ready" for part, one in node.serves.items() if part.digest == digest)


def _held(pages: Iterable[Record]) -> Mapping[ModelDigest, HeldModel]:
    found: dict[ModelDigest, HeldModel] = {}
    for page in pages:
        rows = _read(page, lambda body: tuple(held_from_wire(body))) or ()
        found.update((one.digest, one) for one in rows)
    return found


Key = TypeVar("Key", bound=Any)


def _with(old: Mapping[Key, T], changes: Mapping[Key, T | None]) -> Mapping[Key, T]:
    """The old mapping with changes, in the order of its keys; None takes a key out."""
    new = dict(old)
    for key, value in changes.items():
        if value is None:
            new.pop(key, None)
        else:
            new[key] = value
    return new if new.keys() == old.keys() else dict(sorted(new.items()))


def _read_the_same(records: Mapping[str, Record], others: Mapping[str, Record]) -> bool:
    """Whether the bodies are equal in value and type: in Python, True equals 1."""
    return records.keys() == others.keys() and all(
        one.digest == others[name].digest
        or (one.body == others[name].body and encode(one.body) == encode(others[name].body))
        for name, one in records.items()
    )


def _read(record: Record | None, reader: Callable[[dict[str, object]], T]) -> T | None:
    if record is None or not record.body:  # an empty body withdraws the register
        return None
    try:
        return reader(record.body)
    except PeerError:
        return None

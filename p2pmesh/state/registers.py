"""The bodies of the registers: one class per register, to and from the wire.

Pure. A body comes from a peer and is checked field by field. Within one version of the protocol
newer nodes may say more, or less: unknown fields are left alone, missing ones have defaults, and
a row that this node cannot read, or whose state it does not know, is skipped without harm to the
others. A field of a wrong type makes the body unreadable, which is its writer's own loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from p2pmesh.config import SLOTS_MAX, Address, parse_address
from p2pmesh.errors import PeerError
from p2pmesh.identity.keys import ID_BYTES, NodeId
from p2pmesh.models.cards import BYTES_MAX, Card, ModelDigest
from p2pmesh.models.cards import from_wire as card_from_wire
from p2pmesh.models.cards import to_wire as card_to_wire
from p2pmesh.models.catalogue import STEM_CHARACTERS_MAX, UNNAMED
from p2pmesh.models.metadata import CONTEXT_MAX, LAYERS_MAX
from p2pmesh.models.parts import (
    PLACES_MAX,
    QUALITIES_MAX,
    RANKING_CHARACTERS,
    STAGES_MAX,
    UNMEASURED,
    WHOLE,
    PartId,
    Shard,
    ShardKind,
    ShardQuality,
    StageRange,
    is_known,
    is_shard,
    parse_stage,
    shard_name,
    unit_id,
)
from p2pmesh.sharing import DIVERGENCE_LIMIT, DIVERGENCE_MAX, MILLION, Sharing
from p2pmesh.wire.codec import encode
from p2pmesh.wire.fields import as_map, take, take_rows
from p2pmesh.wire.records import RECORD_BYTES_MAX
from p2pmesh.wire.registers import MODELS
from p2pmesh.wire.text import plain_text

HELD_PAGES_MAX = 12  # with the rest below what one owner may have; about 250 models
ADDRESSES_MAX = 16
TOKEN_US_MAX = 3600 * 10**6  # an hour: no model is as slow
FAR_MAX = 64  # a node has links with some ten others
MEMORY_MIB_PER_S_MAX = 2**24  # 16 TiB/s: twice what the fastest accelerator has
SERVES_MAX = 64
WANTS_MAX = 16
REPLICAS_MAX = 1024
PRIORITY_MAX = 1000
DETAIL_CHARS_MAX = 200
PAGE_BYTES_MAX = RECORD_BYTES_MAX - 1024  # leaves room for the record around it

ServeState = Literal["loading", "ready", "failed", "stopping"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """The body of `member`: a node is here, and how to reach it.

    Attributes:
        name: What people call it.
        addresses: Where it listens for other nodes; none: it cannot be dialled.
        version: Of p2pmesh.
        left: Its goodbye: it stopped on purpose.
    """

    name: str
    addresses: tuple[Address, ...]
    version: str
    left: bool = False

    @property
    def dialable(self) -> bool:
        """Whether others can open a link to it."""
        return bool(self.addresses)

    def to_wire(self) -> dict[str, Any]:
        """The body of the register `member`."""
        return {
            "name": self.name,
            "addresses": [str(address) for address in self.addresses],
            "version": self.version,
            "left": self.left,
        }

    @classmethod
    def from_wire(cls, body: dict[str, Any]) -> Member:
        """Read a body.

        Raises:
            PeerError: It is not one of this register.
        """
        return cls(
            name=_plain(body, "name", 64),
            addresses=tuple(take_rows(body, "addresses", _address, count_max=ADDRESSES_MAX)),
            version=_plain(body, "version", 64),
            left=take(body, "left", bool, default=False),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """The body of `caps`: what a node can give.

    Attributes:
        budget_bytes: Memory for models, all devices together.
        engine: What runs them, in a word or two.
        rpc: The build of the engine's RPC, "" when it has none; only equal ones work together.
        memory_mib_per_s: How fast it reads memory, coarsely; 0 when it does not say.
        confined: Whether it says that stages there reach neither its files nor a network, so that
            it runs them for any member that serves.
        stage_bytes: Of the memory, what stages of pipelines may take: they compute on the CPU.
        measured: Whether it has looked how far the others are.
        far: The nodes that are not near it, with the classes of their links
            (`placement.distance`), sorted, at most `FAR_MAX`.
    """

    budget_bytes: int
    engine: str
    rpc: str
    memory_mib_per_s: int = 0
    confined: bool = False
    stage_bytes: int = BYTES_MAX
    measured: bool = True
    far: tuple[tuple[NodeId, int], ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """The body of the register `caps`."""
        return {
            "budget_bytes": self.budget_bytes,
            "engine": self.engine,
            "rpc": self.rpc,
            "memory_mib_per_s": self.memory_mib_per_s,
            "confined": self.confined,
            "stage_bytes": self.stage_bytes,
            "measured": self.measured,
            "far": [list(row) for row in self.far[:FAR_MAX]],
        }

    @classmethod
    def from_wire(cls, body: dict[str, Any]) -> Caps:
        """Read a body; raises as `Member.from_wire`."""
        return cls(
            budget_bytes=take(body, "budget_bytes", int, default=0),
            engine=_plain(body, "engine", 64),
            rpc=_plain(body, "rpc", 32),
            memory_mib_per_s=_number(body, "memory_mib_per_s", MEMORY_MIB_PER_S_MAX),
            confined=take(body, "confined", bool, default=False),
            stage_bytes=take(body, "stage_bytes", int, default=BYTES_MAX),
            measured=take(body, "measured", bool, default=True),
            far=tuple(sorted(dict(take_rows(body, "far", _far, count_max=FAR_MAX)).items())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A part of a model that a node is running, or tried to.

    Attributes:
        detail: For people: how far it is, or why it failed.
        name: Which part of the model it is.
        stages: For a stage all stages of its pipeline, the head first: one record tells the unit.
        token_us: How long a token of its latest answers took, roughly; 0 when it does not say.
        shard: For a shard what it holds.
    """

    digest: ModelDigest
    state: ServeState
    detail: str = ""
    name: str = WHOLE
    stages: tuple[StageRange, ...] = ()
    token_us: int = 0
    shard: Shard | None = None

    @property
    def part(self) -> PartId:
        """Return the part that this replica runs."""
        return PartId(self.digest, self.name)


def _far(row: Any) -> tuple[NodeId, int]:
    match row:
        case [bytes(node), int(link), *_] if (
            len(node) == ID_BYTES and type(link) is int and link > 0
        ):
            return NodeId(node), int(link)
        case _:
            raise PeerError("a distance of an unknown kind")


def serves_to_wire(served: Iterable[Served]) -> dict[str, Any]:
    """The body of the register `serving`."""
    rows: list[list[Any]] = []
    for one in served:
        row: list[Any] = [one.digest, one.name, one.state]
        row.append(plain_text(one.detail, DETAIL_CHARS_MAX))
        stages = [[stage.node, stage.last_layer] for stage in one.stages]
        if one.shard is not None:
            row += [stages, one.token_us, _shard_row(one.shard)]
        elif one.token_us:
            row += [stages, one.token_us]
        elif stages:
            row.append(stages)
        rows.append(row)
    return {"serves": sorted(rows)}


def serves_from_wire(body: dict[str, Any]) -> tuple[Served, ...]:
    """Read a body of `serving`; raises as `Member.from_wire`."""
    return tuple(take_rows(body, "serves", _served, count_max=SERVES_MAX))


def _served(row: Any) -> Served:
    match row:
        case [str(digest), str(name), str(state), *rest] if is_known(name) and state in get_args(
            ServeState
        ):
            detail = rest[0] if rest and isinstance(rest[0], str) else ""
            stages = _stages(ModelDigest(digest), name, rest[1] if len(rest) > 1 else [])
            return Served(
                digest=_digest(digest),
                name=name,
                state=cast("ServeState", state),
                detail=plain_text(detail, DETAIL_CHARS_MAX),
                stages=stages,
                token_us=_token_us(rest[2:]),
                shard=_shard(ModelDigest(digest), name, rest[3] if len(rest) > 3 else []),
            )
        case _:
            raise PeerError("a part, or a state, of an unknown kind")


def _token_us(rest: list[Any]) -> int:
    """Return a speed that is only shown: what cannot be one says nothing."""
    said = rest[0] if rest else 0
    return said if type(said) is int and 0 < said <= TOKEN_US_MAX else 0


def _shard_row(shard: Shard) -> list[Any]:
    ranking = bytes.fromhex(shard.ranking)
    return [shard.kind.value, ranking, shard.places, shard.critical, shard.kept_bytes]


def _shard(digest: ModelDigest, name: str, row: Any) -> Shard | None:
    """The shard that `name` means, by its row; None for other parts."""
    if not is_shard(name):
        return None
    match row:
        case [str(kind), bytes(ranking), int(places), int(critical), bytes(kept), *_] if (
            kind in set(ShardKind)
            and len(ranking) * 2 == RANKING_CHARACTERS
            and 0 < critical <= places <= PLACES_MAX
            and len(kept) == -(-places // 8)
        ):
            held = int.from_bytes(kept, "little")
            shard = Shard(ShardKind(kind), ranking.hex(), places, critical, held)
            if shard_name(digest, shard) == name and shard.kept < 1 << places:
                return shard
    raise PeerError("a shard without its experts")


def _quality_row(one: ShardQuality) -> list[Any]:
    return [one.kind.value, bytes.fromhex(one.ranking), *one[2:]]


def _quality(row: Any) -> ShardQuality:
    match row:
        case [str(kind), bytes(ranking), int(places), int(critical), *rest] if (
            kind in set(ShardKind)
            and len(ranking) * 2 == RANKING_CHARACTERS
            and 0 < critical < places <= PLACES_MAX
        ):
            divergence, coverage = _figures(rest)
            return ShardQuality(
                ShardKind(kind), ranking.hex(), places, critical, divergence, coverage
            )
    raise PeerError("a quality of shards of an unknown kind")


def _figures(row: list[Any]) -> tuple[int, int]:
    match row:
        case [int(divergence), int(coverage), *_] if (
            UNMEASURED <= divergence <= DIVERGENCE_LIMIT and 0 <= coverage <= MILLION
        ):
            return divergence, coverage
    raise PeerError("a quality of shards without its figures")


def _stages(digest: ModelDigest, name: str, rows: Any) -> tuple[StageRange, ...]:
    """The stages of the unit that `name` belongs to: each row a node and its last layer."""
    stage = parse_stage(name)
    if stage is None:
        return ()
    if type(rows) is not list or not stage.number < len(rows) <= STAGES_MAX:
        raise PeerError("a stage without its pipeline")
    stages: list[StageRange] = []
    for row in rows:
        match row:
            case [bytes(node), int(last), *_] if len(node) == ID_BYTES:
                first = stages[-1].last_layer + 1 if stages else 0
                if type(last) is not int or not first <= last < LAYERS_MAX:
                    raise PeerError("a stage without layers")
                stages.append(StageRange(NodeId(node), first, last))
            case _:
                raise PeerError("a stage of an unknown kind")
    if unit_id(digest, stages) != stage.unit or len({one.node for one in stages}) != len(stages):
        raise PeerError("a stage of another pipeline")
    return tuple(stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """A model whose file a node has.

    Attributes:
        stem: The file's name without its ending and part number.
        demo: It is the embedded one: served only while nobody wants another.
        qualities: How good shards of it are, as far as the node knows; at most `QUALITIES_MAX`.
    """

    digest: ModelDigest
    stem: str
    card: Card
    demo: bool = False
    qualities: tuple[ShardQuality, ...] = ()


def held_pages(held: Iterable[HeldModel]) -> list[dict[str, Any]]:
    """The bodies of the registers `models/0`, `models/1`, …: as few pages as fit."""
    pages: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    size = 0
    for one in sorted(held, key=lambda one: one.digest):
        row = {
            "digest": one.digest,
            "stem": one.stem,
            "card": card_to_wire(one.card),
            "demo": one.demo,
        }
        if one.qualities:
            row["shards"] = [_quality_row(each) for each in one.qualities[:QUALITIES_MAX]]
        row_bytes = len(encode(row))
        if rows and size + row_bytes > PAGE_BYTES_MAX:
            pages.append({"held": rows})
            rows, size = [], 0
        rows.append(row)
        size += row_bytes
    return [*pages, {"held": rows}] if rows else pages


def held_from_wire(body: dict[str, Any]) -> Iterator[HeldModel]:
    """Read one page; raises as `Member.from_wire`."""
    return take_rows(body, "held", _held, count_max=RECORD_BYTES_MAX // 64)


def _held(row: Any) -> HeldModel:
    fields = as_map(row, "a held model")
    return HeldModel(
        digest=_digest(take(fields, "digest", str)),
        stem=_plain(fields, "stem", STEM_CHARACTERS_MAX) or UNNAMED,
        card=card_from_wire(as_map(fields.get("card"), "a card")),
        demo=take(fields, "demo", bool, default=False),
        qualities=tuple(take_rows(fields, "shards", _quality, count_max=QUALITIES_MAX)),
    )


def held_register(page: int) -> str:
    """The register of a page of held models, counted from 0."""
    return f"{MODELS}/{page}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """A model that a node asks the mesh to serve.

    Attributes:
        context: Tokens of context that its engine shares among requests.
        slots: Requests at the same time.
        split: Nodes that share it as one pipeline; below 2 each copy lies on one node.
        moe: How a model of experts may be shared where it fits on no node.
        divergence_max: How far shards may be from the whole model, in millionths of a nat.
    """

    digest: ModelDigest
    stem: str
    replicas: int
    priority: int
    context: int
    slots: int
    split: int = 0
    moe: Sharing = Sharing.AUTO
    divergence_max: int = DIVERGENCE_MAX


def wants_to_wire(wanted: Iterable[ModelRequest]) -> dict[str, Any]:
    """The body of the register `wants`."""
    rows = [
        {
            "digest": one.digest,
            "stem": one.stem,
            "replicas": one.replicas,
            "priority": one.priority,
            "context": one.context,
            "slots": one.slots,
            "split": one.split,
            "moe": one.moe.value,
            "divergence_max": one.divergence_max,
        }
        for one in sorted(wanted, key=lambda one: one.digest)
    ]
    return {"wants": rows}


def wants_from_wire(body: dict[str, Any]) -> tuple[ModelRequest, ...]:
    """Read a body of `wants`, the last row of each model; raises as `Member.from_wire`.

    Repeated rows of one owner must not count like the wishes of several.
    """
    rows = take_rows(body, "wants", _wanted, count_max=WANTS_MAX)
    return tuple({one.digest: one for one in rows}.values())


def _wanted(row: Any) -> ModelRequest:
    fields = as_map(row, "a wish")
    return ModelRequest(
        digest=_digest(take(fields, "digest", str)),
        stem=_plain(fields, "stem", STEM_CHARACTERS_MAX) or UNNAMED,
        replicas=_number(fields, "replicas", REPLICAS_MAX, default=1),
        priority=_number(fields, "priority", PRIORITY_MAX),
        context=_number(fields, "context", CONTEXT_MAX),
        slots=_number(fields, "slots", SLOTS_MAX),
        split=_number(fields, "split", STAGES_MAX),
        moe=_sharing(take(fields, "moe", str, default="")),
        divergence_max=_number(fields, "divergence_max", DIVERGENCE_LIMIT, default=DIVERGENCE_MAX),
    )


def _sharing(text: str) -> Sharing:
    """Return a way of sharing; one that is not known here leaves the choice to the plan."""
    return Sharing(text) if text in set(Sharing) else Sharing.AUTO


def _number(body: dict[str, Any], name: str, most: int, *, default: int = 0) -> int:
    """A number; more than this version knows what to do with counts as the most that it does."""
    return min(take(body, name, int, default=default), most)


def _plain(body: dict[str, Any], name: str, size_max: int) -> str:
    """A text that goes to terminals and command lines: what must not reach them is taken out."""
    return plain_text(take(body, name, str, size_max=RECORD_BYTES_MAX, default=""), size_max)


def _address(text: Any) -> Address:
    try:
        return parse_address(text if isinstance(text, str) else "")
    except ValueError as exc:
        raise PeerError("invalid address") from exc


def _digest(text: str) -> ModelDigest:
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise PeerError("invalid model digest")
    return ModelDigest(text)

"""What hostile members say: nodes that hold a key of the mesh and send what no core would.

They run the real core as well, so that they are linked like everybody else, and put messages of
their own on those links. Nothing that they say may stand in an honest node's document but what
their own keys signed, within the bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from p2pmesh.state.bodies import CAPS
from p2pmesh.wire.messages import Records, encode_message
from p2pmesh.wire.records import Record, seal
from simulations.faults import Stage
from simulations.node import Node
from simulations.world import MESH, caps, key_of

HOUR_S = 3600


def hostile_nodes(stage: Stage) -> list[Node]:
    """The hostile nodes that run."""
    return [node for node in stage.world.nodes if node.hostile and node.core is not None]


def say(stage: Stage, node: Node, message: bytes, *, links: int | None = None) -> None:
    """Send a message on all links of a hostile node, or on so many of them."""
    peers = sorted(node.links.ends)
    if links is not None:
        peers = stage.rng.sample(peers, min(links, len(peers)))
    for peer in peers:
        stage.world.network.send(node.links.ends[peer], message)


def replay(stage: Stage, *, count: int = 20, oldest: bool = True) -> None:
    """Say again what was said before, the oldest first or anything."""
    archive = stage.world.archive
    for node in hostile_nodes(stage):
        some = archive[:count] if oldest else stage.rng.sample(archive, min(count, len(archive)))
        if some:
            say(stage, node, encode_message(Records(records=tuple(some))))


def forge(stage: Stage, *, count: int = 1, kind: str = "any") -> None:
    """Send records that must not be believed; see `FORGERIES`."""
    for node in hostile_nodes(stage):
        for _ in range(count):
            name = stage.rng.choice(sorted(FORGERIES)) if kind == "any" else kind
            say(stage, node, FORGERIES[name](stage, node))


def equivocate(stage: Stage) -> None:
    """Sign two records of the same version and tell some nodes one and some the other."""
    for node in hostile_nodes(stage):
        assert node.core is not None
        mine = node.core.document.get(node.id, CAPS)
        if mine is None:
            continue
        for budget_gib in (1, 2):
            record = _sealed(
                stage, node, seq=mine.seq + 1, epoch=mine.epoch, body=caps(budget_gib).body
            )
            stage.world.signed.add(record.raw)
            message = encode_message(Records(records=(record.raw,)))
            say(stage, node, message, links=(len(node.links.ends) + 1) // 2)


def hoard(stage: Stage, *, count: int = 40, size_bytes: int = 12_000) -> None:
    """Sign more, and longer, than one owner may have."""
    for node in hostile_nodes(stage):
        assert node.core is not None
        mine = node.core.document.get(node.id, CAPS)
        epoch = mine.epoch if mine else int(node.clock())
        for page in range(count):
            record = _sealed(
                stage, node, register=f"x/{page}", epoch=epoch, body={"x": "y" * size_bytes}
            )
            stage.world.signed.add(record.raw)
            say(stage, node, encode_message(Records(records=(record.raw,))))


# --- what must not be believed --------------------------------------------------------------------


def _sealed(stage: Stage, node: Node, **changes: Any) -> Record:
    """A record with the hostile node's own signature."""
    now = int(node.clock())
    arguments: dict[str, Any] = {
        "mesh": MESH,
        "register": CAPS,
        "epoch": now,
        "seq": stage.rng.randrange(1, 1 << 20),
        "instance": node.instance,
        "issued_at": now,
        "ttl_s": 240,
        "body": caps(99).body,
    }
    return seal(node.key, **{**arguments, **changes})


def _altered(stage: Stage, node: Node) -> bytes:
    """Somebody's newest record with another value and the old signature."""
    assert node.core is not None
    records = [one for one in node.core.document.records() if one.owner != node.id]
    if not records:
        return _junk(stage, node)
    record = stage.rng.choice(records)
    raw = bytearray(_sealed(stage, node, seq=record.seq + 1).raw)
    raw = bytearray(record.raw[:96]) + raw[96:].replace(node.id, record.owner)
    return encode_message(Records(records=(bytes(raw),)))


def _unsigned(stage: Stage, node: Node) -> bytes:
    """An own record whose signature has one bit wrong."""
    raw = bytearray(_sealed(stage, node).raw)
    raw[stage.rng.randrange(64)] ^= 1
    return encode_message(Records(records=(bytes(raw),)))


def _own(stage: Stage, node: Node, **changes: Any) -> bytes:
    return encode_message(Records(records=(_sealed(stage, node, **changes).raw,)))


def _run_out(stage: Stage, node: Node) -> bytes:
    return _own(stage, node, issued_at=int(node.clock()) - HOUR_S)


def _from_the_future(stage: Stage, node: Node) -> bytes:
    return _own(stage, node, issued_at=int(node.clock()) + HOUR_S)


def _epoch_far_ahead(stage: Stage, node: Node) -> bytes:
    return _own(stage, node, epoch=int(node.clock()) + 48 * HOUR_S)


def _other_mesh(stage: Stage, node: Node) -> bytes:
    return _own(stage, node, mesh=bytes(16))


def _stranger(stage: Stage, node: Node) -> bytes:
    """A record of somebody else's, with the hostile node's key and signature."""
    other = stage.rng.choice([one for one in stage.world.nodes if one is not node])
    raw = _sealed(stage, node).raw
    signed = raw[96:].replace(node.id, other.id)
    key = key_of(stage.world.seed, node.number)
    return encode_message(Records(records=(key.sign(signed) + key.public + signed,)))


def _junk(stage: Stage, _: Node) -> bytes:
    return stage.rng.randbytes(stage.rng.randrange(1, 2000))


def _cut_short(stage: Stage, node: Node) -> bytes:
    message = _own(stage, node)
    return message[: stage.rng.randrange(len(message))]


def _deep(stage: Stage, _: Node) -> bytes:
    return b"\x91" * stage.rng.randrange(100, 5000)


FORGERIES: Mapping[str, Callable[[Stage, Node], bytes]] = {
    "altered": _altered,
    "unsigned": _unsigned,
    "run_out": _run_out,
    "from_the_future": _from_the_future,
    "epoch_far_ahead": _epoch_far_ahead,
    "other_mesh": _other_mesh,
    "stranger": _stranger,
    "junk": _junk,
    "cut_short": _cut_short,
    "deep": _deep,
}

ATTACKS: Mapping[str, Callable[..., None]] = {
    attack.__name__: attack for attack in (replay, forge, equivocate, hoard)
}

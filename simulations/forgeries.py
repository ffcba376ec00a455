"""Forgeries that no node may believe: one function per kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from p2pmesh.identity.keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES
from p2pmesh.wire.evidence import (
    Accusation,
    accused_to_wire,
    make_certificate,
    make_fork,
)
from p2pmesh.wire.messages import Push, encode_message
from p2pmesh.wire.records import Record, parse, seal
from p2pmesh.wire.registers import ACCUSED, MEMBER
from simulations.faults import Stage
from simulations.hosts import Payload
from simulations.node import Node
from simulations.world import MESH, key_of

HOUR_S = 3600
SIGNED_FROM = SIGNATURE_BYTES + PUBLIC_KEY_BYTES


def sealed(stage: Stage, node: Node, **changes: Any) -> Record:
    """A record with the hostile node's own signature; its lease, if nothing else is said."""
    now = int(node.clock())
    member = node.core.document.get(node.id, MEMBER) if node.core else None
    arguments: dict[str, Any] = {
        "mesh": MESH,
        "register": MEMBER,
        "epoch": now,
        "seq": stage.rng.randrange(1, 1 << 20),
        "instance": node.instance,
        "issued_at": now,
        "ttl_s": 240,
        "body": member.body if member else {},
    }
    return seal(node.key, **{**arguments, **changes})


def _altered(stage: Stage, node: Node) -> Payload:
    """Somebody's newest record with another value and the old signature."""
    record = _of_another(stage, node)
    if record is None:
        return _junk(stage, node)
    own = sealed(stage, node, seq=record.seq + 1, register=record.register, epoch=record.epoch)
    raw = record.raw[:SIGNED_FROM] + own.raw[SIGNED_FROM:].replace(node.id, record.owner)
    return Push(records=(raw,))


def _unsigned(stage: Stage, node: Node) -> Payload:
    """An own record whose signature has one bit wrong."""
    raw = bytearray(sealed(stage, node).raw)
    raw[stage.rng.randrange(SIGNATURE_BYTES)] ^= 1
    return Push(records=(bytes(raw),))


def _stranger(stage: Stage, node: Node) -> Payload:
    """A record of somebody else's, with the hostile node's key and signature."""
    other = stage.rng.choice([one for one in stage.world.nodes if one is not node])
    signed = sealed(stage, node).raw[SIGNED_FROM:].replace(node.id, other.id)
    key = key_of(stage.world.seed, node.number)
    return Push(records=(key.sign(signed) + key.public + signed,))


def _framed(stage: Stage, node: Node) -> Payload:
    """A certificate against somebody, on this node's word and on that of one that never said it."""
    record = _of_another(stage, node)
    victims = [one for one in stage.world.honest if record and one.id != record.owner]
    if record is None or not victims or node.core is None:
        return _junk(stage, node)
    member = node.core.document.get(stage.rng.choice(victims).id, MEMBER)
    if member is None:
        return _junk(stage, node)
    row = Accusation(member.owner, member.epoch, member.seq)
    mine = sealed(stage, node, register=ACCUSED, body=accused_to_wire([row]))
    theirs = mine.raw[SIGNED_FROM:].replace(node.id, record.owner)
    forged = parse(record.raw[:SIGNED_FROM] + theirs)
    return Push(certificates=(make_certificate(row, [mine, forged]).raw,))


def _lone_word(stage: Stage, node: Node) -> Payload:
    """A certificate against somebody, on the word of this node alone."""
    record = _of_another(stage, node)
    member = node.core.document.get(record.owner, MEMBER) if record and node.core else None
    if member is None:
        return _junk(stage, node)
    row = Accusation(member.owner, member.epoch, member.seq)
    mine = sealed(stage, node, register=ACCUSED, body=accused_to_wire([row]))
    return Push(certificates=(make_certificate(row, [mine]).raw,))


def _false_fork(stage: Stage, node: Node) -> Payload:
    """A fork of somebody, one side of which it never signed."""
    record = _of_another(stage, node)
    if record is None:
        return _junk(stage, node)
    own = sealed(stage, node, register=record.register, epoch=record.epoch, seq=record.seq)
    signed = own.raw[SIGNED_FROM:].replace(node.id, record.owner)
    return Push(forks=(make_fork(record, parse(record.raw[:SIGNED_FROM] + signed)).raw,))


def _run_out(stage: Stage, node: Node) -> Payload:
    return _own(stage, node, issued_at=int(node.clock()) - HOUR_S)


def _from_the_future(stage: Stage, node: Node) -> Payload:
    return _own(stage, node, issued_at=int(node.clock()) + HOUR_S)


def _epoch_far_ahead(stage: Stage, node: Node) -> Payload:
    return _own(stage, node, epoch=int(node.clock()) + 48 * HOUR_S)


def _other_mesh(stage: Stage, node: Node) -> Payload:
    return _own(stage, node, mesh=bytes(16))


def _junk(stage: Stage, _: Node) -> Payload:
    return stage.rng.randbytes(stage.rng.randrange(1, 2000))


def _cut_short(stage: Stage, node: Node) -> Payload:
    message = encode_message(Push(records=(sealed(stage, node).raw,)))
    return message[: stage.rng.randrange(len(message))]


def _deep(stage: Stage, _: Node) -> Payload:
    return b"\x91" * stage.rng.randrange(100, 5000)


def _own(stage: Stage, node: Node, **changes: Any) -> Payload:
    return Push(records=(sealed(stage, node, **changes).raw,))


def _of_another(stage: Stage, node: Node) -> Record | None:
    """Some record of somebody else that the hostile node holds."""
    assert node.core is not None
    records = [one for one in node.core.document.records() if one.owner != node.id]
    return stage.rng.choice(records) if records else None


FORGERIES: Mapping[str, Callable[[Stage, Node], Payload]] = {
    "altered": _altered,
    "unsigned": _unsigned,
    "stranger": _stranger,
    "framed": _framed,
    "lone_word": _lone_word,
    "false_fork": _false_fork,
    "run_out": _run_out,
    "from_the_future": _from_the_future,
    "epoch_far_ahead": _epoch_far_ahead,
    "other_mesh": _other_mesh,
    "junk": _junk,
    "cut_short": _cut_short,
    "deep": _deep,
}

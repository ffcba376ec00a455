"""Records and bodies for tests."""

from __future__ import annotations

from typing import Any

from p2pmesh.config import Address
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.models.cards import Card, ModelDigest
from p2pmesh.state.registers import HeldModel, Member
from p2pmesh.wire.evidence import (
    Accusation,
    Certificate,
    Fork,
    accused_to_wire,
    make_certificate,
    make_fork,
)
from p2pmesh.wire.records import Record, seal
from p2pmesh.wire.registers import ACCUSED
from tests.identity import builders

MESH = builders.MESH
KEYS = [SigningKey(bytes([number]) * 32) for number in range(1, 9)]
NODES = [NodeId(key.id) for key in KEYS]
NOW = 1_800_000_000


def record(owner: int = 0, register: str = "caps", **changes: Any) -> Record:
    """A record of one of `NODES`, by its number."""
    return sealed(KEYS[owner], register, **changes)


def sealed(key: SigningKey, register: str, **changes: Any) -> Record:
    arguments: dict[str, Any] = {
        "mesh": MESH,
        "register": register,
        "epoch": NOW,
        "seq": 1,
        "instance": 7,
        "issued_at": NOW,
        "ttl_s": 240,
        "body": {"value": 1},
    }
    return seal(key, **{**arguments, **changes})


def certificate(
    subject: int = 0, accusers: tuple[int, ...] = (1,), *, seq: int = 1, **changes: Any
) -> Certificate:
    """That `accusers` miss version `seq` of `subject`; `changes` are of their records."""
    accusation = Accusation(NODES[subject], NOW, seq)
    body = accused_to_wire([accusation])
    evidence = [record(one, ACCUSED, **{"body": body, **changes}) for one in accusers]
    return make_certificate(accusation, evidence)


def fork(owner: int = 0, register: str = "caps", **changes: Any) -> Fork:
    """Two values of `owner` under one number."""
    one, other = (record(owner, register, **changes, body={"value": value}) for value in (1, 2))
    return make_fork(one, other)


def member(name: str = "kitchen", **changes: Any) -> Member:
    arguments: dict[str, Any] = {
        "name": name,
        "addresses": (Address("127.0.0.1", 9338),),
        "version": "0.1.0",
    }
    return Member(**{**arguments, **changes})


def digest(number: int) -> ModelDigest:
    return ModelDigest(f"{number:064x}")


def card(**changes: Any) -> Card:
    arguments: dict[str, Any] = {
        "architecture": "llama",
        "name": "Some Model",
        "layers": 2,
        "layer_bytes": (1000, 1000),
        "other_bytes": 500,
        "size_bytes": 3000,
        "kv_bytes_per_token": 64,
        "experts": 0,
        "experts_used": 0,
        "context": 4096,
        "width": 64,
        "vocabulary": 300,
        "takes": frozenset({"text"}),
        "gives": frozenset({"chat"}),
        "chat_template": True,
        "parameters": 2000,
        "quantisation": "F16",
    }
    return Card(**{**arguments, **changes})


def held(number: int, **changes: Any) -> HeldModel:
    arguments: dict[str, Any] = {
        "digest": digest(number),
        "stem": f"model-{number}",
        "card": card(),
    }
    return HeldModel(**{**arguments, **changes})

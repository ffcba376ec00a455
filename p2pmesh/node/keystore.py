"""The files of a node's identity: its key, its mesh and credential, its epoch, its address book.

Private keys are PEM files readable by their owner only. Everything else can be read by a person.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pmesh.config import Address, parse_address
from p2pmesh.errors import ConfigError, LocalError, MeshError
from p2pmesh.home import PRIVATE_MODE, Home, read_json, write_atomic
from p2pmesh.identity.credentials import Credential, found, read_credential
from p2pmesh.identity.hello import UNNAMED
from p2pmesh.identity.keys import SEED_BYTES, MeshId, NodeId, SigningKey, parse_id, show_id
from p2pmesh.state.document import EPOCH_AHEAD_S_MAX
from p2pmesh.wire.statements import (
    Policy,
    Statement,
    parse_statement,
    state,
    verify_statement,
)
from p2pmesh.wire.text import plain_text

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshInfo:
    """Which mesh a node belongs to.

    Attributes:
        name: What people call it: two words.
        founded_at: Unix time in seconds.
        credential: What this node may do there.
        joined_at: Unix time in seconds at which this node founded or joined it.
    """

    id: MeshId
    name: str
    founded_at: int
    credential: Credential
    joined_at: int


def node_key(home: Home) -> SigningKey:
    """This node's key; made at the first start.

    Raises:
        LocalError: The file cannot be read, or holds no such key.
    """
    if not home.node_key.exists():
        _write_key(home.node_key, secrets.token_bytes(SEED_BYTES))
    return _read_key(home.node_key)


def load_mesh(home: Home) -> MeshInfo | None:
    """The mesh this node belonged to when it last ran.

    Raises:
        LocalError: The file is damaged.
    """
    try:
        fields = read_json(home.mesh_file)
        # Cleaned again: an earlier version wrote down whatever the node there had said.
        name = plain_text(str(fields["name"])) or UNNAMED
        credential = read_credential(base64.b64decode(fields["credential"], validate=True))
        if credential.mesh != parse_id(fields["id"]):
            raise ValueError("a credential of another mesh")
        return MeshInfo(
            id=credential.mesh,
            name=name,
            founded_at=int(fields["founded_at"]),
            credential=credential,
            joined_at=int(fields["joined_at"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MeshError) as exc:
        raise LocalError(
            f"{home.mesh_file} is damaged, or of an earlier version of p2pmesh; restore it, or "
            "start afresh, without this membership: p2pmesh leave"
        ) from exc


def save_mesh(home: Home, mesh: MeshInfo) -> None:
    """Remember the mesh; raises as `write_atomic`."""
    fields = {
        "id": show_id(mesh.id),
        "name": mesh.name,
        "founded_at": mesh.founded_at,
        "joined_at": mesh.joined_at,
        "credential": base64.b64encode(mesh.credential.raw).decode("ascii"),
    }
    write_atomic(home.mesh_file, json.dumps(fields, indent=2).encode() + b"\n")


def found_mesh(
    home: Home,
    key: SigningKey,
    *,
    name: str,
    is_open: bool,
    now: float,
    seed: bytes | None = None,
) -> MeshInfo:
    """Make a new mesh with this node as its first admin; raises as `write_atomic`.

    The mesh's own key signs the credential and the policy, and is forgotten.

    Args:
        home: Where it is remembered.
        key: This node's.
        name: What people call the mesh; "" for two words.
        is_open: Whether who is on the same network may join.
        now: Unix time in seconds.
        seed: Of the mesh's own key, for a caller that remembers it; a random one.
    """
    mesh_key = SigningKey(seed or secrets.token_bytes(SEED_BYTES))
    name = name or f"{secrets.choice(_FIRST)}-{secrets.choice(_SECOND)}"
    policy = Policy(number=1, open=is_open, name=name, founded_at=int(now))
    mesh = MeshInfo(
        id=MeshId(mesh_key.id),
        name=name,
        founded_at=int(now),
        credential=found(mesh_key, key.public, now),
        joined_at=int(now),
    )
    save_statements(home, mesh.id, [state(mesh_key, None, policy, mesh=mesh.id, now=now)])
    save_mesh(home, mesh)
    return mesh


def forget_mesh(home: Home) -> None:
    """Forget the mesh, and all that was remembered of it.

    Raises:
        LocalError: The files cannot be deleted.
    """
    for path in (
        home.mesh_file,
        home.statements_file,
        home.invitations_file,
        home.members_file,
        home.peers_file,
    ):
        try:
            path.unlink(missing_ok=True)
        except OSError as exc:
            raise LocalError(f"Cannot delete {path} ({exc.strerror})") from exc


def load_statements(home: Home, mesh: MeshId) -> tuple[Statement, ...]:
    """The statements of trust that stood when this node last ran, none of another mesh.

    Raises:
        LocalError: The file is damaged. Going on without it would bring back who was revoked.
    """
    try:
        fields = read_json(home.statements_file)
        if fields["mesh"] != show_id(mesh):
            return ()
        raws = [base64.b64decode(text, validate=True) for text in fields["statements"]]
        statements = tuple(parse_statement(raw) for raw in raws)
        if not all(map(verify_statement, statements)):
            raise ValueError("a wrong signature")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MeshError) as exc:
        raise LocalError(
            f"{home.statements_file} is damaged; restore it, or join the mesh anew: p2pmesh leave"
        ) from exc
    return statements


def save_statements(home: Home, mesh: MeshId, statements: Iterable[Statement]) -> None:
    """Remember the statements of trust; raises as `write_atomic`."""
    raws = [base64.b64encode(one.raw).decode("ascii") for one in statements]
    fields = {"mesh": show_id(mesh), "statements": raws}
    write_atomic(home.statements_file, json.dumps(fields, indent=1).encode() + b"\n")


def load_used(home: Home) -> dict[bytes, list[NodeId]]:
    """The nodes that came in with this node's invitations, by invitation.

    Raises:
        LocalError: The file is damaged. Going on without it would let in more than were invited.
    """
    try:
        fields = read_json(home.invitations_file)
        return {
            parse_id(invitation): [NodeId(parse_id(node)) for node in nodes]
            for invitation, nodes in fields.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as exc:
        raise LocalError(
            f"{home.invitations_file} is damaged; delete it, and revoke the invitations that this "
            "node made: p2pmesh revoke"
        ) from exc


def save_used(home: Home, used: Mapping[bytes, Iterable[NodeId]]) -> None:
    """Remember who used which invitation, durably; raises as `write_atomic`."""
    fields = {show_id(one): [show_id(node) for node in nodes] for one, nodes in used.items()}
    write_atomic(home.invitations_file, json.dumps(fields, indent=1).encode() + b"\n")


def next_epoch(home: Home, now_s: float) -> int:
    """An epoch larger than any this node used, on disk before it is returned.

    At least the unix time, so that a node that lost its disk is still ahead of its old self.

    Raises:
        LocalError: It cannot be written: then nothing may be published either.
    """
    try:
        last = int(home.epoch_file.read_text("ascii"))
        # From a clock that was far ahead. Nobody believes such an epoch, not even this node; half
        # of the bound leaves room to grow.
        if not 0 <= last < now_s + EPOCH_AHEAD_S_MAX // 2:
            raise ValueError(f"no epoch can be {last} now")
    except FileNotFoundError:
        last = 0
    except (OSError, ValueError) as exc:
        log.warning("epoch_unreadable", path=str(home.epoch_file), reason=str(exc))
        last = 0
    epoch = max(last + 1, int(now_s))
    save_epoch(home, epoch)
    return epoch


def save_epoch(home: Home, epoch: int) -> None:
    """Remember the epoch, durably; raises as `write_atomic`."""
    write_atomic(home.epoch_file, f"{epoch}\n".encode())


def load_book(home: Home, mesh: MeshId) -> dict[NodeId, tuple[Address, ...]]:
    """The address book, empty where there is none for this mesh. A damaged one is only a loss."""
    try:
        fields = read_json(home.peers_file)
        if fields["mesh"] != show_id(mesh):
            return {}
        return {
            NodeId(parse_id(node)): tuple(parse_address(text) for text in addresses)
            for node, addresses in fields["nodes"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as exc:
        log.warning("address_book_unreadable", path=str(home.peers_file), reason=str(exc))
        return {}


def save_book(home: Home, mesh: MeshId, book: Mapping[NodeId, tuple[Address, ...]]) -> None:
    """Remember where nodes were; raises as `write_atomic`."""
    nodes = {show_id(node): [str(a) for a in book[node]] for node in sorted(book)}
    text = json.dumps({"mesh": show_id(mesh), "nodes": nodes}, indent=2) + "\n"
    write_atomic(home.peers_file, text.encode())


def _write_key(path: Path, seed: bytes) -> None:
    pem = Ed25519PrivateKey.from_private_bytes(seed).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_atomic(path, pem, PRIVATE_MODE)


def _read_key(path: Path) -> SigningKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise TypeError("not an Ed25519 key")
        if sys.platform != "win32" and path.stat().st_mode & 0o077:
            log.warning("key_was_readable", path=str(path))
            os.chmod(path, PRIVATE_MODE)  # noqa: PTH101 - follows no link that pathlib would not
    except OSError as exc:
        raise LocalError(f"Cannot read {path} ({exc.strerror}); make it readable") from exc
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise LocalError(
            f"{path} holds no usable key; restore it, or delete it to be a new node"
        ) from exc
    return SigningKey(key.private_bytes_raw())


_FIRST = (
    "amber", "brave", "calm", "clear", "coral", "crisp", "dawn", "deep", "early", "fair",
    "fern", "fresh", "gentle", "golden", "green", "happy", "hazel", "honest", "jolly", "keen",
    "kind", "light", "lively", "lucky", "lunar", "maple", "mellow", "merry", "mild", "misty",
    "noble", "north", "olive", "open", "pine", "plain", "quick", "quiet", "rapid", "river",
    "rosy", "royal", "rustic", "sage", "silent", "silver", "smart", "solar", "south", "spring",
    "steady", "still", "stone", "sunny", "swift", "tidal", "tidy", "upper", "vivid", "warm",
    "west", "wild", "winter", "young",
)  # fmt: skip
_SECOND = (
    "acorn", "anchor", "apple", "arrow", "badger", "bay", "beacon", "birch", "bridge", "brook",
    "canyon", "cedar", "cloud", "comet", "creek", "crane", "delta", "eagle", "ember", "falcon",
    "field", "finch", "forest", "fox", "garden", "glade", "grove", "harbor", "hawk", "heron",
    "hill", "island", "lake", "lantern", "lark", "leaf", "lynx", "meadow", "moon", "moss",
    "oak", "ocean", "orchard", "otter", "owl", "pebble", "petal", "pond", "raven", "reef",
    "ridge", "robin", "shore", "sparrow", "star", "summit", "thicket", "trail", "valley", "wave",
    "willow", "wind", "wolf", "wren",
)  # fmt: skip

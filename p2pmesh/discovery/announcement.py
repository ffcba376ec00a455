"""What nodes say on the local network: `Announcement` and `Query`, as datagrams and as DNS-SD.

Pure. All of it is a claim of whoever sent it: nothing here is signed, and a name or an age is
believed only as far as joining that mesh then proves it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from p2pmesh.errors import ConfigError, PeerError
from p2pmesh.identity.keys import ID_BYTES, MeshId, NodeId, parse_id, show_id
from p2pmesh.wire.codec import decode, encode
from p2pmesh.wire.fields import as_map, take, take_exactly
from p2pmesh.wire.text import plain_text

MAGIC = b"p2pmesh:"  # so that a foreign datagram costs one comparison
DATAGRAM_BYTES_MAX = 512  # never fragmented, and an answer is hardly longer than its query
NAME_BYTES_MAX = 192  # in UTF-8: 64 letters of most scripts, and fits a TXT string of 255 bytes
FOUNDED_AT_MIN = 1_735_689_600  # 2025: an older mesh is a lie, or a clock that was never set
FOUNDED_AT_MAX = 2**33
PORT_MAX = 65535
VERSION_MAX = 65535

_ANNOUNCEMENT, _QUERY = "announcement", "query"
_DECIMAL = re.compile(rb"[0-9]{1,10}")


def short_name(text: str) -> str:
    """Return `text` as it may be shown and sent: plain, and at most `NAME_BYTES_MAX` long."""
    cleaned = plain_text(text).encode("utf-8")
    return cleaned[:NAME_BYTES_MAX].decode("utf-8", errors="ignore").strip()


@dataclass(frozen=True, slots=True)
class Announcement:
    """One node says that its mesh is here.

    Attributes:
        node: Who says so.
        mesh: The mesh that it belongs to.
        mesh_name: What people call that mesh.
        founded_at: When the mesh was founded, in unix seconds.
        open: Anybody on this network may join. Where not, the announcement is said only to
            nodes that somebody let in by hand.
        port: Where the node listens for peers, at the address that this came from.
        version: The highest version of the hello that it speaks.
    """

    node: NodeId
    mesh: MeshId
    mesh_name: str
    founded_at: int
    open: bool
    port: int
    version: int

    def to_datagram(self) -> bytes:
        """The announcement as one datagram."""
        return MAGIC + encode(
            {
                "kind": _ANNOUNCEMENT,
                "node": self.node,
                "mesh": self.mesh,
                "name": short_name(self.mesh_name),
                "founded": self.founded_at,
                "open": self.open,
                "port": self.port,
                "version": self.version,
            }
        )

    def to_properties(self) -> dict[bytes, bytes | None]:
        """The announcement as the TXT record of a DNS-SD service, whose SRV record has the port."""
        return {
            b"node": show_id(self.node).encode(),
            b"mesh": show_id(self.mesh).encode(),
            b"name": short_name(self.mesh_name).encode("utf-8"),
            b"founded": str(self.founded_at).encode(),
            b"open": b"1" if self.open else b"0",
            b"version": str(self.version).encode(),
        }


@dataclass(frozen=True, slots=True)
class Query:
    """One node asks which meshes are here.

    Attributes:
        node: Who asks.
        name: What people call that node.
        mesh: The mesh that it belongs to; None when it has none.
        port: Where it listens for peers, at the address that this came from.
    """

    node: NodeId
    name: str
    mesh: MeshId | None
    port: int

    def to_datagram(self) -> bytes:
        """The query as one datagram."""
        return MAGIC + encode(
            {
                "kind": _QUERY,
                "node": self.node,
                "mesh": self.mesh or b"",
                "name": short_name(self.name),
                "port": self.port,
            }
        )


def read_datagram(data: bytes) -> Announcement | Query:
    """What a datagram says. Fields that this version does not know are left alone.

    Raises:
        PeerError: It is too long, foreign, damaged, or claims what cannot be.
    """
    if len(data) > DATAGRAM_BYTES_MAX or not data.startswith(MAGIC):
        raise PeerError("not a datagram of p2pmesh")
    fields = as_map(decode(data[len(MAGIC) :], bytes_max=DATAGRAM_BYTES_MAX), "a datagram")
    kind = take(fields, "kind", str)
    node = NodeId(take_exactly(fields, "node", ID_BYTES))
    name = short_name(take(fields, "name", str))
    port = _within(take(fields, "port", int), "port", 1, PORT_MAX)
    if kind == _ANNOUNCEMENT:
        return _announcement(node, name, port, fields)
    if kind == _QUERY:
        mesh = take(fields, "mesh", bytes, size_max=ID_BYTES)
        if len(mesh) not in (0, ID_BYTES):
            raise PeerError("field 'mesh' has the wrong length")
        return Query(node, name, MeshId(mesh) if mesh else None, port)
    raise PeerError(f"a datagram of unknown kind {kind[:20]!r}")


def read_properties(properties: Mapping[bytes, bytes | None], port: int) -> Announcement:
    """The announcement in a DNS-SD service's TXT record.

    Args:
        properties: As `Announcement.to_properties`; keys that are not known are left alone.
        port: From the SRV record.

    Raises:
        PeerError: Something is missing, or claims what cannot be.
    """
    fields: dict[str, Any] = {
        "mesh": _txt_id(properties, b"mesh"),
        "founded": _txt_number(properties, b"founded"),
        "open": _txt(properties, b"open") == b"1",
        "version": _txt_number(properties, b"version"),
    }
    name = short_name(_txt(properties, b"name").decode("utf-8", errors="replace"))
    node = NodeId(_txt_id(properties, b"node"))
    return _announcement(node, name, _within(port, "port", 1, PORT_MAX), fields)


def _announcement(node: NodeId, name: str, port: int, fields: dict[str, Any]) -> Announcement:
    founded_at = take(fields, "founded", int)
    return Announcement(
        node=node,
        mesh=MeshId(take_exactly(fields, "mesh", ID_BYTES)),
        mesh_name=name,
        founded_at=_within(founded_at, "founded", FOUNDED_AT_MIN, FOUNDED_AT_MAX),
        open=take(fields, "open", bool),
        port=port,
        version=_within(take(fields, "version", int), "version", 1, VERSION_MAX),
    )


def _within(value: int, what: str, least: int, most: int) -> int:
    if not least <= value <= most:
        raise PeerError(f"field {what!r} is out of range")
    return value


def _txt(properties: Mapping[bytes, bytes | None], key: bytes) -> bytes:
    value = properties.get(key)
    if value is None:
        raise PeerError(f"a service without {key.decode()!r}")
    return value


def _txt_id(properties: Mapping[bytes, bytes | None], key: bytes) -> bytes:
    try:
        return parse_id(_txt(properties, key).decode("ascii"))
    except (ConfigError, UnicodeDecodeError) as exc:
        raise PeerError(f"a service whose {key.decode()!r} is not an id") from exc


def _txt_number(properties: Mapping[bytes, bytes | None], key: bytes) -> int:
    value = _txt(properties, key)
    if not _DECIMAL.fullmatch(value):
        raise PeerError(f"a service whose {key.decode()!r} is not a number")
    return int(value)

"""Everybody who was ever seen as a member of a mesh, with names and credentials.

A laptop that was stolen is no member any more when its lease has run out, and has to be revoked all
the same; and a revocation keeps those whom the revoked node let in, whether they are here or not.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import structlog

from p2pmesh.errors import LocalError, MeshError
from p2pmesh.home import Home, read_json, write_atomic
from p2pmesh.identity.credentials import Credential, read_credential
from p2pmesh.identity.keys import MeshId, NodeId, show_id
from p2pmesh.wire.text import plain_text

SEEN_MAX = 4096  # nodes; beyond that the one whose credential ends first is forgotten

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A node that was a member.

    Attributes:
        name: What people call it.
        credential: What it could do when it was last seen.
    """

    name: str
    credential: Credential


class Roster:
    """The members that were seen, kept on disk.

    Args:
        home: Where.
        mesh: Of which mesh.
    """

    def __init__(self, home: Home, mesh: MeshId) -> None:
        self._home, self._mesh = home, mesh
        self._seen = _load(home, mesh)

    @property
    def seen(self) -> Mapping[NodeId, Seen]:
        """Return everybody, by id."""
        return self._seen

    def note(self, members: Iterable[Seen]) -> None:
        """Note who is here now; writes the file when somebody is new or has another credential."""
        fresh = {NodeId(one.credential.node): one for one in members}
        if all(self._seen.get(node) == one for node, one in fresh.items()):
            return
        self._seen = {**self._seen, **fresh}
        if len(self._seen) > SEEN_MAX:
            by_end = sorted(self._seen, key=lambda node: self._seen[node].credential.expires_at)
            for node in by_end[: len(self._seen) - SEEN_MAX]:
                del self._seen[node]
        try:
            _save(self._home, self._mesh, self._seen)
        except LocalError as exc:
            log.warning("members_not_saved", reason=str(exc))


def _load(home: Home, mesh: MeshId) -> dict[NodeId, Seen]:
    try:
        fields = read_json(home.members_file)
        if fields["mesh"] != show_id(mesh):
            return {}
        found = {}
        for row in fields["nodes"]:
            credential = read_credential(base64.b64decode(row["credential"], validate=True))
            seen = Seen(name=plain_text(str(row["name"])), credential=credential)
            found[credential.node] = seen
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MeshError) as exc:
        # A loss only: who comes again is seen again.
        log.warning("members_unreadable", path=str(home.members_file), reason=str(exc))
        return {}
    return found


def _save(home: Home, mesh: MeshId, seen: Mapping[NodeId, Seen]) -> None:
    rows = [
        {"name": one.name, "credential": base64.b64encode(one.credential.raw).decode("ascii")}
        for one in seen.values()
    ]
    text = json.dumps({"mesh": show_id(mesh), "nodes": rows}, indent=1) + "\n"
    write_atomic(home.members_file, text.encode())

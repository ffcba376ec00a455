"""The bounded tables of what was heard on the local network.

Pure. Anybody on the network can say anything from any address, so room is shared out fairly among
the hosts that speak. When a table is full, the entry that goes is one of the host that holds most;
among equals one that was heard a single time goes before one that is repeated, then the one that
was silent for longest. A flood from one address so pushes out itself, and a flood from many
addresses pushes out what it said before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from p2pmesh.config import Address
from p2pmesh.discovery.announcement import Announcement, Query
from p2pmesh.discovery.choice import HeardMesh
from p2pmesh.identity.keys import MeshId, NodeId

ANNOUNCE_INTERVAL_S = 2.0  # a join waits for at most one, and a flat of laptops stays quiet
QUERY_INTERVAL_S = 10.0  # of a node that is still looking; the first ones come faster
HEARD_FOR_S = 3.25 * ANNOUNCE_INTERVAL_S  # three may be lost: Wi-Fi does not repeat broadcasts
WAITING_FOR_S = 3.25 * QUERY_INTERVAL_S
REGULAR_AFTER_S = 1.0  # between two times that something is heard: a burst is not repetition
ANNOUNCEMENTS_MAX = 256  # nodes times their addresses; more nodes than a network of this kind has
QUERIES_MAX = 256
PER_HOST_MAX = 16  # nodes on one machine
ADDRESSES_MAX = 16  # of one mesh, to try: a join needs one that answers

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(slots=True)
class _Entry(Generic[Value]):
    value: Value
    host: str
    first: float
    last: float

    @property
    def is_regular(self) -> bool:
        return self.last - self.first >= REGULAR_AFTER_S


class _Table(Generic[Key, Value]):
    def __init__(self, size_max: int, lifetime_s: float) -> None:
        self._size_max, self._lifetime_s = size_max, lifetime_s
        self._entries: dict[Key, _Entry[Value]] = {}
        self._hosts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: Key, value: Value, host: str, now: float) -> bool:
        """Note what `host` said; returns whether it is news."""
        entry = self._entries.get(key)
        if entry is not None and now - entry.last <= self._lifetime_s:
            entry.last = max(entry.last, now)
            is_news, entry.value = entry.value != value, value
            return is_news
        self._drop(key)
        if self._hosts[host] >= PER_HOST_MAX:
            self._drop(self._weakest(lambda found: found.host == host, now))
        elif len(self) >= self._size_max:
            self._drop(self._weakest(lambda _: True, now))
        self._entries[key] = _Entry(value, host, now, now)
        self._hosts[host] += 1
        return True

    def holds(self, host: str) -> bool:
        """Whether there is an entry of this host."""
        return host in self._hosts

    def live(self, now: float) -> Iterator[tuple[Key, _Entry[Value]]]:
        """What was heard lately; the longest known first, and what is repeated before the rest."""
        for key in [k for k, e in self._entries.items() if now - e.last > self._lifetime_s]:
            self._drop(key)
        yield from sorted(
            self._entries.items(), key=lambda item: (not item[1].is_regular, item[1].first)
        )

    def _weakest(self, among: Callable[[_Entry[Value]], bool], now: float) -> Key:
        def strength(key: Key) -> tuple[bool, int, bool, float]:
            entry = self._entries[key]
            is_live = now - entry.last <= self._lifetime_s
            return is_live, -self._hosts[entry.host], entry.is_regular, entry.last

        return min((k for k, e in self._entries.items() if among(e)), key=strength)

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._hosts[entry.host] -= 1
            if not self._hosts[entry.host]:
                del self._hosts[entry.host]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A node that asks which meshes are here.

    Attributes:
        node: Who asks.
        name: What people call it, as it says.
        mesh: The mesh that it has already; None when it has none.
        address: Where it listens for peers.
    """

    node: NodeId
    name: str
    mesh: MeshId | None
    address: Address


class Heard:
    """The meshes that are announced here and the nodes that ask for one."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget everything: it was heard on another network."""
        self._announcements: _Table[tuple[MeshId, NodeId, Address], Announcement] = _Table(
            ANNOUNCEMENTS_MAX, HEARD_FOR_S
        )
        self._queries: _Table[tuple[NodeId, Address], Waiting] = _Table(QUERIES_MAX, WAITING_FOR_S)

    def announced(self, said: Announcement, host: str, now: float) -> bool:
        """Note an announcement; returns whether it is news.

        Args:
            said: The announcement.
            host: The address that it came from, with its scope if it is link-local.
            now: Any clock that does not go back, in seconds.
        """
        address = Address(host, said.port)
        return self._announcements.put((said.mesh, said.node, address), said, host, now)

    def queried(self, said: Query, host: str, now: float) -> bool:
        """Note a query; returns whether it is news. The arguments are those of `announced`."""
        address = Address(host, said.port)
        waiting = Waiting(said.node, said.name, said.mesh, address)
        return self._queries.put((said.node, address), waiting, host, now)

    def is_known(self, host: str) -> bool:
        """Whether there is an announcement from this address."""
        return self._announcements.holds(host)

    def meshes(self, now: float) -> list[HeardMesh]:
        """The meshes that are announced, as the node says that has done so for longest."""
        found: dict[MeshId, HeardMesh] = {}
        is_open: set[MeshId] = set()
        for (mesh, _, _), entry in self._announcements.live(now):
            said = entry.value
            if said.open:
                is_open.add(mesh)
            if mesh not in found:
                found[mesh] = HeardMesh(
                    mesh, said.mesh_name, said.founded_at, said.open, said.version
                )
        return [
            HeardMesh(mesh.id, mesh.name, mesh.founded_at, mesh.id in is_open, mesh.version)
            for mesh in found.values()
        ]

    def addresses(self, mesh: MeshId, now: float) -> list[Address]:
        """Where members of a mesh can be reached, those first that were announced for longest."""
        live = self._announcements.live(now)
        return [key[2] for key, _ in live if key[0] == mesh][:ADDRESSES_MAX]

    def waiting(self, now: float) -> list[Waiting]:
        """The nodes that asked lately, each at the address that it asked from for longest."""
        found: dict[NodeId, Waiting] = {}
        for (node, _), entry in self._queries.live(now):
            found.setdefault(node, entry.value)
        return list(found.values())

    def newcomers(self, now: float) -> list[NodeId]:
        """The nodes that asked lately and have no mesh, for `founding_delay_s`."""
        return [asker.node for asker in self.waiting(now) if asker.mesh is None]

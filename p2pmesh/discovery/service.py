"""Discovery of one node: the beacon and mDNS, what they say, and what they hear."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
import trio

from p2pmesh.discovery.announcement import Announcement, Query
from p2pmesh.discovery.beacon import DISCOVERY_PORT, Beacon
from p2pmesh.discovery.heard import ANNOUNCE_INTERVAL_S, QUERY_INTERVAL_S, Heard
from p2pmesh.discovery.interfaces import usable_interfaces
from p2pmesh.discovery.mdns import Mdns
from p2pmesh.discovery.onlink import Interface
from p2pmesh.identity.keys import NodeId
from p2pmesh.watchable import Watchable

log = structlog.get_logger(__name__)

INTERFACES_EVERY_S = 3.0  # a cable, a Wi-Fi: people look up after that long
FIRST_QUERIES_S = (0.3, 0.5)  # pauses after the first: a lost one would cost a wrong founding
ADMITTED_MAX = 64  # nodes that a person let in by hand; the first of them goes


class Discovery:
    """Finds meshes on the local network and says where this node's mesh is.

    Opens nothing before `run`, then asks for meshes; announces nothing before `announce`.

    Args:
        me: This node.
        name: What people call it.
        port: Where it listens for peers.
        interfaces: Reads the interfaces to use; called in a thread, every few seconds.
        discovery_port: Where beacons arrive.
        with_beacon: Whether to use the beacon.
        with_mdns: Whether to use mDNS.

    Attributes:
        heard: What was heard; its `now` is `trio.current_time()`.
        changes: Is notified when something new was heard. What falls silent notifies nobody.
    """

    def __init__(
        self,
        me: NodeId,
        name: str,
        port: int,
        *,
        interfaces: Callable[[], Sequence[Interface]] = usable_interfaces,
        discovery_port: int = DISCOVERY_PORT,
        with_beacon: bool = True,
        with_mdns: bool = True,
    ) -> None:
        self.heard = Heard()
        self.changes = Watchable()
        self._me, self._name, self._port = me, name, port
        self._usable_interfaces = interfaces
        self._interfaces: tuple[Interface, ...] = ()
        self._announcement: Announcement | None = None
        self._is_seeking = True
        self._said, self._asks = Watchable(), Watchable()
        self._admitted: dict[NodeId, None] = {}
        self._beacon = Beacon(
            me,
            heard=self._heard,
            is_known=self.heard.is_known,
            answer=self._answer,
            port=discovery_port,
        )
        self._mdns = Mdns(me, heard=self._heard)
        self._with_beacon, self._with_mdns = with_beacon, with_mdns

    def announce(self, announcement: Announcement | None) -> None:
        """Say from now on that this node's mesh is here; None: it has none, or keeps silent.

        The announcement of a mesh that is not open is only said to nodes that were let in.
        """
        self._announcement = announcement
        self._mdns.say(announcement if announcement and announcement.open else None)
        self._said.notify()

    def seek(self, *, on: bool) -> None:
        """Whether to ask which meshes are here; so others see this node waiting. On at first."""
        self._is_seeking = on
        self._asks.notify()

    def start_anew(self) -> None:
        """Forget all that was heard, ask and announce at once: this node is on another network.

        Happens by itself when the interfaces change. Networks may have equal subnets, so whoever
        tells them apart in another way calls this.
        """
        self.heard.forget()
        self._mdns.start_anew()
        self._said.notify()
        self._asks.notify()
        self.changes.notify()

    def admit(self, node: NodeId) -> None:
        """Answer the queries of a node from now on, although the mesh is not open."""
        self._admitted.pop(node, None)
        while len(self._admitted) >= ADMITTED_MAX:
            del self._admitted[next(iter(self._admitted))]
        self._admitted[node] = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Speak and listen until cancelled; started once the beacon can be heard."""
        async with trio.open_nursery() as nursery:
            await self._read_interfaces()
            if self._with_beacon:
                await nursery.start(self._beacon.run)
                nursery.start_soon(self._repeat_announcement)
                nursery.start_soon(self._repeat_query)
            if self._with_mdns:
                nursery.start_soon(self._mdns.run)
            task_status.started()
            while True:
                await trio.sleep(INTERFACES_EVERY_S)
                await self._read_interfaces()

    async def _read_interfaces(self) -> None:
        try:
            found = await trio.to_thread.run_sync(self._usable_interfaces, abandon_on_cancel=True)
        except OSError as exc:
            log.warning("interfaces_unreadable", reason=str(exc))
            return
        interfaces = tuple(found)
        if interfaces != self._interfaces:
            self._interfaces = interfaces
            self._beacon.use(interfaces)
            self._mdns.use(interfaces)
            self.start_anew()

    async def _repeat_announcement(self) -> None:
        while True:
            seen, said = self._said.count, self._announcement
            if said is not None and said.open:
                self._beacon.send(said)
            with trio.move_on_after(ANNOUNCE_INTERVAL_S):
                await self._said.wait(seen)

    async def _repeat_query(self) -> None:
        while True:
            seen, pauses_s = self._asks.count, iter(FIRST_QUERIES_S)
            while self._asks.count == seen:
                if self._is_seeking:
                    mesh = self._announcement.mesh if self._announcement else None
                    self._beacon.send(Query(self._me, self._name, mesh, self._port))
                with trio.move_on_after(next(pauses_s, QUERY_INTERVAL_S)):
                    await self._asks.wait(seen)

    def _heard(self, said: Announcement | Query, host: str) -> None:
        now = trio.current_time()
        if isinstance(said, Query):
            is_news = self.heard.queried(said, host, now)
        else:
            is_news = self.heard.announced(said, host, now)
        if is_news:
            self.changes.notify()

    def _answer(self, query: Query) -> Announcement | None:
        """What a node that asks is told at once; who is in a mesh hears the next announcement."""
        said = self._announcement
        if said is None or query.mesh == said.mesh:
            return None
        is_told = query.mesh is None if said.open else query.node in self._admitted
        return said if is_told else None

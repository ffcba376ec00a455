"""One-datagram discovery over UDP, on every interface in use.

Datagrams go to the IPv4 broadcast address of each network and to an IPv6 group of our own, with
one hop to live, from a socket with a port of its own. Several nodes on one machine share the
discovery port, where what is sent to all arrives; an answer goes to the one port that the query
came from, since the system gives it to only one of those that share a port.

Nothing here ends the node: what cannot be opened or sent to is logged and left out.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import structlog
import trio

from p2pmesh.discovery.announcement import (
    DATAGRAM_BYTES_MAX,
    MAGIC,
    Announcement,
    Query,
    read_datagram,
)
from p2pmesh.discovery.network import broadcasts, ipv6, on_link_host
from p2pmesh.discovery.onlink import Interface
from p2pmesh.errors import PeerError
from p2pmesh.gossip.buckets import Bucket, Buckets
from p2pmesh.transport.pace import Pace

log = structlog.get_logger(__name__)

DISCOVERY_PORT = 9338  # whatever a node's peer port is: who searches knows no other

# ff12: a group that no registry assigned (the T flag), on this link only, so that no router passes
# it on. RFC 3307 leaves ids with the highest bit to groups like this one; 9338 is the port.
GROUP = "ff12::8000:9338"

HOPS = 1
READS_PER_S = 2000.0  # about 1 % of a core for junk; what comes faster is dropped by the system
READS_BURST = 256
SOURCE_PER_S, SOURCE_BURST = 10.0, 30.0  # of one address: 16 nodes that share it say 8 a second
SOURCES_MAX = 1024
STRANGERS_PER_S, STRANGERS_BURST = 100.0, 200.0  # of all addresses that announce nothing yet
ANSWERS_PER_S, ANSWERS_BURST = 10.0, 20.0  # an office that comes back from lunch
WARNING_PAUSE_S = 300.0  # between two of one interface: a log is no place for each lost datagram
RETRY_S = 1.0  # after a socket failed: it is not asked again at once

Source: TypeAlias = Any  # what the system calls an address: a tuple that differs by family

_ENOUGH_SAID = frozenset({errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL, errno.ENODEV})


class Beacon:
    """Sends announcements and queries to the local network and hears those of others.

    Args:
        me: This node, which does not hear itself.
        heard: Is told what was said, and the host that said it.
        is_known: Whether a host has announced something; strangers share one allowance.
        answer: What to answer to a query at once; None for silence.
        port: Where announcements arrive.
    """

    def __init__(
        self,
        me: bytes,
        *,
        heard: Callable[[Announcement | Query, str], None],
        is_known: Callable[[str], bool],
        answer: Callable[[Query], Announcement | None],
        port: int = DISCOVERY_PORT,
    ) -> None:
        self._me, self._port = me, port
        self._heard, self._is_known, self._answer = heard, is_known, answer
        self._interfaces: Sequence[Interface] = ()
        self._listeners: dict[int, socket.socket] = {}
        self._talkers: dict[int, socket.socket] = {}
        self._joined: frozenset[int] = frozenset()
        self._sources: Buckets[str] = Buckets(SOURCE_PER_S, SOURCE_BURST, SOURCES_MAX)
        self._strangers = Bucket(STRANGERS_PER_S, STRANGERS_BURST)
        self._answers = Bucket(ANSWERS_PER_S, ANSWERS_BURST)
        self._warned: dict[str, float] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open what can be opened, then hear until cancelled."""
        with self._opened():
            self.use(self._interfaces)
            task_status.started()
            async with trio.open_nursery() as nursery:
                for opened in (*self._listeners.values(), *self._talkers.values()):
                    nursery.start_soon(self._receive, opened)
                await trio.sleep_forever()

    def use(self, interfaces: Sequence[Interface]) -> None:
        """From now on these are the interfaces to speak on and to hear from."""
        self._interfaces = interfaces
        wanted = frozenset(interface.index for interface in interfaces if ipv6(interface))
        listener = self._listeners.get(socket.AF_INET6)
        if listener is None:
            return
        for index in self._joined - wanted:
            # The system has left the group already where the interface is gone.
            self._membership(listener, socket.IPV6_LEAVE_GROUP, index)
        self._joined &= wanted
        self._joined |= {
            index
            for index in wanted - self._joined
            if self._membership(listener, socket.IPV6_JOIN_GROUP, index)
        }

    def send(self, said: Announcement | Query) -> None:
        """Say something once, on every interface."""
        data = said.to_datagram()
        for interface in self._interfaces:
            for host in broadcasts(interface):
                self._send(socket.AF_INET, data, (host, self._port), interface.name)
            if ipv6(interface):
                group = (GROUP, self._port, 0, interface.index)
                self._send(socket.AF_INET6, data, group, interface.name)

    def _send(self, family: int, data: bytes, to: Source, where: str) -> None:
        talker = self._talkers.get(family)
        if talker is None:
            return
        try:
            talker.sendto(data, to)
        except OSError as exc:
            # A full buffer too: it is said again in a moment.
            self._warn(where, exc)

    # Sockets

    @contextmanager
    def _opened(self) -> Iterator[None]:
        try:
            for family in (socket.AF_INET, socket.AF_INET6):
                for opened, port in ((self._talkers, 0), (self._listeners, self._port)):
                    try:
                        opened[family] = _open(family, port)
                    except OSError as exc:
                        ip = "IPv4" if family == socket.AF_INET else "IPv6"
                        log.warning("beacon_not_opened", ip=ip, port=port, reason=str(exc))
            yield
        finally:
            for opened in (self._talkers, self._listeners):
                for each in opened.values():
                    each.close()
                opened.clear()
            self._joined = frozenset()

    def _membership(self, listener: socket.socket, option: int, index: int) -> bool:
        request = socket.inet_pton(socket.AF_INET6, GROUP) + struct.pack("@I", index)
        try:
            listener.setsockopt(socket.IPPROTO_IPV6, option, request)
        except OSError as exc:
            if option == socket.IPV6_JOIN_GROUP and exc.errno != errno.EADDRINUSE:
                self._warn(f"index {index}", exc)
                return False
        return True

    def _warn(self, where: str, exc: OSError) -> None:
        now = trio.current_time()
        if now - self._warned.get(where, now - WARNING_PAUSE_S) < WARNING_PAUSE_S:
            return
        self._warned = {name: at for name, at in self._warned.items() if now - at < WARNING_PAUSE_S}
        self._warned[where] = now
        tell = log.debug if exc.errno in _ENOUGH_SAID else log.warning
        tell("beacon_not_sent", interface=where, reason=str(exc))

    # What arrives

    async def _receive(self, opened: socket.socket) -> None:
        pace = Pace(READS_PER_S, READS_BURST)
        while True:
            await trio.lowlevel.wait_readable(opened)
            count = 0
            try:
                while count < READS_BURST:
                    data, source = opened.recvfrom(DATAGRAM_BYTES_MAX + 1)
                    count += 1
                    if data.startswith(MAGIC) and len(data) <= DATAGRAM_BYTES_MAX:
                        self._received(opened.family, data, source)
            except BlockingIOError:
                pass  # all read
            except OSError as exc:
                self._warn("receiving", exc)
                await trio.sleep(RETRY_S)
            await trio.sleep_until(max(pace.take(trio.current_time(), count), 0))

    def _received(self, family: int, data: bytes, source: Source) -> None:
        now = trio.current_time()
        scope = source[3] if family == socket.AF_INET6 else 0
        if not self._sources.take(f"{source[0]}%{scope}", now):
            return
        host = on_link_host(self._interfaces, source[0], scope)
        if host is None or not (self._is_known(host) or self._strangers.take(now)):
            return
        try:
            said = read_datagram(data)
        except PeerError as exc:
            log.debug("beacon_refused", host=host, reason=str(exc))
            return
        if said.node == self._me:
            return
        self._heard(said, host)
        if not isinstance(said, Query):
            return
        answer = self._answer(said)
        # An answer is hardly longer than its query and stays on this link: it amplifies nothing.
        if answer is not None and self._answers.take(now):
            self._send(family, answer.to_datagram(), source, "answers")


def _open(family: int, port: int) -> socket.socket:
    """A datagram socket; with a port one that hears, without one that speaks."""
    opened = socket.socket(family, socket.SOCK_DGRAM)
    try:
        opened.setblocking(False)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, HOPS)
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, HOPS)
        else:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, HOPS)
        if port:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sys.platform not in ("linux", "win32"):
                # BSD and macOS share a port only so. On Linux it would keep other users out.
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind(("" if family == socket.AF_INET else "::", port))
    except OSError:
        opened.close()
        raise
    return opened

"""DNS-SD over mDNS: announces this node's mesh as `_p2pmesh._tcp.local.` and hears of others.

`zeroconf` runs in threads of its own and its calls block, so they are made in threads here, and
what it hears comes back through a bounded inbox. It is imported when discovery begins, since that
takes long. An instance has the id of its node as its name, so that nobody has to be asked whether
the name is free, and a foreign one costs a comparison.

Unlike the beacon, a service says itself where it can be reached; only addresses on the link of an
interface in use are believed, so that no announcement makes this node dial elsewhere.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
import trio

from p2pmesh.discovery.announcement import Announcement, read_properties
from p2pmesh.discovery.heard import ANNOUNCE_INTERVAL_S
from p2pmesh.discovery.network import ipv4, ipv6, on_link_host
from p2pmesh.discovery.onlink import Interface
from p2pmesh.errors import PeerError
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.watchable import Watchable

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

log = structlog.get_logger(__name__)

SERVICE_TYPE = "_p2pmesh._tcp.local."
TTL_S = 60  # a node that crashed is forgotten after as long; the usual 75 minutes suit printers
INBOX_MAX = 256  # names to look up; beyond, the oldest is dropped: the beacon says it too
KNOWN_MAX = 64  # services held; with two addresses each, they fill half of what `Heard` holds
ADDRESSES_MAX = 2  # of one service: IPv4 and IPv6
LOOKUPS = 4  # at once, so that some that never answer do not hold up the rest
LOOKUP_S = 1.0  # a whole announcement needs none; a missing part comes within 120 ms
THREADS = LOOKUPS + 2  # those, and opening and announcing
SETTLE_S = 2.0  # after interfaces changed: IPv6 addresses are checked for a second before use
RETRY_S = 30.0  # after zeroconf failed
BUSY_CHECK_S = 5.0
BUSY_MAX = 0.2  # of a core, for zeroconf: thousands of services that come and go each second
BUSY_PAUSE_S = 60.0  # without mDNS then; the beacon goes on, at a cost that is bounded
CLOSE_S = 2.0  # it says good-bye three times in 0.3 s

_INSTANCE = re.compile(r"([a-z2-7]{26})\." + re.escape(SERVICE_TYPE))

T = TypeVar("T")


class Mdns:
    """Announces this node's mesh and hears of others', until cancelled.

    Args:
        me: This node, which does not hear itself.
        heard: Is told what is announced, and the host to reach it at, over and over.
    """

    def __init__(self, me: NodeId, *, heard: Callable[[Announcement, str], None]) -> None:
        self._instance = f"{show_id(me)}.{SERVICE_TYPE}"
        self._server = f"{show_id(me)}.local."
        self._heard = heard
        self._said: Announcement | None = None
        self._interfaces: tuple[Interface, ...] = ()
        self._changed = Watchable()
        self._session_number = 0
        self._known: dict[str, tuple[Announcement, list[str]]] = {}
        self._threads = trio.CapacityLimiter(THREADS)

    def use(self, interfaces: Sequence[Interface]) -> None:
        """From now on these are the interfaces to speak on and to hear from."""
        if tuple(interfaces) != self._interfaces:
            self._interfaces = tuple(interfaces)
            self.start_anew()

    def start_anew(self) -> None:
        """Forget all that was heard: this node is on another network."""
        self._known.clear()
        self._session_number += 1
        self._changed.notify()

    def say(self, announcement: Announcement | None) -> None:
        """From now on this is announced; None: nothing."""
        self._said = announcement
        self._changed.notify()

    async def run(self) -> None:
        """Announce and hear. Invariant: nothing that zeroconf raises comes out of here."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._repeat)
            pause_s = 0.0
            while True:
                await trio.sleep(pause_s)
                seen, interfaces = self._changed.count, self._interfaces
                try:
                    if interfaces:
                        pause_s = await self._session(interfaces)
                    else:
                        await self._changed.wait(seen)
                        pause_s = 0.0
                except Exception:  # the boundary around zeroconf: the node goes on without it
                    log.warning("mdns_failed", exc_info=True)
                    pause_s = RETRY_S

    async def _session(self, interfaces: tuple[Interface, ...]) -> float:
        """Announce and hear on these interfaces; returns how long to pause after that."""
        inbox, number = Inbox(), self._session_number
        # Not to be left to itself: who is cancelled meanwhile still has to close it.
        opened = await trio.to_thread.run_sync(_open, interfaces, limiter=self._threads)
        pause_s = SETTLE_S
        try:
            await self._in_thread(partial(_browse, opened, inbox))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._announce, opened, interfaces)
                for _ in range(LOOKUPS):
                    nursery.start_soon(self._look_up, opened, inbox)
                nursery.start_soon(self._end_when_anew, number, nursery.cancel_scope)
                await self._until_busy(opened)
                log.warning("mdns_paused", reason="too many announcements", pause_s=BUSY_PAUSE_S)
                pause_s = BUSY_PAUSE_S
                nursery.cancel_scope.cancel()
            return pause_s
        finally:
            self._known.clear()
            with trio.move_on_after(CLOSE_S, shield=True):
                await self._in_thread(opened.close)

    async def _end_when_anew(self, number: int, session: trio.CancelScope) -> None:
        seen = self._changed.count
        while self._session_number == number:
            seen = await self._changed.wait(seen)
        session.cancel()

    async def _until_busy(self, opened: Zeroconf) -> None:
        """Wait until zeroconf's thread used more of a core than all real services need."""
        before_s = used_s = 0.0
        while used_s - before_s <= BUSY_MAX * BUSY_CHECK_S:
            before_s = await self._in_thread(partial(_thread_time_s, opened))
            await trio.sleep(BUSY_CHECK_S)
            used_s = await self._in_thread(partial(_thread_time_s, opened))

    async def _in_thread(self, call: Callable[[], T]) -> T:
        """Call into zeroconf. Who is cancelled leaves the call to itself: closing ends it."""
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)

    async def _repeat(self) -> None:
        while True:
            for announcement, hosts in list(self._known.values()):
                for host in hosts:
                    self._heard(announcement, host)
            await trio.sleep(ANNOUNCE_INTERVAL_S)

    async def _announce(self, opened: Zeroconf, interfaces: tuple[Interface, ...]) -> None:
        registered: Announcement | None = None
        while True:
            seen, wanted = self._changed.count, self._said
            if wanted != registered:
                info = self._service(wanted or registered, interfaces)
                if wanted is None:
                    call = partial(opened.unregister_service, info)
                elif registered is None:
                    # Nobody else has this name, so no 0.6 s are spent on asking for one.
                    call = partial(opened.register_service, info, cooperating_responders=True)
                else:
                    call = partial(opened.update_service, info)
                await self._in_thread(call)
                registered = wanted
            await self._changed.wait(seen)

    def _service(self, said: Announcement | None, interfaces: tuple[Interface, ...]) -> ServiceInfo:
        from zeroconf import ServiceInfo

        assert said is not None
        own = [ip for interface in interfaces for ip in (*ipv4(interface), *ipv6(interface))]
        return ServiceInfo(
            SERVICE_TYPE,
            self._instance,
            port=said.port,
            properties=dict(said.to_properties()),
            server=self._server,
            host_ttl=TTL_S,
            other_ttl=TTL_S,
            parsed_addresses=[str(ip) for ip in own],
        )

    async def _look_up(self, opened: Zeroconf, inbox: Inbox) -> None:
        from zeroconf import ServiceInfo

        while True:
            name, is_there = await inbox.take()
            if not is_there:
                self._known.pop(name, None)
                continue
            if name == self._instance or (
                name not in self._known and len(self._known) >= KNOWN_MAX
            ):
                continue
            info = ServiceInfo(SERVICE_TYPE, name)
            try:
                if await self._in_thread(partial(info.request, opened, LOOKUP_S * 1000)):
                    self._found(name, info)
            except PeerError as exc:
                log.debug("service_refused", name=name, reason=str(exc))
            except Exception as exc:  # noqa: BLE001 - what a forged service makes zeroconf raise
                log.debug("service_unreadable", name=name, reason=repr(exc))

    def _found(self, name: str, info: ServiceInfo) -> None:
        announcement = read_properties(info.properties, info.port or 0)
        if f"{show_id(announcement.node)}.{SERVICE_TYPE}" != name:
            raise PeerError("a service under the name of another node")
        found = (on_link_host(self._interfaces, said) for said in info.parsed_scoped_addresses())
        hosts = list(dict.fromkeys(host for host in found if host is not None))
        hosts = [host for host in hosts if ":" not in host][:1] + [
            host for host in hosts if ":" in host
        ]
        self._known[name] = announcement, hosts[:ADDRESSES_MAX]
        for host in hosts[:ADDRESSES_MAX]:
            self._heard(announcement, host)


class Inbox:
    """Names of services that came or went, from zeroconf's thread to trio's. Bounded.

    Each name is held once, with its last state; a flood of names wakes trio once for many. The
    newest comes out first, so that a name does not wait until a flood before it is looked up.
    """

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._changes: dict[str, bool] = {}
        self._filled = Watchable()

    def put(self, name: str, *, is_there: bool) -> None:
        """Note that a service came, changed or went. May be called in any thread."""
        if not _INSTANCE.fullmatch(name):
            return
        with self._lock:
            is_first = not self._changes
            self._changes.pop(name, None)
            self._changes[name] = is_there
            if len(self._changes) > INBOX_MAX:
                del self._changes[next(iter(self._changes))]
        if is_first:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._filled.notify)

    async def take(self) -> tuple[str, bool]:
        """Wait for a name; returns it, and whether its service is there."""
        while True:
            seen = self._filled.count
            with self._lock:
                if self._changes:
                    return self._changes.popitem()
            await self._filled.wait(seen)


def _open(interfaces: Sequence[Interface]) -> Zeroconf:
    """Zeroconf on these interfaces, with IPv4 and IPv6, or with what there is of them.

    Raises:
        OSError: There is none of them.
    """
    from zeroconf import IPVersion, Zeroconf

    # It reports what others send; nothing there is for this node's user to act on.
    logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
    v4 = [str(ip) for interface in interfaces for ip in ipv4(interface)]
    v6 = [interface.index for interface in interfaces if ipv6(interface)]
    tries: list[tuple[list[Any], IPVersion]] = [
        ([*v4, *v6], IPVersion.All),
        (list(v4), IPVersion.V4Only),
        (list(v6), IPVersion.V6Only),
    ]
    if not v6:
        tries = tries[1:2]
    elif not v4:
        tries = tries[2:]
    failure: Exception = OSError("no interface has an address")
    for chosen, version in tries:
        try:
            return Zeroconf(interfaces=chosen, ip_version=version, use_asyncio=False)
        except (OSError, RuntimeError) as exc:
            failure = exc
    raise failure


def _thread_time_s(opened: Zeroconf) -> float:
    """How long zeroconf's thread has used a core; that takes as long as the thread is busy.

    Raises:
        queue.Empty: It does not come to an end of its work.
    """
    answer: queue.SimpleQueue[float] = queue.SimpleQueue()
    assert opened.loop is not None
    opened.loop.call_soon_threadsafe(lambda: answer.put(time.thread_time()))
    return answer.get(timeout=BUSY_CHECK_S)


def _browse(opened: Zeroconf, inbox: Inbox) -> None:
    from zeroconf import ServiceListener

    class Listener(ServiceListener):
        def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:  # noqa: ARG002
            inbox.put(name, is_there=True)

        def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:  # noqa: ARG002
            inbox.put(name, is_there=False)

        update_service = add_service

    # A listener, since closing does not end the thread of a browser of one's own.
    opened.add_service_listener(SERVICE_TYPE, Listener())

"""The gateway as a component: accepts clients and peers' streams, counts, and stops gracefully.

Rules: each connection lives inside its own error boundary, so that whatever one sends or does ends
with that connection. What arrives on the API port and what a peer sends go through the same code
(`api.py`); only the caller differs, and with it who may answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import h11
import structlog
import trio

from p2pmesh.gateway.api import CLIENT, Api, Caller, Kind
from p2pmesh.gateway.backends import Backends
from p2pmesh.gateway.client import ClientConnection, ClientGoneError
from p2pmesh.gateway.limits import REFUSED_MAX, RETRY_AFTER_S, Limits
from p2pmesh.gateway.openai import ApiError
from p2pmesh.gateway.proxy import AnswerBrokenError, Proxy
from p2pmesh.gateway.statistics import Counters, Statistics
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import Peer
from p2pmesh.web_policy import THIS_MACHINE, WebPolicy

# Junk is logged once in this time: a scanner must not fill the log.
JUNK_LOG_INTERVAL_S = 1.0

# A port, or what stands for one in a test.
L = TypeVar("L", bound=trio.abc.Listener[Any])

_log = structlog.get_logger(__name__)


class _Open:
    """One open connection: how to end it, and whether a request is under way on it.

    Attributes:
        caller: Who opened it.
    """

    def __init__(self, scope: trio.CancelScope, client: ClientConnection, caller: Caller) -> None:
        self.scope = scope
        self.client = client
        self.caller = caller
        self.busy = False
        self.idle_since = trio.current_time()


class Gateway:
    """The OpenAI-compatible API of one node.

    Args:
        backends: Who serves what, and the way there.
        limits: Bounds; the defaults are right for a node.
        rng: Draws between replicas.
        policy: Which names the API answers to, and which web pages may use it.
    """

    def __init__(
        self,
        backends: Backends,
        *,
        limits: Limits | None = None,
        rng: random.Random | None = None,
        policy: WebPolicy = THIS_MACHINE,
    ) -> None:
        self._limits = limits or Limits()
        self._counters = Counters()
        self._proxy = Proxy(
            backends,
            limits=self._limits,
            counters=self._counters,
            rng=rng or random.Random(),  # noqa: S311 - spreads load, keeps no secret
        )
        self._api = Api(
            backends,
            self._proxy,
            limits=self._limits,
            counters=self._counters,
            policy=policy,
        )
        self._open: dict[Kind, set[_Open]] = {"client": set(), "peer": set()}
        self._idle = trio.lowlevel.ParkingLot()
        self._accepting = trio.CancelScope()
        self._junk_logged_at = -JUNK_LOG_INTERVAL_S

    async def serve(
        self,
        listeners: Sequence[L],
        *,
        task_status: trio.TaskStatus[list[L]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept clients until cancelled. Closes the listeners at the end, or when draining."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._proxy.suspicion.run)
            nursery.start_soon(self._proxy.pool.run)
            nursery.start_soon(self._api.tell_peers)
            with self._accepting:
                await trio.serve_listeners(
                    self.serve_client,
                    list(listeners),
                    handler_nursery=nursery,
                    task_status=task_status,
                )
            await trio.sleep_forever()  # draining: requests still run, and peers still ask

    async def serve_client(self, stream: trio.abc.Stream) -> None:
        """Answer the requests of one client until it leaves; closes the stream."""
        await self._serve(stream, CLIENT)

    async def serve_peer(self, peer: Peer, stream: trio.abc.Stream) -> None:
        """Answer the requests of one stream that a peer opened, with local engines only.

        A peer that may only use the mesh is answered like a client: by whatever node can.

        Returns when the peer closes it; closes it on this side. Never raises for what a peer does.
        """
        is_guest = peer.credential is not None and peer.credential.role < Role.SERVE
        await self._serve(stream, Caller(peer.node, is_guest=is_guest))

    async def _serve(self, stream: trio.abc.Stream, caller: Caller) -> None:
        """Answer the requests of one connection until either side ends it, then close it."""
        with trio.CancelScope() as scope:
            connection = _Open(scope, ClientConnection(stream, self._limits), caller)
            connection.client.last = self._api.draining
            self._open[_crowd(caller)].add(connection)
            try:
                await self._guarded(connection)
            finally:
                self._open[_crowd(caller)].discard(connection)
                self._idle.unpark_all()
                await trio.aclose_forcefully(stream)

    async def _guarded(self, connection: _Open) -> None:
        """The error boundary of one connection."""
        client = connection.client
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.run_reader)
                await self._converse(connection)
                nursery.cancel_scope.cancel()
        except* Exception:  # noqa: BLE001 - whatever one connection does ends with it
            _log.exception("connection_failed", caller=connection.caller.kind)
        finally:
            self._counters.received_bytes += client.bytes_in
            self._counters.sent_bytes += client.bytes_out

    async def _converse(self, connection: _Open) -> None:
        """Requests and answers in turn; every expected end of a connection ends here."""
        client, caller = connection.client, connection.caller
        try:
            if beyond := self._beyond(connection):
                await self._api.refuse(client, _crowded())
                if beyond <= REFUSED_MAX:
                    await client.linger()
                return
            idle_s = self._limits.peer_first_head_s if caller.peer is not None else None
            while True:
                head = await client.next_request(idle_s)
                idle_s = None
                if head is None:
                    return
                connection.busy = True
                await self._api.handle(client, head, caller)
                connection.busy = False
                connection.idle_since = trio.current_time()
                self._idle.unpark_all()
                if not client.can_go_on:
                    await client.linger()
                    return
                if client.last:  # draining began too late for the answer to say so
                    return
        except h11.RemoteProtocolError as exc:
            await self._refuse_junk(client, exc)
        except ClientGoneError as exc:
            self._counters.clients_gone += 1
            _log.debug("client_left", why=str(exc))
        except AnswerBrokenError as exc:
            self._counters.failures += 1
            _log.warning("answer_broken", why=str(exc))

    def _beyond(self, newest: _Open) -> int:
        """How many there are beyond the bounds because `newest` came; 0 when it can stay.

        One that is idle gives way to it: of clients the one that has been so longest, of peers
        that of the peer with most streams, so that no peer locks the others out.
        """
        everybody = self._open[_crowd(newest.caller)]
        beyond = len(everybody) - self._limits.connections
        if newest.caller.peer is not None:
            own = sum(one.caller == newest.caller for one in everybody)
            if own > self._limits.peer_streams:
                return own - self._limits.peer_streams
        if beyond <= 0:
            return 0
        oldest = _idle_longest([one for one in everybody if one is not newest])
        if oldest is None:
            return beyond
        everybody.discard(oldest)
        oldest.scope.cancel()
        return 0

    async def _refuse_junk(self, client: ClientConnection, exc: h11.RemoteProtocolError) -> None:
        self._counters.junk += 1
        now = trio.current_time()
        if now - self._junk_logged_at >= JUNK_LOG_INTERVAL_S:
            self._junk_logged_at = now
            _log.info("junk_received", why=str(exc), total=self._counters.junk)
        if not client.can_answer:
            return
        status = exc.error_status_hint
        error = ApiError(status, f"This is not an HTTP request: {exc}", code="bad_request")
        try:
            await self._api.refuse(client, error)
            await client.linger()
        except ClientGoneError:
            return

    def _connections(self) -> list[_Open]:
        return [connection for found in self._open.values() for connection in found]

    def statistics(self) -> Statistics:
        """Return what was counted until now."""
        return self._counters.freeze(connections=len(self._connections()), queued=self._api.queued)

    async def drain(self, deadline_s: float) -> None:
        """Take no more requests, let the running ones end, cut those that do not.

        New connections are refused, new requests on old ones get 503; idle ones are closed.

        Args:
            deadline_s: How long the running ones have, in seconds.
        """
        self._api.draining = True
        self._accepting.cancel()
        await self._finish(self._connections, deadline_s)

    async def drain_peers(self, deadline_s: float) -> None:
        """End the streams of peers that are open now, as `drain` does; clients are not concerned.

        For a node that changes its mesh: streams that peers open later are served.
        """
        await self._proxy.pool.close_peers()
        leaving = frozenset(self._open["peer"])
        await self._finish(lambda: leaving & self._open["peer"], deadline_s)

    async def _finish(
        self, connections: Callable[[], Collection[_Open]], deadline_s: float
    ) -> None:
        """Let the running requests of connections end, and close the idle ones at once.

        Args:
            connections: Those of them that are still open.
            deadline_s: How long the running ones have, in seconds.
        """
        for connection in connections():
            connection.client.last = True
            if not connection.busy:
                connection.scope.cancel()
        with trio.move_on_after(deadline_s):
            while connections():
                await self._idle.park()
        for connection in connections():
            connection.scope.cancel()


def _crowd(caller: Caller) -> Kind:
    """Return the class of callers whose connections are bounded together."""
    return "client" if caller.peer is None else "peer"


def _idle_longest(connections: Collection[_Open]) -> _Open | None:
    """The idle connection that is missed least; None when all are busy."""
    streams = Counter(one.caller for one in connections)
    idle = [one for one in connections if not one.busy]
    return min(idle, key=lambda one: (-streams[one.caller], one.idle_since), default=None)


def _crowded() -> ApiError:
    message = "Too many connections; try again soon"
    return ApiError(503, message, code="overloaded", retry_after_s=RETRY_AFTER_S)

"""The gateway as a component: accepts clients and peers' streams, counts, and stops gracefully.

Rules: each connection lives inside its own error boundary, so that whatever one sends or does ends
with that connection. What arrives on the API port and what a peer sends go through the same code
(`api.py`); only the origin differs, and with it who may answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import h11
import structlog
import trio

from p2pmesh.gateway.api import Api, Origin
from p2pmesh.gateway.backends import Backends
from p2pmesh.gateway.client import ClientConnection, ClientGoneError
from p2pmesh.gateway.limits import RETRY_AFTER_S, Limits
from p2pmesh.gateway.openai import ApiError
from p2pmesh.gateway.proxy import AnswerBrokenError, Proxy
from p2pmesh.gateway.statistics import Counters, Statistics

# Junk is logged once in this time: a scanner must not fill the log.
JUNK_LOG_INTERVAL_S = 1.0

# A port, or what stands for one in a test.
L = TypeVar("L", bound=trio.abc.Listener[Any])

_log = structlog.get_logger(__name__)


class _Open:
    """One open connection: how to end it, and whether a request is under way on it."""

    def __init__(self, scope: trio.CancelScope, client: ClientConnection) -> None:
        self.scope = scope
        self.client = client
        self.busy = False
        self.idle_since = trio.current_time()


class Gateway:
    """The OpenAI-compatible API of one node.

    Args:
        backends: Who serves what, and the way there.
        limits: Bounds; the defaults are right for a node.
        rng: Draws between replicas.
        hosts: Public host names under which the API may be used, of a reverse proxy.
        origins: Web origins, besides this machine's, whose pages may use it.
    """

    def __init__(
        self,
        backends: Backends,
        *,
        limits: Limits | None = None,
        rng: random.Random | None = None,
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
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
            hosts=hosts,
            origins=origins,
        )
        self._open: dict[Origin, set[_Open]] = {origin: set() for origin in Origin}
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
        await self.serve_connection(stream, Origin.CLIENT)

    async def serve_peer_stream(self, stream: trio.abc.Stream) -> None:
        """Answer the requests of one stream that a peer opened, with local engines only.

        Returns when the peer closes it; closes it on this side. Never raises for what a peer does.
        """
        await self.serve_connection(stream, Origin.PEER)

    async def serve_connection(self, stream: trio.abc.Stream, origin: Origin) -> None:
        """Answer the requests of one connection until either side ends it, then close it."""
        with trio.CancelScope() as scope:
            connection = _Open(scope, ClientConnection(stream, self._limits))
            connection.client.last = self._api.draining
            self._open[origin].add(connection)
            try:
                await self._guarded(origin, connection)
            finally:
                self._open[origin].discard(connection)
                self._idle.unpark_all()
                await trio.aclose_forcefully(stream)

    async def _guarded(self, origin: Origin, connection: _Open) -> None:
        """The error boundary of one connection."""
        client = connection.client
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.run_reader)
                await self._converse(origin, connection)
                nursery.cancel_scope.cancel()
        except* Exception:  # noqa: BLE001 - whatever one connection does ends with it
            _log.exception("connection_failed", origin=origin.value)
        finally:
            self._counters.received_bytes += client.bytes_in
            self._counters.sent_bytes += client.bytes_out

    async def _converse(self, origin: Origin, connection: _Open) -> None:
        """Requests and answers in turn; every expected end of a connection ends here."""
        client = connection.client
        try:
            if not self._has_room(origin, connection):
                await self._api.refuse(client, _crowded())
                return
            while True:
                head = await client.next_request()
                if head is None:
                    return
                connection.busy = True
                await self._api.handle(client, head, origin)
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

    def _has_room(self, origin: Origin, newest: _Open) -> bool:
        """Whether `newest` can stay; the one that has been idle longest gives way to it."""
        everybody = self._open[origin]
        if len(everybody) <= self._limits.connections:
            return True
        idle = [one for one in everybody if not one.busy and one is not newest]
        if not idle:
            return False
        oldest = min(idle, key=lambda one: one.idle_since)
        everybody.discard(oldest)
        oldest.scope.cancel()
        return True

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
        """What was counted until now."""
        return self._counters.freeze(connections=len(self._connections()), queued=self._api.queued)

    async def drain(self, deadline_s: float) -> None:
        """Take no more requests, let the running ones end, cut those that do not.

        New connections are refused, new requests on old ones get 503; idle ones are closed.

        Args:
            deadline_s: How long the running ones have, in seconds.
        """
        self._api.draining = True
        self._accepting.cancel()
        for connection in self._connections():
            connection.client.last = True
            if not connection.busy:
                connection.scope.cancel()
        with trio.move_on_after(deadline_s):
            while self._connections():
                await self._idle.park()
        for connection in self._connections():
            connection.scope.cancel()


def _crowded() -> ApiError:
    message = "Too many connections; try again soon"
    return ApiError(503, message, code="overloaded", retry_after_s=RETRY_AFTER_S)

"""The bounds of the gateway, and the queue for requests beyond them.

Each bound is a named constant with its reason; `Limits` gathers them so that tests can be quick.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from p2pmesh.gateway.openai import ApiError

# From clients, and apart from them from peers, so that a crowd at the door locks nobody out.
# Each costs about 20 KiB; most systems give a process 1024 files, and engines and peers need some.
CONNECTIONS_MAX = 768
# Streams of one peer, which works for as many clients at once; the rest wait there. Together with
# the share below, so that twelve peers, or four on a machine with few descriptors, fill all places.
PEER_STREAMS_MAX = 64
PEER_STREAMS_SHARE = 4
# Connections beyond a bound that are told so in peace; those beyond these are cut at once.
REFUSED_MAX = 8
# Connections to replicas kept for the next request, all together: they cost files, here and there.
POOL_IDLE_MAX = 128
# Requests being answered at once, from clients, and apart from them from peers: two nodes that
# wait for each other's places with their own full would wait for ever.
IN_FLIGHT_MAX = 256
# Requests that wait for such a place; more than this would time out in the queue anyway.
QUEUE_MAX = 256
QUEUE_WAIT_S = 30.0
# Requests that wait for a replica to be ready again, with their bodies in memory.
WAITING_MAX = 256
# Connections to one engine beyond its slots, so that a free slot finds its next request waiting.
# Not more: llama-server has four threads beyond its slots for connections, and with more of them
# than threads, some wait until others have been idle for 5 s (measured at 64).
ENGINE_SPARE = 2
# Slots of an engine that did not say how many it has.
SLOTS_UNKNOWN = 4
# What a body may have: images in a chat are a few MiB each.
BODY_BYTES_MAX = 64 * 1024 * 1024
# All bodies of clients together, and apart from them of peers, so that no peer takes the memory for
# the chats of this node's own clients: four of the largest.
BODIES_BYTES_MAX = 256 * 1024 * 1024
# A request's head: long keys and cookies fit, floods do not.
HEAD_BYTES_MAX = 64 * 1024
# From the first byte of a head to its last; also for a connection that never says anything.
HEAD_DEADLINE_S = 15.0
# Between two requests. Longer than the 60 s that proxies and clients keep their own ends.
KEEP_ALIVE_IDLE_S = 75.0
# Before the first request on a peer's stream: a peer opens one when it has something to send.
PEER_FIRST_HEAD_S = 2.0
# How often a peer is told that its request is being worked on, and how long it waits for that or
# for an answer before it asks another node: two such words may be late or get lost in a pause.
PROCESSING_INTERVAL_S = 2.0
STALL_S = 5.0
# Between two pieces of a body, and what slow ones may be behind.
BODY_STALL_S = 30.0
# A client that takes nothing for so long is gone, whatever TCP thinks.
SEND_STALL_S = 30.0
# How long a refused client may go on sending before the connection is cut: time to read the answer.
LINGER_S = 2.0
# A model that is loading, or whose owner just died, is waited for so long.
READY_WAIT_S = 60.0
# One that failed or is served nowhere: long enough for the plan to change after an owner's death.
UNSERVED_WAIT_S = 3.0
# Seconds that a refused client is told to wait.
RETRY_AFTER_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one gateway; the constants of this module say why each is what it is."""

    connections: int = CONNECTIONS_MAX
    in_flight: int = IN_FLIGHT_MAX
    pool_idle: int = POOL_IDLE_MAX
    queue: int = QUEUE_MAX
    queue_wait_s: float = QUEUE_WAIT_S
    waiting: int = WAITING_MAX
    body_bytes: int = BODY_BYTES_MAX
    bodies_bytes: int = BODIES_BYTES_MAX
    head_bytes: int = HEAD_BYTES_MAX
    head_deadline_s: float = HEAD_DEADLINE_S
    keep_alive_idle_s: float = KEEP_ALIVE_IDLE_S
    body_stall_s: float = BODY_STALL_S
    send_stall_s: float = SEND_STALL_S
    linger_s: float = LINGER_S
    peer_first_head_s: float = PEER_FIRST_HEAD_S
    ready_wait_s: float = READY_WAIT_S
    unserved_wait_s: float = UNSERVED_WAIT_S

    @property
    def peer_streams(self) -> int:
        """How many streams one peer may have open."""
        return min(PEER_STREAMS_MAX, max(self.connections // PEER_STREAMS_SHARE, 1))


class Admission:
    """Lets a bounded number of requests in, queues a bounded number, refuses the rest."""

    def __init__(self, limits: Limits) -> None:
        self._places = trio.Semaphore(limits.in_flight)
        self._queue_max = limits.queue
        self._wait_s = limits.queue_wait_s
        self._queued = 0

    @property
    def queued(self) -> int:
        """How many requests wait for a place now."""
        return self._queued

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place while a request is answered.

        Raises:
            ApiError: 429, the queue is full, or no place came free in time.
        """
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            await self._wait()
        try:
            yield
        finally:
            self._places.release()

    async def _wait(self) -> None:
        if self._queued >= self._queue_max:
            raise _busy()
        self._queued += 1
        try:
            with trio.fail_after(self._wait_s):
                await self._places.acquire()
        except trio.TooSlowError as exc:
            raise _busy() from exc
        finally:
            self._queued -= 1


def _busy() -> ApiError:
    return ApiError(
        429,
        "This node answers as many requests as it can; try again soon",
        code="too_many_requests",
        retry_after_s=RETRY_AFTER_S,
    )

"""Finds a replica that answers, and passes its answer on as it comes.

Rules: bodies are bytes and stay what they are. Until the first byte has gone to the client, any
failure of a replica means the next one; after it, the answer breaks off visibly, never with a
clean end. A client that leaves cancels everything that is done for it, by closing the connection
to the engine. Knows models and replicas, not paths or JSON.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import h11
import structlog
import trio

from p2pmesh.errors import LinkError, MeshError
from p2pmesh.gateway.backends import Backends
from p2pmesh.gateway.breaker import Breaker
from p2pmesh.gateway.client import ClientConnection
from p2pmesh.gateway.connection_limit import ConnectionLimit
from p2pmesh.gateway.dialects import error_event
from p2pmesh.gateway.headers import Header, request_headers, response_headers
from p2pmesh.gateway.limits import (
    ENGINE_SPARE,
    PROCESSING_INTERVAL_S,
    RETRY_AFTER_S,
    SLOTS_UNKNOWN,
    STALL_S,
    Limits,
)
from p2pmesh.gateway.openai import ApiError, not_full, not_here, not_ready
from p2pmesh.gateway.pool import LostError, Pool, Upstream
from p2pmesh.gateway.route import LOADING, READY, ServedModel, Target, choose
from p2pmesh.gateway.scan import Body
from p2pmesh.gateway.statistics import Counters
from p2pmesh.gateway.suspicion import Deadline, SilenceError, SuspicionWatch
from p2pmesh.models.parts import PartId, ReplicaKey, is_full

# A long answer that is not streamed says nothing until it is done; an hour is a broken engine.
ANSWER_DEADLINE_S = 3600.0
# Between two pieces of an answer; an engine that thinks longer than this about a token is stuck.
SILENCE_DEADLINE_S = 600.0
# The request goes out at the speed of the network; nothing accepted for so long is a dead peer.
SEND_DEADLINE_S = 30.0
# When every replica failed and nothing changes: try them again, but not in a tight loop.
RETRY_PAUSE_S = 0.5
RETRY_FLOOR_S = 0.05
# A request that was the last of so many replicas is not given to another one.
LOSSES_MAX = 2
# Nor is one that so many different replicas failed to answer, for whatever reason.
FAILURES_MAX = 3
# The replica, or the owner's gateway, says that it cannot now; another may.
RETRYABLE = frozenset({502, 503, 504})
# An owner's gateway says with the first that its engine was lost, with the second that it has none
# or no room now, which is an answer and no failure.
LOST, BUSY = 502, 503
ENGINE_LOST = "engine_lost"
# Words of a peer that it works on a request, beyond one per interval: some may come together.
PROCESSING_SPARE = 10

_Part = h11.Event | type[h11.NEED_DATA]

_log = structlog.get_logger(__name__)


class AnswerBrokenError(MeshError):
    """The replica failed in the middle of its answer. The connection has to be closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRequest:
    """One request for a model.

    Attributes:
        path: The path under which engines know it.
        headers: Those of the client.
        extra_headers: Added to the answer (CORS).
        here_only: Only a local engine may answer: a peer asked, or the client wants it so.
        part: The part that has to answer: a peer chose it; None for any.
        wait: Whether to wait for a replica when there is none; a peer would rather go elsewhere.
        full_only: Whether only the whole model may answer, and no shard of it.
        beginning: Of its conversation; see `route.choose`.
    """

    method: str
    path: str
    headers: Sequence[Header]
    body: Body
    model: ServedModel
    extra_headers: Sequence[Header]
    here_only: bool
    wait: bool
    part: PartId | None = None
    full_only: bool = False
    beginning: object = None


class BusyError(LinkError):
    """The replica says that it cannot answer now. It is in order."""


class Proxy:
    """Answers jobs from replicas.

    Attributes:
        breaker: Which replicas failed or stalled requests of this node.
    """

    def __init__(
        self,
        backends: Backends,
        *,
        limits: Limits,
        counters: Counters,
        rng: random.Random,
    ) -> None:
        self._backends = backends
        self._limits = limits
        self._counters = counters
        self._rng = rng
        self._in_flight: Counter[ReplicaKey] = Counter()
        self._connection_limits: dict[ReplicaKey, ConnectionLimit] = {}
        self.pool = Pool(backends.connect, limits.pool_idle)
        self.suspicion = SuspicionWatch(backends.lost)
        self.breaker = Breaker()

    async def answer(self, client: ClientConnection, request: InferenceRequest) -> None:
        """Answer `request` on `client`, from whichever replica can.

        Raises:
            ApiError: None can; nothing was sent yet.
            AnswerBrokenError: The answer was begun and could not be finished.
            ClientGoneError: Nobody is left to answer.
        """
        tried: set[ReplicaKey] = set()
        failed: set[ReplicaKey] = set()
        failure, losses = "", 0
        waiting_since = math.inf
        while True:
            began = trio.current_time()
            target = choose(
                self._candidates(request),
                self._in_flight,
                self._rng,
                tried=tried,
                is_avoided=partial(self.breaker.is_avoided, now=began),
                beginning=request.beginning,
            )
            if target is None:
                waiting_since = min(waiting_since, trio.current_time())
                await self._wait_for_replica(
                    request, waiting_since, retry=bool(tried), failure=failure
                )
                tried.clear()
                continue
            self.breaker.attempted(target.key, began)
            try:
                await self._try_one(client, request, target)
            except LinkError as exc:
                now = trio.current_time()
                # Only silence is time that the replica wasted; others worked, or were waited for.
                lost_s = STALL_S if isinstance(exc, SilenceError) else 0.0
                self.breaker.failed(target.key, now, lost_s=lost_s)
                self._backends.failed(target.key)
                failure = f"{target.node_name}: {exc}"
                _log.debug(
                    "replica_failed", model=request.model.id, node=target.node_name, why=str(exc)
                )
                if client.started:
                    raise AnswerBrokenError(failure) from exc
                tried.add(target.key)
                self._counters.retries += 1
                losses += isinstance(exc, LostError)
                if losses >= (LOSSES_MAX if request.wait else 1):
                    raise _lost(request.model, failure) from exc
                if not isinstance(exc, BusyError):
                    failed.add(target.key)
                if len(failed) >= FAILURES_MAX:
                    raise _all_failed(request.model, failure) from exc
            else:
                return

    def is_promising(self, request: InferenceRequest) -> bool:
        """Whether a replica may answer the request that did not fail a moment ago."""
        now = trio.current_time()
        candidates = self._candidates(request)
        return not all(self.breaker.is_avoided(target.key, now) for target in candidates)

    def _candidates(self, request: InferenceRequest) -> Sequence[Target]:
        targets = self._backends.targets(request.model.digest)
        if request.full_only:
            digest = request.model.digest
            full = [one for one in targets if one.digest == digest and is_full(one.part.name)]
            if targets and not full:
                raise not_full(request.model, retry_after_s=RETRY_AFTER_S)
            targets = full
        if not request.here_only:
            return targets
        return [one for one in targets if one.local and request.part in (None, one.part)]

    async def _wait_for_replica(
        self, request: InferenceRequest, since: float, *, retry: bool, failure: str
    ) -> None:
        """Return when it is worth looking again.

        Args:
            request: What to wait for.
            since: When the request began to wait, on trio's clock.
            retry: Whether there are replicas, which all failed.
            failure: What the last one said.

        Raises:
            ApiError: 503, it is not worth waiting; 429, too many wait.
        """
        digest = request.model.digest
        offered = (model for model in self._backends.models() if model.digest == digest)
        model = next(offered, None) or _not_offered(request.model)
        limits, now = self._limits, trio.current_time()
        hopeful = model.state in (READY, LOADING)
        ends_at = since + (limits.ready_wait_s if hopeful else limits.unserved_wait_s)
        if request.here_only and request.part is None and model.state == READY and not failure:
            raise not_here(model)
        if not request.wait or now >= ends_at:
            raise not_ready(model, failure, retry_after_s=RETRY_AFTER_S)
        if self._counters.waiting >= limits.waiting:
            message = f"Too many requests wait for {model.id} to be ready; try again soon"
            code = "too_many_requests"
            raise ApiError(429, message, code=code, retry_after_s=RETRY_AFTER_S)
        self._counters.waiting += 1
        try:
            with trio.move_on_at(min(ends_at, now + RETRY_PAUSE_S) if retry else ends_at):
                await self._backends.changed()
            if retry:
                await trio.sleep_until(now + RETRY_FLOOR_S)
        finally:
            self._counters.waiting -= 1

    async def _try_one(
        self, client: ClientConnection, request: InferenceRequest, target: Target
    ) -> None:
        self._in_flight[target.key] += 1
        self._counters.in_flight[request.model.digest] += 1
        if target.local:
            self._backends.begin(target.part)
        try:
            with self.suspicion.deadline(target) as deadline:
                limit = self._limit(target)
                if not limit.acquire_nowait():
                    await self._wait_for_place(limit, target, deadline)
                try:
                    await self._exchange(client, request, target, deadline, limit)
                finally:
                    limit.release()
        finally:
            if target.local:
                self._backends.end(target.part)
            self._counters.in_flight[request.model.digest] -= 1
            self._in_flight[target.key] -= 1
            if not self._in_flight[target.key]:
                del self._in_flight[target.key]
                self._connection_limits.pop(target.key, None)

    async def _wait_for_place(
        self, limit: ConnectionLimit, target: Target, deadline: Deadline
    ) -> None:
        failures = self.breaker.failures(target.key)
        with deadline.wait(ANSWER_DEADLINE_S):
            await limit.acquire()
        if self.breaker.failures(target.key) > failures:
            limit.release()
            raise BusyError("it failed others while this request waited for it")

    def _limit(self, target: Target) -> ConnectionLimit:
        """Return the bound on connections to a replica; requests beyond it wait here, in turn.

        A client that leaves while it waits has cost the engine nothing. A peer gets twice what its
        engine takes: while one half is answered the other is there already.
        """
        slots = target.slots or SLOTS_UNKNOWN
        places = (slots + ENGINE_SPARE) * (1 if target.local else 2)
        limit = self._connection_limits.get(target.key)
        if limit is None:
            limit = self._connection_limits[target.key] = ConnectionLimit(slots, places)
        limit.resize(slots, places)
        return limit

    async def _exchange(
        self,
        client: ClientConnection,
        request: InferenceRequest,
        target: Target,
        deadline: Deadline,
        limit: ConnectionLimit,
    ) -> None:
        upstream, head = await self._ask(request, target, deadline)
        whole = False
        try:
            if head.status_code in RETRYABLE:
                kind = {LOST: LostError, BUSY: BusyError}.get(head.status_code, LinkError)
                raise kind(f"it answered {head.status_code}")
            silence_s = SILENCE_DEADLINE_S if target.local else STALL_S
            first = await self._first_parts(upstream, deadline, silence_s)
            self.breaker.succeeded(target.key)
            headers = response_headers(
                head.headers, served_by=f"{target.node_name}/{target.part.name}"
            )
            headers.extend(request.extra_headers)
            self._counters.responses[head.status_code] += 1
            client.start(head.status_code, headers, reason=head.reason)
            await self._relay(
                client, upstream, first, deadline, limit, ends_with_event=_takes_events(headers)
            )
            whole = True
        finally:
            if whole:
                await self.pool.release(upstream)
            else:
                await upstream.aclose()

    async def _ask(
        self, request: InferenceRequest, target: Target, deadline: Deadline
    ) -> tuple[Upstream, h11.Response]:
        """Send the request and wait for the head of the answer."""
        broken: LinkError | None = None
        idle = await self.pool.take(target)
        if idle is not None:
            try:
                return idle, await self._head(idle, request, target, deadline)
            except SilenceError:
                raise
            except LinkError as exc:
                if idle.at_work:
                    raise
                # Most likely it was closed while idle, which says nothing about the replica.
                broken = exc
                await trio.lowlevel.checkpoint()
        try:
            with deadline.wait(ANSWER_DEADLINE_S):
                fresh = await self.pool.open(target)
        except LinkError as exc:
            if target.local and isinstance(broken, LostError):  # the engine is gone since it got it
                raise LostError(str(exc)) from exc
            raise
        return fresh, await self._head(fresh, request, target, deadline)

    async def _head(
        self, upstream: Upstream, request: InferenceRequest, target: Target, deadline: Deadline
    ) -> h11.Response:
        key = self._backends.engine_key(target.part) if target.local else None
        headers = request_headers(
            request.headers,
            body_bytes=len(request.body),
            key=key,
            part=None if target.local else target.part,
        )
        began = trio.current_time()
        ends_at = began + ANSWER_DEADLINE_S
        heard = 0
        try:
            for piece in upstream.request(request.method, request.path, headers, request.body):
                with deadline.wait(min(SEND_DEADLINE_S, ends_at - trio.current_time())):
                    await upstream.send(piece)
            while True:
                now = trio.current_time()
                if heard > PROCESSING_SPARE + (now - began) / PROCESSING_INTERVAL_S:
                    raise LinkError("it says too often that it works on the request")
                # An engine that works on a long prompt is silent; a peer says that it does.
                patience_s = ends_at - now if target.local else min(STALL_S, ends_at - now)
                with deadline.wait(patience_s):
                    while (event := upstream.next_event()) is h11.NEED_DATA:
                        await upstream.receive()
                if isinstance(event, h11.Response):
                    deadline.answering = True
                    return event
                heard += 1
        except BaseException:
            await upstream.aclose()
            raise

    async def _first_parts(
        self, upstream: Upstream, deadline: Deadline, silence_s: float
    ) -> tuple[bytes, _Part]:
        """Return the beginning of the body, as far as it has come, and what follows it.

        All of it is looked at before the client is told anything: a failure still has a remedy.
        """
        while (event := upstream.next_event()) is h11.NEED_DATA:
            with deadline.wait(silence_s):
                await upstream.receive()
        data = b""
        while isinstance(event, h11.Data):
            data += event.data
            event = upstream.next_event()
        return data, event

    async def _relay(
        self,
        client: ClientConnection,
        upstream: Upstream,
        first: tuple[bytes, _Part],
        deadline: Deadline,
        limit: ConnectionLimit,
        *,
        ends_with_event: bool,
    ) -> None:
        """Pass on the answer, of which `first` has come already."""
        data, event = first
        try:
            if data:
                client.write(data)
            while True:
                if event is h11.NEED_DATA:
                    await client.flush(limit)
                    with deadline.wait(SILENCE_DEADLINE_S):
                        await upstream.receive()
                elif isinstance(event, h11.Data):
                    client.write(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    client.finish()
                    await client.flush(limit)
                    return
                event = upstream.next_event()
        except h11.LocalProtocolError as exc:  # more or less of a body than its head announced
            raise LinkError(f"its answer cannot be passed on: {exc}") from exc
        except LinkError as exc:
            if ends_with_event:
                lost = ApiError(502, f"The answer broke off: {exc}", code="answer_interrupted")
                # The last event may have been cut in two.
                client.write(b"\n\n" + error_event(lost, upstream.path))
                await client.flush()
            raise


def _not_offered(model: ServedModel) -> ServedModel:
    return replace(model, state="not served", reason="no node of this mesh has it any more")


def _lost(model: ServedModel, failure: str) -> ApiError:
    message = f"{model.id} was lost each time it was given this request ({failure})"
    return ApiError(LOST, message, code=ENGINE_LOST)


def _all_failed(model: ServedModel, failure: str) -> ApiError:
    message = f"{FAILURES_MAX} replicas of {model.id} failed to answer ({failure})"
    return ApiError(502, message, code="replicas_failed")


def _takes_events(headers: Sequence[Header]) -> bool:
    """Whether one more event can be added: it is a stream of them, of no announced length."""
    named = dict(headers)
    kind = named.get(b"content-type", b"").lower()
    return kind.startswith(b"text/event-stream") and b"content-length" not in named

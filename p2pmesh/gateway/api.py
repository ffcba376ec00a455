"""Answers one request after the other on a connection: the paths of the API.

Rules: a request is looked at in the order host, origin, path, method, body, model, so that nothing
is spent on one that is refused. A peer's request names the model by digest and is answered by a
local engine or not at all: there is no second hop, ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import h11
import structlog
import trio

from p2pmesh.gateway.backends import Backends
from p2pmesh.gateway.bodies import BodyBudget
from p2pmesh.gateway.client import ClientConnection, ClientGoneError
from p2pmesh.gateway.dialects import error_body
from p2pmesh.gateway.headers import PART, QUALITY, WHERE, Header, cors_headers, preflight_headers
from p2pmesh.gateway.limits import (
    PROCESSING_INTERVAL_S,
    RETRY_AFTER_S,
    Admission,
    Limits,
)
from p2pmesh.gateway.openai import (
    PARSE_BYTES_MAX,
    ApiError,
    Endpoint,
    InferenceEndpoint,
    ambiguous_model,
    find_endpoint,
    read_request,
    unknown_model,
    wrong_modality,
)
from p2pmesh.gateway.proxy import ENGINE_LOST, AnswerBrokenError, InferenceRequest, Proxy
from p2pmesh.gateway.route import ServedModel, rank_auto
from p2pmesh.gateway.scan import Body
from p2pmesh.gateway.statistics import Counters
from p2pmesh.identity.keys import NodeId
from p2pmesh.models.catalogue import AmbiguousModel, UnknownModel
from p2pmesh.models.parts import PartId, parse_part, takes_requests
from p2pmesh.web_policy import THIS_MACHINE, WebPolicy

# Long bodies are scanned one at a time: they compete with the event loop for the processor.
_SCANNERS = 1
# A request that names no model is given to so many, one after the other, until one answers.
AUTO_MODELS_MAX = 3

_log = structlog.get_logger(__name__)


Kind = Literal["client", "peer", "guest"]
KINDS: tuple[Kind, ...] = ("client", "peer", "guest")


@dataclass(frozen=True, slots=True)
class Caller:
    """The other end of a connection: a client of this node's API, a peer, or a guest.

    A guest is a node that may use the mesh and takes no part in it. It has clients of its own, for
    which this node does what it does for clients. Guests have places of their own: a request of
    theirs waits for places of peers, which must not wait for it.

    Attributes:
        peer: The node that the peer, or the guest, proved to be; None for a client.
        is_guest: Whether it is a guest.
    """

    peer: NodeId | None = None
    is_guest: bool = False

    @property
    def kind(self) -> Kind:
        """The class of callers that share bounds, as the log names it."""
        if self.peer is None:
            return "client"
        return "guest" if self.is_guest else "peer"


CLIENT = Caller()


class Api:
    """The paths of the API over one node's view of the mesh."""

    def __init__(
        self,
        backends: Backends,
        proxy: Proxy,
        *,
        limits: Limits,
        counters: Counters,
        policy: WebPolicy,
    ) -> None:
        self._backends = backends
        self._proxy = proxy
        self._counters = counters
        self._policy = policy
        self._bodies = {kind: BodyBudget(limits) for kind in KINDS}
        self._scanners = trio.CapacityLimiter(_SCANNERS)
        self._places = {kind: Admission(limits) for kind in KINDS}
        self._asking_peers: set[ClientConnection] = set()
        self.draining = False

    @property
    def queued(self) -> int:
        """Requests that wait for a place."""
        return sum(places.queued for places in self._places.values())

    async def handle(self, client: ClientConnection, head: h11.Request, caller: Caller) -> None:
        """Answer one request whose head was read.

        Raises:
            AnswerBrokenError, ClientGoneError, h11.RemoteProtocolError: The connection is over.
        """
        self._counters.requests += 1
        cors: list[Header] = []
        path = head.target.decode("latin-1")
        if caller.kind == "peer":
            self._asking_peers.add(client)
        try:
            if caller.kind != "peer":
                cors = self._check_page(head, caller)
            await self._dispatch(client, head, caller, cors)
        except ApiError as exc:
            await self.refuse(client, exc, cors, path=path)
        except (AnswerBrokenError, ClientGoneError, h11.RemoteProtocolError):
            raise
        except Exception:
            if not client.can_answer:
                raise
            _log.exception("request_failed", path=path[:200])
            client.last = True  # what state the connection is in, nobody knows
            await self.refuse(client, _unexpected(), cors, path=path)
        finally:
            self._asking_peers.discard(client)

    async def tell_peers(self) -> None:
        """Tell peers that their requests are being worked on, for as long as they are.

        So a peer can tell a long prompt from a node that does not respond. A request ends soon
        after its engine stops responding, and with it what is said here.
        """
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(PROCESSING_INTERVAL_S)
                for client in self._asking_peers:
                    nursery.start_soon(client.say_processing)

    async def refuse(
        self,
        client: ClientConnection,
        error: ApiError,
        extra: Sequence[Header] = (),
        *,
        path: str = "",
    ) -> None:
        """Answer with an error, in the shape that belongs to the path that was asked for."""
        headers = list(extra)
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % error.retry_after_s))
        await self._respond(client, error.status, error_body(error, path), headers)

    def _check_page(self, head: h11.Request, caller: Caller) -> list[Header]:
        """The CORS headers for the answer; refuses what a stranger's web page sends."""
        page = _header(head, b"origin")
        # A guest hands on what its clients ask of its own machine.
        policy = THIS_MACHINE if caller.is_guest else self._policy
        if refused := policy.refusal(_header(head, b"host"), page):
            raise ApiError(403, refused.message, code=refused.code)
        return cors_headers(page.encode("latin-1") if page else None)

    async def _dispatch(
        self, client: ClientConnection, head: h11.Request, caller: Caller, cors: list[Header]
    ) -> None:
        endpoint, name = find_endpoint(head.target.decode("latin-1"))
        if caller.kind == "peer" and not isinstance(endpoint, InferenceEndpoint):
            message = f"{endpoint.path} is for clients; peers read the records of the mesh"
            raise ApiError(403, message, code="not_for_peers")
        method = head.method.decode("latin-1")
        if method == "OPTIONS":
            methods = ", ".join([*_methods(endpoint), "OPTIONS"])
            asked = _header(head, b"access-control-request-headers")
            headers = preflight_headers(asked.encode("latin-1") if asked else None, methods)
            await self._respond(client, 204, b"", [*cors, *headers])
            return
        if method not in _methods(endpoint):
            message = f"{endpoint.path} takes {endpoint.method}, not {method[:20]}"
            raise ApiError(405, message, code="method_not_allowed")
        if self.draining:
            raise _stopping()
        if isinstance(endpoint, InferenceEndpoint):
            await self._infer(client, head, endpoint, caller, cors)
            return
        status, value = endpoint.describe(self._backends.models(), lambda: self._resolve(name))
        await self._respond(client, status, json.dumps(value).encode(), cors)

    async def _respond(
        self, client: ClientConnection, status: int, body: bytes, headers: Sequence[Header]
    ) -> None:
        self._counters.responses[status] += 1
        described = [*headers]
        if status != 204:
            described.append((b"content-type", b"application/json"))
            described.append((b"content-length", b"%d" % len(body)))
        client.start(status, described)
        if body:
            client.write(body)
        client.finish()
        await client.flush()

    async def _infer(
        self,
        client: ClientConnection,
        head: h11.Request,
        endpoint: InferenceEndpoint,
        caller: Caller,
        cors: list[Header],
    ) -> None:
        length = int(_header(head, b"content-length") or 0)
        bodies = self._bodies[caller.kind]
        bodies.check(length)
        body = await client.read_body(bodies, length)
        try:
            part = _chosen_part(head) if caller.kind == "peer" else None
            models, beginning = await self._models_for(head, body, endpoint, part)
            stays = caller.kind != "peer" and _stays_here(head)
            if stays and caller.is_guest:
                message = "The node that was asked runs no models, and the request may not leave it"
                raise ApiError(503, message, code="model_not_ready")
            here_only = caller.kind == "peer" or stays
            request = InferenceRequest(
                method=endpoint.method,
                path=endpoint.path,
                headers=list(head.headers),
                body=body,
                model=models[0],
                extra_headers=cors,
                here_only=here_only,
                part=part,
                wait=not here_only,
                full_only=caller.kind != "peer" and _wants_full(head),
                beginning=beginning,
            )
            with client.work():
                async with self._places[caller.kind].place():
                    await self._answer(client, request, models)
        finally:
            bodies.give_back(len(body))

    async def _answer(
        self, client: ClientConnection, request: InferenceRequest, models: Sequence[ServedModel]
    ) -> None:
        """Answer from the first of the models that can; the first is worth waiting for."""
        if len(models) == 1:
            await self._proxy.answer(client, request)
            return
        order = sorted(
            models, key=lambda m: not self._proxy.is_promising(replace(request, model=m))
        )
        for model in order:
            try:
                await self._proxy.answer(client, replace(request, model=model, wait=False))
            except ApiError as exc:
                if exc.code == ENGINE_LOST:  # the request may have killed it; one is enough
                    raise
            else:
                return
        await self._proxy.answer(client, replace(request, model=order[0]))

    async def _models_for(
        self, head: h11.Request, body: Body, endpoint: InferenceEndpoint, part: PartId | None
    ) -> tuple[Sequence[ServedModel], object]:
        """The models that a request may mean, best first, and how its conversation begins.

        That is the model of the part that a peer chose, if one did.
        """
        if part is not None:
            return [self._checked(self._by_digest(part.digest), endpoint)], None
        content_type = _header(head, b"content-type") or ""
        if len(body) > PARSE_BYTES_MAX:
            asked = await trio.to_thread.run_sync(
                read_request, body, content_type, limiter=self._scanners
            )
        else:
            asked = read_request(body, content_type)
        if asked.model is None:
            return self._auto(endpoint), asked.beginning
        return [self._checked(self._resolve(asked.model), endpoint)], asked.beginning

    def _checked(self, model: ServedModel, endpoint: InferenceEndpoint) -> ServedModel:
        """Refuse what the model cannot do; without its file that is left to the owner."""
        if model.certain and model.fit(endpoint.modalities) is None:
            raise wrong_modality(model, endpoint)
        return model

    def _auto(self, endpoint: InferenceEndpoint) -> Sequence[ServedModel]:
        ranked = rank_auto(self._backends.models(), endpoint.modalities)
        if ranked:
            return ranked[:AUTO_MODELS_MAX]
        wanted = " or ".join(endpoint.modalities)
        message = f"No model for {wanted} is ready in this mesh"
        raise ApiError(503, message, code="model_not_ready", retry_after_s=RETRY_AFTER_S)

    def _resolve(self, name: str) -> ServedModel:
        try:
            digest = self._backends.catalogue().resolve(name)
        except AmbiguousModel as exc:
            raise ambiguous_model(name, exc.choices) from exc
        except UnknownModel as exc:
            raise unknown_model(name, self._backends.models()) from exc
        return self._by_digest(digest)

    def _by_digest(self, digest: str) -> ServedModel:
        models = self._backends.models()
        for model in models:
            if model.digest == digest:
                return model
        raise unknown_model(digest, models)


def _unexpected() -> ApiError:
    return ApiError(500, "This node failed to answer; its log says why", code="internal_error")


def _stopping() -> ApiError:
    message = "This node is stopping; ask another one"
    return ApiError(503, message, code="stopping", retry_after_s=RETRY_AFTER_S)


def _methods(endpoint: Endpoint) -> Sequence[str]:
    return ("GET", "HEAD") if endpoint.method == "GET" else (endpoint.method,)


def _header(head: h11.Request, name: bytes) -> str | None:
    for key, value in head.headers.raw_items():  # faster than its pairs in lower case
        if key.lower() == name:
            return value.decode("latin-1")
    return None


def _chosen_part(head: h11.Request) -> PartId:
    """The part that a peer asks for."""
    text = _header(head, PART) or ""
    part = parse_part(text)
    if part is None or not takes_requests(part.name):
        message = f"No part of a model is called {text[:100]!r} here"
        raise ApiError(404, message, param="model", code="model_not_found")
    return part


def _stays_here(head: h11.Request) -> bool:
    """Whether the client forbids that its request leaves this machine."""
    return _choice(head, WHERE, "X-P2PMesh-Where", "mesh", "local")


def _wants_full(head: h11.Request) -> bool:
    """Whether the client takes answers of the whole model only."""
    return _choice(head, QUALITY, "X-P2PMesh-Quality", "any", "full")


def _choice(head: h11.Request, header: bytes, shown: str, usual: str, other: str) -> bool:
    """Whether a header that has two values has the other one than the usual."""
    said = _header(head, header) or usual
    if said.lower() not in (usual, other):
        message = f"{shown} is {other} or {usual}, not {said[:50]!r}"
        raise ApiError(400, message, code="bad_header")
    return said.lower() == other

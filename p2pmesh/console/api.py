"""The control API and the web page, as a quart-trio application.

Rules: whoever can open the console may read the status; nothing is changed, and no invite,
prompt or log is shown, without the token of `run.json`. Every answer under `/api/`, errors
too, is JSON. Knows the node only as a `ConsoleSource`, and nothing of listeners or hypercorn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Protocol

import structlog
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import (
    BadRequest,
    Conflict,
    Forbidden,
    HTTPException,
    InternalServerError,
    LengthRequired,
    NotFound,
    RequestEntityTooLarge,
    ServiceUnavailable,
    Unauthorized,
)

from p2pmesh.console import access
from p2pmesh.console.assets import load_assets, web_root
from p2pmesh.console.feed import Feed, FeedFull, SnapshotSource
from p2pmesh.errors import ConfigError, MeshError
from p2pmesh.web_policy import THIS_MACHINE, WebPolicy

BODY_BYTES_MAX = 64 * 1024  # nothing that may be sent here is longer than a form
BODY_TIMEOUT_S = 10
RESPONSE_TIMEOUT_S = 30  # of everything but the event stream

SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_log = structlog.get_logger(__name__)


class ConsoleSource(SnapshotSource, Protocol):
    """The part of a node that the console needs; `node.py` implements it."""

    @property
    def token(self) -> str:
        """The control token, as in `run.json`."""

    def stop(self) -> None:
        """Begin the node's graceful shutdown; returns at once."""

    async def order(self, name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Carry out what a person orders; see `node/orders.py`.

        Raises:
            MeshError: It cannot be done; the sentence says why.
        """


def create_app(node: ConsoleSource, *, policy: WebPolicy = THIS_MACHINE) -> QuartTrio:
    """Build the application for one node; reads the page's files, so it blocks shortly.

    Args:
        node: Whose status is shown and who is stopped.
        policy: Which names the console answers to, and which web pages may ask it.

    Raises:
        LocalError: The page's files are missing.
    """
    app = QuartTrio(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES_MAX
    app.config["BODY_TIMEOUT"] = BODY_TIMEOUT_S
    app.config["RESPONSE_TIMEOUT"] = RESPONSE_TIMEOUT_S
    _guard(app, policy)
    _serve_page(app)
    _serve_status(app, node)
    _serve_control(app, node)
    return app


def _guard(app: QuartTrio, policy: WebPolicy) -> None:
    async def check() -> None:
        headers = request.headers
        if refused := policy.refusal(headers.get("Host"), headers.get("Origin")):
            raise Forbidden(refused.message)
        if request.path.startswith("/api/") and access.foreign_fetch(headers):
            raise Forbidden("This node's API answers its own page only")
        if "Transfer-Encoding" in headers:
            # Newer quarts collect such a body without a bound until it ends.
            raise LengthRequired("A request here says how long it is")
        if (request.content_length or 0) > BODY_BYTES_MAX:
            raise RequestEntityTooLarge

    async def harden(response: Response) -> Response:
        response.headers.update(SECURITY_HEADERS)
        if "Cache-Control" not in response.headers:
            response.headers["Cache-Control"] = "no-store"
        return response

    app.before_request(check)
    app.after_request(harden)
    app.register_error_handler(HTTPException, _error_answer)
    app.register_error_handler(Exception, _failure_answer)


def _serve_page(app: QuartTrio) -> None:
    assets = load_assets(web_root())

    async def page(name: str = "index.html") -> Response:
        asset = assets.get(name)
        if asset is None:
            raise NotFound
        fresh = request.if_none_match.contains(asset.etag)
        response = Response(
            b"" if fresh else asset.content,
            HTTPStatus.NOT_MODIFIED if fresh else HTTPStatus.OK,
            content_type=asset.media_type,
        )
        response.set_etag(asset.etag)
        response.headers["Cache-Control"] = "no-cache"
        return response

    app.add_url_rule("/", "page", page)
    app.add_url_rule("/<name>", "asset", page)


def _serve_status(app: QuartTrio, node: ConsoleSource) -> None:
    feed = Feed(node)

    async def start() -> None:
        app.nursery.start_soon(feed.run)

    async def finish() -> None:
        feed.close()

    async def status() -> Response:
        return _json(node.snapshot())

    async def models() -> Response:
        return _json({"models": node.snapshot()["models"]})

    async def events() -> Response:
        if request.method == "HEAD":
            return Response(b"", content_type="text/event-stream")
        try:
            response = Response(feed.subscribe(), content_type="text/event-stream")
        except FeedFull as exc:
            raise ServiceUnavailable("Too many pages watch this node: close some") from exc
        response.timeout = None  # quart would end the stream after RESPONSE_TIMEOUT
        return response

    app.before_serving(start)
    app.after_serving(finish)
    app.add_url_rule("/api/status", "status", status)
    app.add_url_rule("/api/models", "models", models)
    app.add_url_rule("/api/events", "events", events)


def _serve_control(app: QuartTrio, node: ConsoleSource) -> None:
    async def stop() -> tuple[Response, int]:
        if not access.holds_token(request.headers, node.token):
            raise Unauthorized("This needs the token in this node's run.json")
        await request.get_data()  # drained, so that the connection can go on or end well
        _log.info("stop_requested")
        node.stop()
        return _json({"stopping": True}), HTTPStatus.ACCEPTED

    async def order(name: str) -> Response:
        if not access.holds_token(request.headers, node.token):
            raise Unauthorized("This needs the token in this node's run.json")
        values = _object(await request.get_data())
        try:
            return _json(await node.order(name, values))
        except ConfigError as exc:
            raise BadRequest(str(exc)) from exc
        except MeshError as exc:
            raise Conflict(str(exc)) from exc

    app.add_url_rule("/api/stop", "stop", stop, methods=["POST"])
    app.add_url_rule("/api/orders/<name>", "order", order, methods=["POST"])


async def _failure_answer(error: Exception) -> Response:
    _log.error("request_failed", path=request.path, exc_info=error)
    return await _error_answer(InternalServerError())


async def _error_answer(error: HTTPException) -> Response:
    code = error.code or HTTPStatus.INTERNAL_SERVER_ERROR
    response = _json({"error": {"code": code, "message": _sentence(error, code)}}, code)
    if code == HTTPStatus.METHOD_NOT_ALLOWED:
        response.headers["Allow"] = ", ".join(getattr(error, "valid_methods", None) or ())
    if code == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    if code in {HTTPStatus.LENGTH_REQUIRED, HTTPStatus.REQUEST_ENTITY_TOO_LARGE}:
        # The rest of the body is never read: a further request on it would hang.
        response.headers["Connection"] = "close"
    return response


def _sentence(error: HTTPException, code: int) -> str:
    match code:
        case HTTPStatus.NOT_FOUND:
            return f"There is no {request.path} here"
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return f"{request.path} does not take {request.method}"
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return f"The request is too long: at most {BODY_BYTES_MAX} bytes"
        case HTTPStatus.INTERNAL_SERVER_ERROR:
            return "This node failed to answer; its log says why"
        case _:
            return error.description or HTTPStatus(code).phrase


def _object(body: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise BadRequest("An order is a JSON object") from exc
    if not isinstance(value, dict):
        raise BadRequest("An order is a JSON object")
    return value


def _json(value: Any, status: int = HTTPStatus.OK) -> Response:
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Response(body, status, content_type="application/json")

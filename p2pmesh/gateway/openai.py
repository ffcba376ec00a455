"""The API's paths, what routing reads of a request, its errors, and the model list.

Pure. Bodies are read only as far as routing needs and are never written again: what a client sent
is what the engine gets. Every refusal is an `ApiError`; `dialects.py` knows its JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple
from urllib.parse import unquote

from p2pmesh.errors import MeshError
from p2pmesh.gateway.route import READY, ServedModel
from p2pmesh.gateway.scan import Body, top_level
from p2pmesh.models.catalogue import AUTO

# Longer bodies are scanned instead of parsed, and not on the event loop.
PARSE_BYTES_MAX = 256 * 1024

BEGINNING_BYTES = 4096  # of a prompt without messages, or a long body

# How many names an error lists; the rest is in /v1/models.
LISTED_MAX = 20

CHAT, COMPLETION, EMBEDDING, RERANK = "chat", "completion", "embedding", "rerank"


class ApiError(MeshError):
    """A request that is refused, as the client will see it.

    Attributes:
        status: The HTTP status.
        message: What is wrong and what to do, in a sentence.
        type: OpenAI's class of error.
        param: The part of the request that is at fault, if one is.
        code: A word that programs can match.
        retry_after_s: When to come again; None when that would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


_TYPES = {429: "rate_limit_error", 502: "server_error", 503: "service_unavailable_error"}


Described = tuple[int, dict[str, Any]]
"""A status and what the JSON of the answer holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceEndpoint:
    """A path that engines answer.

    Attributes:
        path: The canonical path, under which an engine knows it.
        modalities: Kinds of models that can answer, the most fitting first.
    """

    path: str
    modalities: tuple[str, ...]
    method: ClassVar[str] = "POST"


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoEndpoint:
    """A path that the gateway answers by itself.

    Attributes:
        path: The canonical path.
        describe: Makes the answer of all models, and of a way to the model that the path names.
    """

    path: str
    describe: Callable[[Sequence[ServedModel], Callable[[], ServedModel]], Described]
    method: ClassVar[str] = "GET"


Endpoint = InferenceEndpoint | InfoEndpoint


MODELS = InfoEndpoint(path="/v1/models", describe=lambda models, _: (200, model_list(models)))
MODEL = InfoEndpoint(path="/v1/models/{id}", describe=lambda _, named: (200, model_entry(named())))
HEALTH = InfoEndpoint(path="/health", describe=lambda models, _: health(models))
ENDPOINTS: tuple[Endpoint, ...] = (
    InferenceEndpoint(path="/v1/chat/completions", modalities=(CHAT, COMPLETION)),
    InferenceEndpoint(path="/v1/completions", modalities=(COMPLETION, CHAT)),
    InferenceEndpoint(path="/v1/responses", modalities=(CHAT, COMPLETION)),
    InferenceEndpoint(path="/v1/messages", modalities=(CHAT, COMPLETION)),
    InferenceEndpoint(path="/v1/messages/count_tokens", modalities=(CHAT, COMPLETION)),
    InferenceEndpoint(path="/v1/embeddings", modalities=(EMBEDDING,)),
    InferenceEndpoint(path="/v1/rerank", modalities=(RERANK,)),
    InferenceEndpoint(path="/apply-template", modalities=(CHAT, COMPLETION)),
    InferenceEndpoint(path="/tokenize", modalities=(CHAT, COMPLETION, EMBEDDING, RERANK)),
    InferenceEndpoint(path="/detokenize", modalities=(CHAT, COMPLETION, EMBEDDING, RERANK)),
    MODELS,
    MODEL,
    HEALTH,
)
# People write the base address with and without /v1; both mean the same.
_BY_PATH = {endpoint.path: endpoint for endpoint in ENDPOINTS}
_BY_PATH |= {endpoint.path.removeprefix("/v1"): endpoint for endpoint in ENDPOINTS}
_BY_PATH |= {"/v1" + endpoint.path.removeprefix("/v1"): endpoint for endpoint in ENDPOINTS}
_MODEL_PREFIXES = ("/v1/models/", "/models/")


def find_endpoint(target: str) -> tuple[Endpoint, str]:
    """The endpoint of a request target, and the model id in its path if it has one.

    Raises:
        ApiError: 404, no such path.
    """
    path = target.partition("?")[0]
    if path.startswith("http://"):  # the form that proxies are asked in, which servers must take
        path = "/" + path.removeprefix("http://").partition("/")[2]
    if len(path) > 1:
        path = path.rstrip("/")
    endpoint = _BY_PATH.get(path)
    if endpoint is not None and endpoint is not MODEL:
        return endpoint, ""
    for prefix in _MODEL_PREFIXES:
        if path.startswith(prefix):
            return MODEL, unquote(path[len(prefix) :])
    known = ", ".join(endpoint.path for endpoint in ENDPOINTS)
    raise ApiError(404, f"There is no {path[:200]} here; there are {known}", code="unknown_url")


class Asked(NamedTuple):
    """What routing reads of a request.

    Attributes:
        model: The model that it names; None when it leaves the choice to the mesh.
        beginning: How its conversation begins, which all turns of it share: bytes or JSON; None
            where nothing tells.
    """

    model: str | None
    beginning: Any


def read_request(body: Body, content_type: str) -> Asked:
    """Read of a request what routing needs.

    Long bodies take time: call it in a thread for more than `PARSE_BYTES_MAX` bytes.

    Args:
        body: The bytes as they came.
        content_type: The header as it came. JSON is taken under any name but a form's with parts,
            since curl and many scripts send it under none.

    Raises:
        ApiError: 400 or 415, the body is not a JSON object or its model is not a name.
    """
    if content_type.lower().startswith("multipart/"):
        raise ApiError(415, "This path takes JSON, not multipart/form-data", code="not_json")
    if isinstance(body, bytes) and not body.strip():
        raise ApiError(400, "The request has no body; send a JSON object", code="invalid_json")
    try:
        model, beginning = _read(body)
    except json.JSONDecodeError as exc:
        place = f"line {exc.lineno} column {exc.colno}"
        raise ApiError(
            400, f"The body is not JSON: {exc.msg} at {place}", code="invalid_json"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ApiError(400, f"The body is not JSON: {exc}", code="invalid_json") from exc
    if model is None or model == "":
        return Asked(None, beginning)
    if not isinstance(model, str):
        raise ApiError(400, "model must be a string", param="model", code="invalid_type")
    return Asked(None if model == AUTO else model, beginning)


def _read(body: Body) -> tuple[Any, Any]:
    """The model that a body names, whatever that is, and how its conversation begins.

    The beginning of a long body stands for that of its conversation: clients write each turn in
    the same order, and long ones begin with long messages.
    """
    if len(body) > PARSE_BYTES_MAX:
        return top_level(body, frozenset({"model"})).get("model"), bytes(body[:BEGINNING_BYTES])
    value = json.loads(bytes(body))
    if not isinstance(value, dict):
        raise ValueError("it must be an object")  # noqa: TRY004 - one kind for all that JSON can be
    return value.get("model"), _beginning(value)


def _beginning(value: Mapping[str, Any]) -> Any:
    """Return what does not change from turn to turn: all up to the first message of the user."""
    for key in ("messages", "input", "prompt"):
        said = value.get(key)
        if isinstance(said, str):
            return said[:BEGINNING_BYTES]
        if isinstance(said, list):
            ends = (
                place
                for place, one in enumerate(said, 1)
                if isinstance(one, dict) and one.get("role") == "user"
            )
            return said[: next(ends, 1)]
    return None


def unknown_model(name: str, models: Sequence[ServedModel]) -> ApiError:
    """404 for a model that nobody serves, with the names of those that are served."""
    listed = ", ".join(model.id for model in models[:LISTED_MAX]) or "none yet"
    message = f"The model {name[:200]!r} is not in this mesh; there are: {listed}"
    return ApiError(404, message, param="model", code="model_not_found")


def ambiguous_model(name: str, choices: Sequence[str]) -> ApiError:
    """409 for a name that several models share, with the ids that tell them apart."""
    message = f"Several models are called {name[:200]!r}; say which: {', '.join(choices)}"
    return ApiError(409, message, param="model", code="model_ambiguous")


def wrong_modality(model: ServedModel, endpoint: InferenceEndpoint) -> ApiError:
    """400 for a model that cannot do what the path asks."""
    wanted = " or ".join(endpoint.modalities)
    given = " and ".join(sorted(model.gives)) or "something else"
    message = f"{model.id} is a model for {given}; {endpoint.path} needs one for {wanted}"
    return ApiError(400, message, param="model", code="model_not_supported")


def not_full(model: ServedModel, *, retry_after_s: int) -> ApiError:
    """503 for a request that only the whole model may answer, where that is not served."""
    message = (
        f"{model.id} is served in expert shards or by a smaller quantisation only, and the request "
        "asks for full quality: no node runs it whole, and none as a pipeline"
    )
    return ApiError(503, message, code="full_quality_not_served", retry_after_s=retry_after_s)


def not_here(model: ServedModel) -> ApiError:
    """503 for a model that runs elsewhere, where the request may not leave this node."""
    where = f" but on {', '.join(model.nodes)}" if model.nodes else ""
    message = f"{model.id} does not run here{where}, and X-P2PMesh-Where: local keeps requests here"
    return ApiError(503, message, code="model_not_ready")


def not_ready(model: ServedModel, why: str, *, retry_after_s: int) -> ApiError:
    """503 for a model that is known and cannot answer now."""
    parts = [f"{model.id} cannot answer now ({model.state})", why, model.reason]
    message = ": ".join(part for part in parts if part)
    return ApiError(503, message, code="model_not_ready", retry_after_s=retry_after_s)


def model_entry(model: ServedModel) -> dict[str, Any]:
    """A model as /v1/models shows it: OpenAI's fields, the context, and ours under `p2pmesh`."""
    # Under the two names by which other servers say it, as far as it is known.
    context = dict.fromkeys(("context_length", "max_model_len"), model.context_tokens)
    return {
        "id": model.id,
        "object": "model",
        "created": model.created_s,
        "owned_by": "p2pmesh",
        **(context if model.context_tokens else {}),
        "p2pmesh": {
            "state": model.state,
            "reason": model.reason,
            "gives": sorted(model.gives),
            "digest": model.digest,
            "context": model.context_tokens,
            "size_bytes": model.size_bytes,
            "nodes": list(model.nodes),
            "layout": model.layout,
            "served_as": model.served_as or None,
            "shards": None if model.shards is None else asdict(model.shards),
        },
    }


def model_list(models: Sequence[ServedModel]) -> dict[str, Any]:
    """The answer of /v1/models: all models of the mesh, ready ones first."""
    ordered = sorted(models, key=lambda model: model.state != READY)
    return {"object": "list", "data": [model_entry(model) for model in ordered]}


def health(models: Sequence[ServedModel]) -> Described:
    """Status and body of /health: 200 as soon as something can answer, as llama-server has it."""
    ready = sum(model.state == READY for model in models)
    if ready:
        return 200, {"status": "ok", "models": ready}
    return 503, {"status": "no model is ready", "models": 0}

from __future__ import annotations

import json

import pytest

from p2pmesh.gateway.dialects import error_body, error_event
from p2pmesh.gateway.openai import ENDPOINTS, ApiError

ERROR = ApiError(404, "There is no such model", code="model_not_found", param="model")
OPENAI = {
    "message": "There is no such model",
    "type": "invalid_request_error",
    "param": "model",
    "code": "model_not_found",
}
ANTHROPIC = {
    "type": "error",
    "error": {"type": "not_found_error", "message": "There is no such model"},
}


def is_anthropic(path: str) -> bool:
    return "error" in json.loads(error_body(ERROR, path)).get("type", "")


def test_each_path_has_the_shape_of_its_api() -> None:
    paths = {endpoint.path for endpoint in ENDPOINTS}
    others = {path for path in paths if is_anthropic(path)}
    assert others == {"/v1/messages", "/v1/messages/count_tokens"}
    for path in paths - others:
        assert json.loads(error_body(ERROR, path)) == {"error": OPENAI}
    for path in [*others, "/messages", "/v1/messages?beta=true", "/v1/messages/batches"]:
        assert json.loads(error_body(ERROR, path)) == ANTHROPIC
    assert not is_anthropic("/v1/messagesque")
    assert not is_anthropic("")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (403, "permission_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_anthropics_kinds_of_errors(status: int, kind: str) -> None:
    shape = json.loads(error_body(ApiError(status, "no"), "/v1/messages"))
    assert shape == {"type": "error", "error": {"type": kind, "message": "no"}}


def fields_of(event: bytes) -> tuple[str, dict[str, object]]:
    """The kind and the data of a server-sent event."""
    lines = event.decode().removesuffix("\n\n").split("\n")
    named = dict(line.split(": ", 1) for line in lines)
    return named.get("event", ""), json.loads(named["data"])


def test_a_stream_ends_with_an_error_that_its_client_reads() -> None:
    assert fields_of(error_event(ERROR, "/v1/chat/completions")) == ("", {"error": OPENAI})
    assert fields_of(error_event(ERROR, "/v1/messages")) == ("error", ANTHROPIC)
    kind, fields = fields_of(error_event(ERROR, "/v1/responses"))
    assert kind == fields["type"] == "error"
    assert (fields["message"], fields["code"]) == ("There is no such model", "model_not_found")

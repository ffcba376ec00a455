"""Errors in the shapes that clients of each API know.

Pure. llama-server answers in three APIs; a client of one of them understands an error in its own
shape only. Which one a request belongs to follows from its path, known or not.
"""

from __future__ import annotations

import json
from typing import Any

from p2pmesh.gateway.openai import ApiError

_MESSAGES = ("/v1/messages", "/messages")
_RESPONSES = ("/v1/responses", "/responses")

# Anthropic's names of errors, by status.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: ApiError, path: str) -> bytes:
    """The JSON of an error that is the whole answer to a request for `path`."""
    if _is_below(path, _MESSAGES):
        return _json(_anthropic(error))
    return _json(_openai(error))


def error_event(error: ApiError, path: str) -> bytes:
    """The error as one event of a stream that had already begun."""
    if _is_below(path, _MESSAGES):
        return b"event: error\ndata: " + _json(_anthropic(error)) + b"\n\n"
    if _is_below(path, _RESPONSES):
        fields = {**_openai(error)["error"], "type": "error"}
        return b"event: error\ndata: " + _json(fields) + b"\n\n"
    return b"data: " + _json(_openai(error)) + b"\n\n"


def _is_below(path: str, prefixes: tuple[str, ...]) -> bool:
    path = path.partition("?")[0]
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def _openai(error: ApiError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def _anthropic(error: ApiError) -> dict[str, Any]:
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, usual)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()

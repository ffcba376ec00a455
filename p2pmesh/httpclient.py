"""One HTTP request to a node on this machine, for the command line. Blocking, run in a thread."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import partial
from typing import Any

import trio

from p2pmesh.errors import LinkError, MeshError

TIMEOUT_S = 300.0


async def post_json(url: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """POST a JSON body; the answer's JSON and its headers, names in lower case.

    Raises:
        MeshError: The node answered with an error; its own sentence.
        LinkError: It did not answer.
    """
    return await trio.to_thread.run_sync(partial(_post, url, body), abandon_on_cancel=True)


def _post(url: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    request = urllib.request.Request(  # noqa: S310 - the scheme is our own
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
            answer: dict[str, Any] = json.load(response)
            return answer, {name.lower(): value for name, value in response.headers.items()}
    except urllib.error.HTTPError as exc:
        with exc:
            raise MeshError(_sentence(exc.read())) from exc
    except (OSError, ValueError) as exc:
        raise LinkError(f"{url} does not answer: {exc}") from exc


def _sentence(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:500]

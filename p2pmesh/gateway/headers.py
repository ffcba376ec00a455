"""Which HTTP headers cross the gateway, in both directions.

Pure. What belongs to one connection stays on it, a client's secrets stay here, and what the mesh
says in headers of its own cannot be forged by a client or an engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote

from p2pmesh.models.parts import PartId

Header = tuple[bytes, bytes]

SERVED_BY = b"x-p2pmesh-served-by"
WHERE = b"x-p2pmesh-where"
QUALITY = b"x-p2pmesh-quality"
# From entry node to owner only: the part that the entry node chose for the model's name.
PART = b"x-p2pmesh-part"

_OURS = b"x-p2pmesh-"
_EXPOSED = b"X-P2PMesh-Served-By, Retry-After"

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# Written anew for each hop, of no use to an engine, or a secret between the client and us.
_NOT_FORWARDED = _HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"expect",
    b"authorization",
    b"x-api-key",
    b"cookie",
    b"origin",
    b"referer",
}
# CORS is decided here; a cookie of an engine would be set for every node on this address.
_NOT_RETURNED = _HOP_BY_HOP | {b"server", b"set-cookie", b"vary"}


def _passed_on(headers: Iterable[Header], dropped: frozenset[bytes]) -> list[Header]:
    """The headers without those dropped, ours, and those that Connection says end here."""
    kept: list[Header] = []
    ending: set[bytes] = set()
    for header in headers:
        name, value = header
        if name == b"connection":
            ending.update(token.strip().lower() for token in value.split(b","))
        elif name not in dropped and not name.startswith(_OURS):
            kept.append(header)
    return [header for header in kept if header[0] not in ending] if ending else kept


def request_headers(
    headers: Iterable[Header], *, body_bytes: int, key: str | None, part: PartId | None
) -> list[Header]:
    """The headers for an engine, or for the owner of one.

    Args:
        headers: Those of the client, names in lower case.
        body_bytes: The length of the body that goes with them.
        key: The engine's own API key, for a local engine.
        part: What was chosen there, for a peer.
    """
    kept = _passed_on(headers, _NOT_FORWARDED)
    kept.append((b"host", b"p2pmesh"))
    kept.append((b"content-length", b"%d" % body_bytes))
    if key is not None:
        kept.append((b"authorization", b"Bearer " + key.encode("latin-1")))
    if part is not None:
        kept.append((PART, str(part).encode("ascii")))
    return kept


def response_headers(headers: Iterable[Header], *, served_by: str) -> list[Header]:
    """The headers of an answer on its way to the client.

    Args:
        headers: Those of the engine or the owner, names in lower case.
        served_by: `node/shard`, by what this node knows: a peer could say anything.
    """
    headers = list(headers)
    dropped = _NOT_RETURNED
    if any(name == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}  # the encoding counts; RFC 9112, section 6.3
    kept = [
        header
        for header in _passed_on(headers, dropped)
        if not header[0].startswith(b"access-control-")
    ]
    kept.append((SERVED_BY, quote(served_by, safe="/ ").encode("ascii")))
    return kept


def cors_headers(origin: bytes | None) -> list[Header]:
    """Return the headers that let an allowed origin's page read the answer; none for programs."""
    if origin is None:
        return []
    return [
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", _EXPOSED),
        (b"vary", b"Origin"),
    ]


def preflight_headers(asked: bytes | None, methods: str) -> list[Header]:
    """The rest of the answer to a browser that asks whether it may.

    Args:
        asked: Its Access-Control-Request-Headers.
        methods: Those of the path, with commas.
    """
    headers = [
        (b"allow", methods.encode("ascii")),
        (b"access-control-allow-methods", methods.encode("ascii")),
        (b"access-control-allow-private-network", b"true"),
        (b"access-control-max-age", b"600"),
    ]
    if asked is not None:
        headers.append((b"access-control-allow-headers", asked))
    return headers

"""Who may ask the console for what: pure decisions over request headers.

Rules: a browser that shows somebody else's page must neither read nor call this node, so names
that anybody can point at this address (DNS rebinding) and foreign origins are refused. Whoever
can open the console may read the status; only the holder of the token may change anything.
Knows nothing of quart, sockets or the node.
"""

from __future__ import annotations

import hmac
import ipaddress

from werkzeug.datastructures import Headers

BEARER = "Bearer "


def host_names(hostname: str) -> frozenset[str]:
    """The names under which this machine's own users reach it, beside IP addresses.

    Args:
        hostname: What the system calls this machine.
    """
    full = hostname.lower().rstrip(".")
    short = full.partition(".")[0]
    return frozenset({"localhost", full, short, f"{short}.local"} - {"", ".local"})


def host_allowed(host: str, names: frozenset[str]) -> bool:
    """Whether a `Host` header names this machine in a way that no foreign DNS can forge."""
    name = _without_port(host).lower().rstrip(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return True


def refusal(headers: Headers, names: frozenset[str]) -> str | None:
    """Why a request is not for this node or not from its own page; None when it is fine.

    Args:
        headers: The request's.
        names: The result of `host_names`.
    """
    host = headers.get("Host", "")
    if not host_allowed(host, names):
        return "Open the console by this machine's IP address, its name, or localhost"
    origin = headers.get("Origin")
    if origin is not None and origin.lower() != f"http://{host}".lower():
        return "This node answers its own page only, not one from elsewhere"
    return None


def foreign_fetch(headers: Headers) -> bool:
    """Whether a browser says that another site's page makes this call; for API paths only.

    Opening the console itself from a link elsewhere is harmless, so pages do not ask this.
    """
    return headers.get("Sec-Fetch-Site", "none").lower() not in {"none", "same-origin"}


def holds_token(headers: Headers, token: str) -> bool:
    """Whether the request carries the control token; takes equally long for every wrong one."""
    given = headers.get("Authorization", "")
    if not token or not given.startswith(BEARER):
        return False
    return hmac.compare_digest(given[len(BEARER) :].encode(), token.encode())


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host

"""Which web pages may use the API, decided from the Host and Origin headers of a request.

Pure. The API asks for no password by default, and any page that a user visits can make the browser
send requests to it. So a page is let in only when it is served by this machine, by the very
address that the request went to, or by a desktop application; every other origin gets 403
before any work is done, and no CORS header. Programs send no Origin and are not concerned.

A page can also have its own name point here (DNS rebinding); the browser then thinks it is the
page's own server and sends no Origin. Therefore the Host must be an address, or a name that
nobody can register on the public net.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from p2pmesh.gateway.openai import ApiError

# Names under these cannot be bought: reserved for this machine, the local network or containers.
PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")

# Pages inside desktop applications; they are installed, not visited.
APPLICATION_SCHEMES = frozenset({"app", "tauri", "vscode-webview", "vscode-file"})


def check_host(host: str | None, allowed: Collection[str] = ()) -> None:
    """Refuse a Host that is a public name.

    Args:
        host: The header, or None when there is none (HTTP/1.0).
        allowed: Further names, of a reverse proxy for example.

    Raises:
        ApiError: 403.
    """
    if host is None:
        return
    name = _name(host)
    if not (is_private(name) or name in allowed):
        raise ApiError(
            403,
            f"Requests for the host {name[:200]!r} are refused, since any web page could send them;"
            " use an IP address or localhost",
            code="host_not_allowed",
        )


def allowed_origin(origin: str | None, host: str | None, allowed: Collection[str] = ()) -> bool:
    """Whether a page of this origin may use the API; a request without one always may.

    Args:
        origin: The Origin header.
        host: The Host header, after `check_host`.
        allowed: Further origins, spelt as browsers send them.
    """
    if origin is None or origin in allowed:
        return True
    try:
        parts = urlsplit(origin)
        name = parts.hostname or ""
    except ValueError:
        return False
    if parts.scheme in APPLICATION_SCHEMES:
        return True
    if parts.scheme not in ("http", "https") or not name:
        return False
    if name == "localhost" or name.endswith(".localhost") or _is_loopback(name):
        return True
    return host is not None and name == _name(host)


def is_private(name: str) -> bool:
    """Whether a host name is an address or cannot belong to a stranger's web site."""
    if not name or "." not in name or name.endswith(PRIVATE_SUFFIXES):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """The lower-case name of a Host header, without its port and brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name = host.rpartition(":")[0] if ":" in host else host
    return name.rstrip(".")

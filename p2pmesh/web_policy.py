"""Which web pages may use this node's API and console, by a request's Host and Origin headers.

Pure. Neither port asks for a password by default, and any page that a user visits can make the
browser send requests to them. So a page is let in only when it is served by this machine, by the
very address that the request went to, by a desktop application, or by an origin that the settings
name; every other origin gets 403 before any work is done, and no CORS header. Programs send no
Origin and are not concerned.

A page can also have its own name point here (DNS rebinding); the browser then thinks it is the
page's own server and sends no Origin. Therefore the Host must be an address, a name that nobody
can register on the public net, this machine's own, or one that the settings name.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

# Names under these cannot be bought: reserved for this machine, the local network or containers.
PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")

# Pages inside desktop applications; they are installed, not visited.
APPLICATION_SCHEMES = frozenset({"app", "tauri", "vscode-webview", "vscode-file"})

SHOWN_CHARS_MAX = 200  # of a header, in a sentence

_HOST = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,252}")  # as long as a name can be in DNS
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]{0,63})://[a-z0-9_.:\[\]-]{1,260}")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}  # browsers leave these out


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request gets 403.

    Attributes:
        code: A word that programs can match.
        message: What is wrong and which setting lets such requests in, in a sentence.
    """

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WebPolicy:
    """The names and pages that a node accepts besides those that are always safe.

    Attributes:
        hosts: This machine's own name, and those of a reverse proxy; as `parse_host` spells them.
        origins: Origins of further web pages, as `parse_origin` spells them.
    """

    hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def refusal(self, host: str | None, origin: str | None) -> Refusal | None:
        """Return why a request with these headers is refused; None when it is fine.

        Args:
            host: The Host header, or None when there is none (HTTP/1.0).
            origin: The Origin header; None when no web page sends the request.
        """
        if host is not None and not self._knows(_name(host)):
            return _unknown_host(_name(host))
        if origin is not None and not self._lets_in(origin, host):
            return _unknown_origin(origin)
        return None

    def _knows(self, name: str) -> bool:
        return _is_private(name) or name in self.hosts

    def _lets_in(self, origin: str, host: str | None) -> bool:
        if origin.lower() in self.origins:
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


THIS_MACHINE = WebPolicy()
"""Without any setting."""


def parse_host(text: str) -> str:
    """A host name as browsers send it: in lower case and ASCII, without a port.

    Raises:
        ValueError: The sentence says what is wrong with `text`.
    """
    name = _ascii(text.strip().lower().rstrip("."))
    if not _HOST.fullmatch(name):
        raise ValueError(
            f"{text!r} is not a host name: write it without scheme and port, like ai.example.org"
        )
    return name


def parse_origin(text: str) -> str:
    """The origin of a web page as browsers send it: in lower case and ASCII, without a path.

    Raises:
        ValueError: The sentence says what is wrong with `text`.
    """
    scheme, separator, rest = text.strip().lower().removesuffix("/").partition("://")
    origin = f"{scheme}{separator}{_ascii(rest)}"
    match = _ORIGIN.fullmatch(origin)
    if match is None:
        raise ValueError(
            f"{text!r} is not a web page's origin: write it like https://ai.example.org"
        )
    return origin.removesuffix(_DEFAULT_PORTS.get(match[1], "/"))


def _unknown_host(name: str) -> Refusal:
    message = (
        f"This node is not called {name[:SHOWN_CHARS_MAX]!r}, and any web page could give it such a"
        " name: use an IP address or localhost"
    )
    with contextlib.suppress(ValueError):  # no setting can name it
        message += f", or start the node with --hosts {parse_host(name)}"
    return Refusal("host_not_allowed", message)


def _unknown_origin(origin: str) -> Refusal:
    message = f"Web pages from {origin[:SHOWN_CHARS_MAX]!r} may not use this node"
    with contextlib.suppress(ValueError):  # no setting can name it
        message += f"; to let them, start it with --origins {parse_origin(origin)}"
    return Refusal("origin_not_allowed", message)


def _is_private(name: str) -> bool:
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


def _ascii(text: str) -> str:
    """As DNS spells it; "" when it cannot."""
    try:
        return text.encode("idna").decode("ascii")
    except UnicodeError:
        return ""

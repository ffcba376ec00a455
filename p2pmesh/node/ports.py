"""Listening: at the address asked for, or next to a default that is taken."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from typing import cast

import trio

from p2pmesh.config import PORT_MAX, Address
from p2pmesh.errors import LocalError

NEIGHBOURS_MAX = 50  # ports tried after a default; so many nodes on one machine are a test
FREE_TRIES = 20  # for a port that is free in both families; one is almost always
BOTH, ALL_IPV4 = "::", "0.0.0.0"  # noqa: S104 - other machines are let in where the user wants it
# The machine, or its kernel, goes without that family.
_NO_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})


@dataclass(frozen=True, slots=True)
class Listening:
    """Bound listeners and where they are; `::` stands for both families, all addresses."""

    listeners: list[trio.SocketListener]
    address: Address

    def lend(self) -> list[trio.SocketListener]:
        """Return the listeners for one who serves them, in a way that leaves them open at the end.

        trio closes what it serves. Connections that come until somebody accepts again wait in the
        system's queue, instead of being refused.
        """
        return [cast("trio.SocketListener", _LentListener(one)) for one in self.listeners]

    def close(self) -> None:
        """Give the port back, whether or not anybody served it."""
        for listener in self.listeners:
            listener.socket.close()


class _LentListener(trio.abc.Listener[trio.SocketStream]):
    """A listener that is not closed by those who accept from it; trio's own cannot be derived."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener
        self.socket = listener.socket

    async def accept(self) -> trio.SocketStream:
        return await self._listener.accept()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def listen(name: str, wanted: Address, *, exact: bool) -> Listening:
    """Listen at `wanted`.

    Args:
        name: The setting, for the error.
        wanted: Port 0 takes a free one.
        exact: Whether the user named it; a default that is taken moves to the next free port.

    Raises:
        LocalError: It cannot be had.
    """
    last = wanted.port if exact else min(wanted.port + NEIGHBOURS_MAX, PORT_MAX)
    port = wanted.port
    while True:
        try:
            listeners = await _bind(wanted.host, port)
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE and port < last:
                port += 1
                continue
            raise LocalError(
                f"Cannot listen on {wanted} ({_reason(exc)}); "
                f"choose another with --{name} HOST:PORT"
            ) from exc
        named = listeners[-1 if wanted.host == BOTH else 0]
        host, bound = named.socket.getsockname()[:2]
        return Listening(listeners, Address(host, bound))


async def _bind(host: str, port: int) -> list[trio.SocketListener]:
    """Return listeners at one port; for `::` that of IPv4 and then that of IPv6.

    A machine without one of the families listens on the other.
    """
    if host != BOTH:
        return await trio.open_tcp_listeners(port, host=host)
    for tries_left in reversed(range(FREE_TRIES if port == 0 else 1)):
        try:
            first = await trio.open_tcp_listeners(port, host=ALL_IPV4)
        except OSError as exc:
            if exc.errno not in _NO_FAMILY:
                raise
            return await trio.open_tcp_listeners(port, host=BOTH)
        bound = first[0].socket.getsockname()[1]
        try:
            return [*first, *await trio.open_tcp_listeners(bound, host=BOTH)]
        except OSError as exc:
            if exc.errno in _NO_FAMILY or isinstance(exc, socket.gaierror):
                return first
            first[0].socket.close()
            if exc.errno != errno.EADDRINUSE or not tries_left:
                raise
    raise AssertionError("each last try returns or raises")


def _reason(exc: OSError) -> str:
    if isinstance(exc, socket.gaierror):
        return "that host name cannot be resolved"
    if exc.errno == errno.EADDRINUSE:
        return "another program listens there"
    if exc.errno in (errno.EACCES, errno.EPERM):
        return "the system allows that port to administrators only"
    if exc.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address"
    return exc.strerror or str(exc)

"""What this machine is called and where others can reach it."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from p2pmesh.config import NAME_CHARS_MAX, Address
from p2pmesh.state.bodies import ADDRESSES_MAX


def default_name() -> str:
    """The host name without its domain."""
    name = "".join(c for c in socket.gethostname().partition(".")[0] if c.isprintable())
    return name[:NAME_CHARS_MAX].strip() or "node"


def advertised(bound: Address) -> tuple[Address, ...]:
    """The addresses to tell others, for a listener bound at `bound`.

    A listener on all interfaces is reached at each of them; the loopback address says nothing to
    another machine, so it is told only when there is nothing else.
    """
    if not ipaddress.ip_address(bound.host.partition("%")[0]).is_unspecified:
        return (bound,)
    version = ipaddress.ip_address(bound.host).version
    hosts = sorted(
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
        and (version == 6 or entry.family == socket.AF_INET)
    )
    found = [ipaddress.ip_address(host.partition("%")[0]) for host in hosts]
    usable = [ip for ip in found if not ip.is_loopback and not ip.is_link_local]
    loopback = ipaddress.ip_address("127.0.0.1" if version == 4 else "::1")
    return tuple(Address(str(ip), bound.port) for ip in usable[:ADDRESSES_MAX] or [loopback])

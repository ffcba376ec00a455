"""Where to speak on the interfaces in use, and whether an address is on the link of one of them.

Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

from p2pmesh.discovery.onlink import Interface

V4_HOST_BITS_MIN = 2  # a network of one or two addresses has no broadcast address


def ipv4(interface: Interface) -> list[IPv4Address]:
    """This machine's IPv4 addresses on an interface."""
    return [own.ip for own in interface.addresses if isinstance(own, IPv4Interface)]


def ipv6(interface: Interface) -> list[IPv6Address]:
    """This machine's link-local addresses on an interface, if their scope is known."""
    return [
        own.ip
        for own in interface.addresses
        if isinstance(own, IPv6Interface) and own.ip.is_link_local and interface.index
    ]


def broadcasts(interface: Interface) -> list[str]:
    """The broadcast address of each IPv4 network of an interface that has one."""
    networks = {own.network for own in interface.addresses if isinstance(own, IPv4Interface)}
    return sorted(
        str(network.broadcast_address)
        for network in networks
        if network.max_prefixlen - network.prefixlen >= V4_HOST_BITS_MIN
    )


def on_link_host(interfaces: Iterable[Interface], host: str, scope: int = 0) -> str | None:
    """The host to dial when `host` is on the link of one of the interfaces; else None.

    Args:
        interfaces: Those that discovery uses.
        host: An IP address; a link-local one may name its interface or have its index.
        scope: The index of the interface on which a link-local address without one was seen.

    Returns:
        The address in its usual form, a link-local one with the name of its interface.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, IPv4Address):
        networks = (own.network for interface in interfaces for own in interface.addresses)
        return str(address) if any(address in network for network in networks) else None
    if not address.is_link_local:
        return None
    named = address.scope_id or str(scope)
    for interface in interfaces:
        if ipv6(interface) and named in (interface.name, str(interface.index)):
            return f"{str(address).partition('%')[0]}%{interface.name}"
    return None

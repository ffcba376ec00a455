"""The name of this machine and the addresses at which others can reach it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

import psutil

from p2pmesh.config import NAME_CHARS_MAX, Address
from p2pmesh.identity.tokens import ADDRESSES_MAX as TOKEN_ADDRESSES_MAX
from p2pmesh.state.registers import ADDRESSES_MAX

# Where Tailscale and others of its kind give addresses: RFC 6598, and a prefix of Tailscale's own.
VPNS = (ipaddress.ip_network("100.64.0.0/10"), ipaddress.ip_network("fd7a:115c:a1e0::/48"))


def default_name() -> str:
    """The host name without its domain."""
    name = "".join(c for c in socket.gethostname().partition(".")[0] if c.isprintable())
    return name[:NAME_CHARS_MAX].strip() or "node"


def own_host() -> str:
    """The whole host name, as web pages of this machine are asked for by it."""
    return socket.gethostname().lower().rstrip(".")


def is_loopback(host: str) -> bool:
    """Whether an IP address is reached from this machine alone."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def advertised(bound: Address) -> tuple[Address, ...]:
    """The addresses to tell others, the likeliest first, for a listener bound at `bound`.

    A listener on all interfaces is reached at each of them, those of a VPN included. The loopback
    address says nothing to another machine, so it is told only when there is nothing else; nor
    does a link-local one, which goes with the name of an interface there.

    Args:
        bound: `::` stands for all addresses of both families, `0.0.0.0` for those of IPv4.
    """
    unspecified = ipaddress.ip_address(bound.host.partition("%")[0])
    if not unspecified.is_unspecified:
        return (bound,)
    families = [socket.AF_INET]
    if unspecified.version == 6:
        families.append(socket.AF_INET6)
    found = {
        ipaddress.ip_address(entry.address.partition("%")[0])
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in families
    }
    usable = [ip for ip in found if not ip.is_loopback and not ip.is_link_local]
    # Bridges of containers and virtual machines have addresses too, which lead nowhere.
    outgoing = {_outgoing(family) for family in families}
    usable.sort(key=lambda ip: (str(ip) not in outgoing, ip.version, str(ip)))
    hosts = [str(ip) for ip in usable[:ADDRESSES_MAX]] or ["127.0.0.1"]
    return tuple(Address(host, bound.port) for host in hosts)


def for_invitation(addresses: Sequence[Address]) -> tuple[Address, ...]:
    """The addresses that go into an invitation: the likeliest, and one of a VPN if there is one.

    A newcomer is at home, or reaches this node over a VPN; in both cases one of the two leads here.

    Args:
        addresses: See `advertised`.
    """
    first, rest = addresses[:1], addresses[1:]
    ordered = sorted(rest, key=lambda one: (not _is_of_vpn(one.host), ":" in one.host))
    return (*first, *ordered)[:TOKEN_ADDRESSES_MAX]


def _is_of_vpn(host: str) -> bool:
    ip = ipaddress.ip_address(host)
    return any(ip in network for network in VPNS if network.version == ip.version)


def _outgoing(family: socket.AddressFamily) -> str:
    """The address that this machine takes for connections far away; "" if there is no way."""
    far_away = "192.0.2.1" if family == socket.AF_INET else "2001:db8::1"  # for documentation
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far_away, 9))  # looks up the route, sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return ""

"""This machine's network interfaces and gateways, and holding a connection to its link.

Linux tells everything. macOS does not tell of which kind an interface is or what a bridge is made
of, so that a bridge of virtual machines counts as a network; its tunnels are known by having no MAC
address. Windows tells in addition neither what is point-to-point nor the gateways: a connection
that its router forwards under the router's own address is stopped by its hop limit alone.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface
from typing import Any

import psutil
import trio

from p2pmesh.discovery import netlink, onlink
from p2pmesh.discovery.onlink import Interface, IpAddress, IpInterface, counts, plain

SYSTEM: str = sys.platform
ROUTES_COMMAND = ("/usr/sbin/netstat", "-rn")  # macOS
PROGRAM_TIMEOUT_S = 2.0
BUNDLES = frozenset(["bridge", "bond", "team"])
"""Kinds of interfaces that stand for their ports."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where an interface, by its name, sends what is elsewhere; the address is without scope."""

    interface: str
    address: IpAddress


def interfaces() -> list[Interface]:
    """Return all interfaces of this machine; takes 30 µs for each."""
    return _of_linux() if SYSTEM == "linux" else _of_psutil()


def usable_interfaces() -> list[Interface]:
    """Return the interfaces on which to look for meshes and to announce one."""
    return [interface for interface in interfaces() if counts(interface)]


async def gateways() -> list[Gateway]:
    """Return the default gateways, the preferred first; none where they cannot be known."""
    if SYSTEM == "linux":
        routes = sorted(netlink.default_routes(), key=lambda route: route.metric)
        found = [Gateway(_name(route.index), route.gateway) for route in routes]
        return [gateway for gateway in found if gateway.interface]
    if SYSTEM == "darwin":
        return parse_netstat(await output_of(*ROUTES_COMMAND))
    return []


async def refusal(sock: socket.socket | trio.socket.SocketType) -> str | None:
    """Return why whoever connected is not admitted without an invitation; None when it may be.

    It may be only under `hold_to_link`, as a router on the link may lend its address.

    Raises:
        OSError: The connection has ended.
    """
    source, local = _ip(sock.getpeername()), _ip(sock.getsockname())
    known = [gateway.address for gateway in await gateways()]
    return onlink.refusal(source, local, interfaces(), known)


@contextmanager
def hold_to_link(sock: socket.socket | trio.socket.SocketType) -> Iterator[None]:
    """Let nothing that this machine sends on an accepted connection pass a router.

    So a client that answers what it is sent meanwhile is on the link. After a failure the limit
    stays: the kernel goes on to send what was not acknowledged, even when the socket is closed.
    """
    level, option = socket.IPPROTO_IP, socket.IP_TTL
    if plain(_ip(sock.getpeername())).version == 6:
        level, option = socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS
    usual = sock.getsockopt(level, option)
    sock.setsockopt(level, option, 1)
    yield
    sock.setsockopt(level, option, usual)


async def output_of(*command: str) -> str:
    """Return what a program of the system prints; "" when there is none, or it takes too long."""
    with trio.move_on_after(PROGRAM_TIMEOUT_S):
        try:
            done = await trio.run_process(
                command, capture_stdout=True, stderr=subprocess.DEVNULL, check=False
            )
        except OSError:
            return ""
        return bytes(done.stdout).decode(errors="replace")
    return ""


def parse_netstat(text: str) -> list[Gateway]:
    """Parse the routes that macOS prints: destination, gateway, flags, perhaps counters, name."""
    found = []
    for line in text.splitlines():
        match line.split():
            case ["default", gateway, _flags, *rest]:
                name = next((word for word in rest if not word.isdigit()), "")
                try:
                    address = ip_address(gateway)
                except ValueError:  # a tunnel: "link#12"
                    continue
                found.append(Gateway(name, plain(address)))
    return found


def _of_linux() -> list[Interface]:
    links = {link.index: link for link in netlink.links()}
    held = defaultdict(list)
    for one in netlink.addresses():
        held[one.index].append(ip_interface((one.address, one.prefix_bits)))
    ports = defaultdict(set)
    for link in links.values():
        ports[link.master].add(_kind(link))
    return [
        Interface(
            name=link.name,
            index=link.index,
            addresses=tuple(held[link.index]),
            mac=link.mac,
            has_carrier=link.flags & _RUNNING == _RUNNING,
            is_loopback=bool(link.flags & netlink.IFF_LOOPBACK),
            is_point_to_point=bool(link.flags & netlink.IFF_POINTOPOINT),
            is_port=link.master in links and links[link.master].kind in BUNDLES,
            kind=_kind(link),
            ports=frozenset(ports[link.index]) if link.kind == "bridge" else None,
        )
        for link in links.values()
    ]


_RUNNING = netlink.IFF_UP | netlink.IFF_LOWER_UP


def _kind(link: netlink.Link) -> str:
    # The kernel calls both kinds of devices of /dev/net/tun the same.
    return "tap" if link.kind == "tun" and link.hardware == netlink.ETHERNET else link.kind


def _of_psutil() -> list[Interface]:
    found = []
    states = psutil.net_if_stats()
    for name, entries in psutil.net_if_addrs().items():
        state = states.get(name)
        flags = state.flags.split(",") if state else []
        hosts = [entry for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        addresses = tuple(_of_entry(entry) for entry in hosts)
        macs = [entry.address for entry in entries if entry.family == psutil.AF_LINK]
        found.append(
            Interface(
                name=name,
                index=_index(name, [entry.address.partition("%")[2] for entry in hosts]),
                addresses=addresses,
                mac=macs[0].lower().replace("-", ":") if macs else "",
                has_carrier=bool(state and state.isup),
                is_loopback="loopback" in flags or any(a.ip.is_loopback for a in addresses),
                is_point_to_point="pointopoint" in flags or any(e.ptp for e in hosts),
            )
        )
    return found


def _of_entry(entry: Any) -> IpInterface:
    address = ip_address(entry.address.partition("%")[0])
    if address.version == 4:
        return IPv4Interface(f"{address}/{entry.netmask or 32}")
    mask = entry.netmask  # Windows tells none
    bits = int(ip_address(mask)).bit_count() if mask else 128
    return IPv6Interface((address, bits))


def _index(name: str, scopes: list[str]) -> int:
    for scope in scopes:
        if scope.isdigit():  # Windows, whose names here are not those that its sockets know
            return int(scope)
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # it is gone meanwhile
        return ""


def _ip(address: Any) -> IpAddress:
    host, scope = str(address[0]).partition("%")[0], address[3] if len(address) == 4 else 0
    return ip_address(f"{host}%{scope}" if scope else host)

"""The Linux kernel's tables of interfaces, addresses, routes and neighbours.

Read from a netlink socket, as that alone says of which kind an interface is, needs no right and no
program, and shows the network that this process is in, whatever is mounted at /sys.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

TIMEOUT_S = 2.0  # the kernel answers at once; this only bounds what cannot be
RECEIVE_BYTES = 65536  # the kernel fills no more than 32 KiB at a time

_DUMP_REQUEST = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3
_GET_LINK, _GET_ADDRESS, _GET_ROUTE, _GET_NEIGHBOUR = 18, 22, 26, 30
_MESSAGE = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_LINK = struct.Struct("=BxHiII")  # family, hardware type, index, flags, mask
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, destination and source bits, tos, table, ...
_NEXT_HOP = struct.Struct("=HBBi")  # length, flags, weight, index
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_TYPE_BITS = 0x3FFF  # of an attribute's type; the other two are flags
_ALIGNMENT = 4
MAC_BYTES = 6

ETHERNET = 1
IFF_UP, IFF_LOOPBACK, IFF_POINTOPOINT, IFF_LOWER_UP = 0x1, 0x8, 0x10, 0x10000
MAIN_TABLE = 254
UNICAST = 1
NEIGHBOUR_KNOWN = 0xDE  # reachable, stale, delay, probe, noarp, permanent

IpAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. `master` is the number of the bridge or the like that it is a port of, or 0."""

    index: int
    name: str
    hardware: int
    flags: int
    mac: str
    kind: str
    master: int


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """An address of an interface."""

    index: int
    address: IpAddress
    prefix_bits: int


@dataclass(frozen=True, slots=True)
class DefaultRoute:
    """A gateway of the main table to everywhere, on an interface; small metrics go first."""

    index: int
    gateway: IpAddress
    metric: int


@dataclass(frozen=True, slots=True)
class Neighbour:
    """The MAC address that the kernel knows for an IP address on a link."""

    index: int
    address: IpAddress
    mac: str


def links() -> list[Link]:
    """Return all interfaces."""
    return [parse_link(body) for body in _dump(_GET_LINK, _LINK)]


def addresses() -> list[LinkAddress]:
    """Return all addresses of all interfaces."""
    return [one for body in _dump(_GET_ADDRESS, _ADDRESS) if (one := parse_address(body))]


def default_routes() -> list[DefaultRoute]:
    """Return the ways to everywhere, of both families."""
    return [route for body in _dump(_GET_ROUTE, _ROUTE) for route in parse_route(body)]


def neighbours() -> list[Neighbour]:
    """Return the neighbours whose MAC address is known."""
    return [one for body in _dump(_GET_NEIGHBOUR, _NEIGHBOUR) if (one := parse_neighbour(body))]


def parse_link(body: bytes) -> Link:
    """Parse an interface."""
    _, hardware, index, flags, _ = _LINK.unpack_from(body)
    found = attributes(body[_LINK.size :])
    kind = attributes(found.get(18, b"")).get(1, b"")  # of IFLA_LINKINFO: IFLA_INFO_KIND
    return Link(
        index=index,
        name=_text(found.get(3, b"")),
        hardware=hardware,
        flags=flags,
        mac=_mac(found.get(1, b"")),
        kind=_text(kind),
        master=int.from_bytes(found.get(10, b""), sys.byteorder),
    )


def parse_address(body: bytes) -> LinkAddress | None:
    """Parse an address of an interface."""
    _, prefix_bits, _, _, index = _ADDRESS.unpack_from(body)
    found = attributes(body[_ADDRESS.size :])
    # IFA_LOCAL; on a point-to-point link IFA_ADDRESS is that of the other end.
    packed = found.get(2) or found.get(1)
    return LinkAddress(index, ip_address(packed), prefix_bits) if packed else None


def parse_route(body: bytes) -> list[DefaultRoute]:
    """Parse a route; returns its gateways when it leads everywhere, else nothing."""
    _, destination_bits, source_bits, _, table, _, _, kind, _ = _ROUTE.unpack_from(body)
    if destination_bits or source_bits or table != MAIN_TABLE or kind != UNICAST:
        return []
    found = attributes(body[_ROUTE.size :])
    metric = int.from_bytes(found.get(6, b""), sys.byteorder)
    hops = [(int.from_bytes(found.get(4, b""), sys.byteorder), found.get(5))]
    several = found.get(9, b"")  # RTA_MULTIPATH
    while len(several) >= _NEXT_HOP.size:
        length, _, _, index = _NEXT_HOP.unpack_from(several)
        hops.append((index, attributes(several[_NEXT_HOP.size : length]).get(5)))
        several = several[_aligned(max(length, _NEXT_HOP.size)) :]
    return [DefaultRoute(index, ip_address(to), metric) for index, to in hops if index and to]


def parse_neighbour(body: bytes) -> Neighbour | None:
    """Parse a neighbour; None for one that did not answer yet, or has no MAC address."""
    _, index, state, _, _ = _NEIGHBOUR.unpack_from(body)
    found = attributes(body[_NEIGHBOUR.size :])
    mac, packed = _mac(found.get(2, b"")), found.get(1)
    if not (state & NEIGHBOUR_KNOWN and mac and packed):
        return None
    return Neighbour(index, ip_address(packed), mac)


def attributes(data: bytes) -> Mapping[int, bytes]:
    """Return the values of netlink attributes by their type."""
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        found[kind & _TYPE_BITS] = data[at + _ATTRIBUTE.size : at + length]
        at += _aligned(max(length, _ATTRIBUTE.size))
    return found


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the type and the body of each message of one datagram."""
    at = 0
    while at + _MESSAGE.size <= len(data):
        length, kind, _, _, _ = _MESSAGE.unpack_from(data, at)
        yield kind, data[at + _MESSAGE.size : at + length]
        at += _aligned(max(length, _MESSAGE.size))


def _dump(request: int, header: struct.Struct) -> Iterator[bytes]:
    body = bytes(header.size)
    whole = _MESSAGE.pack(_MESSAGE.size + len(body), request, _DUMP_REQUEST, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(TIMEOUT_S)
        kernel.sendto(whole, (0, 0))
        while True:
            for kind, answer in messages(kernel.recv(RECEIVE_BYTES)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    (number,) = struct.unpack_from("=i", answer)
                    raise OSError(-number, "netlink refused")
                yield answer


def _aligned(length: int) -> int:
    return (length + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _mac(data: bytes) -> str:
    """Show an Ethernet address; "" for those of other hardware, and for none."""
    return data.hex(":") if len(data) == MAC_BYTES and any(data) else ""

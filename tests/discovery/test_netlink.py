from __future__ import annotations

import errno
import socket
import struct
import sys
from ipaddress import ip_address

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.discovery import netlink
from p2pmesh.discovery.netlink import (
    MAIN_TABLE,
    UNICAST,
    DefaultRoute,
    LinkAddress,
    Neighbour,
    attributes,
    messages,
    parse_address,
    parse_link,
    parse_neighbour,
    parse_route,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="netlink is of Linux")
ROUTER, ROUTER_V6 = ip_address("192.168.1.1"), ip_address("fe80::1")
MAC = bytes.fromhex("02fc00000005")
REACHABLE, INCOMPLETE, FAILED = 0x02, 0x01, 0x20


def attribute(kind: int, value: bytes | int) -> bytes:
    data = struct.pack("=I", value) if isinstance(value, int) else value
    whole = struct.pack("=HH", 4 + len(data), kind) + data
    return whole + bytes(-len(whole) % 4)


def route(*attributes: bytes, bits: int = 0, table: int = MAIN_TABLE, kind: int = UNICAST) -> bytes:
    return struct.pack("=BBBBBBBBI", 2, bits, 0, 0, table, 3, 0, kind, 0) + b"".join(attributes)


def neighbour(state: int, *attributes: bytes) -> bytes:
    return struct.pack("=BxxxiHBB", 2, 4, state, 0, 1) + b"".join(attributes)


def test_an_interface_is_told_with_its_kind_and_bridge() -> None:
    info = attribute(1, b"veth\0")
    body = struct.pack("=BxHiII", 0, 1, 7, 0x11043, 0) + b"".join(
        [attribute(3, b"port0\0"), attribute(1, MAC), attribute(10, 5), attribute(18, info)]
    )
    link = parse_link(body)
    assert (link.index, link.name, link.kind, link.master) == (7, "port0", "veth", 5)
    assert (link.mac, link.hardware) == ("02:fc:00:00:00:05", netlink.ETHERNET)
    assert link.flags & netlink.IFF_LOWER_UP
    bare = parse_link(body[:16])
    assert (bare.name, bare.mac, bare.kind, bare.master) == ("", "", "", 0)


@pytest.mark.parametrize("mac", [b"", bytes(6), bytes(4), b"\1" * 16])
def test_only_ethernet_addresses_are_mac_addresses(mac: bytes) -> None:
    body = struct.pack("=BxHiII", 0, 778, 7, 0, 0)
    assert parse_link(body + attribute(1, mac)).mac == ""


def test_the_own_address_of_a_link_with_two_ends_is_the_local_one() -> None:
    body = struct.pack("=BBBBI", 2, 32, 0, 0, 4)
    far, near = attribute(1, b"\x0a\0\0\2"), attribute(2, b"\x0a\0\0\1")
    assert parse_address(body + far + near) == LinkAddress(4, ip_address("10.0.0.1"), 32)
    assert parse_address(body + far) == LinkAddress(4, ip_address("10.0.0.2"), 32)
    assert parse_address(body) is None


def test_a_default_route_tells_its_gateways() -> None:
    via, out, metric = attribute(5, ROUTER.packed), attribute(4, 4), attribute(6, 600)
    assert parse_route(route(via, out, metric)) == [DefaultRoute(4, ROUTER, 600)]
    assert parse_route(route(via, out)) == [DefaultRoute(4, ROUTER, 0)]
    v6 = attribute(5, ROUTER_V6.packed)
    hops = b"".join(
        struct.pack("=HBBi", 8 + len(to), 0, 0, index) + to for index, to in ((4, via), (5, v6))
    )
    assert parse_route(route(attribute(9, hops), metric)) == [
        DefaultRoute(4, ROUTER, 600),
        DefaultRoute(5, ROUTER_V6, 600),
    ]


def test_other_routes_lead_nowhere_else() -> None:
    via, out = attribute(5, ROUTER.packed), attribute(4, 4)
    assert parse_route(route(via, out, bits=1)) == []
    assert parse_route(route(via, out, table=200)) == []
    assert parse_route(route(via, out, kind=7)) == []
    assert parse_route(route(out)) == []


def test_a_neighbour_is_known_when_it_answered() -> None:
    to, mac = attribute(1, ROUTER.packed), attribute(2, MAC)
    known = Neighbour(4, ROUTER, "02:fc:00:00:00:05")
    assert parse_neighbour(neighbour(REACHABLE, to, mac)) == known
    for state in (INCOMPLETE, FAILED):
        assert parse_neighbour(neighbour(state, to, mac)) is None
    assert parse_neighbour(neighbour(REACHABLE, to)) is None


@given(st.binary(max_size=200))
def test_reading_ends_whatever_is_read(data: bytes) -> None:
    assert sum(len(value) for value in attributes(data).values()) <= len(data)
    assert sum(len(body) for _, body in messages(data)) <= len(data)


@linux
def test_the_kernel_tells_of_this_machine() -> None:
    links = {link.name: link for link in netlink.links()}
    assert links.keys() >= psutil.net_if_addrs().keys()
    assert links["lo"].flags & netlink.IFF_LOOPBACK
    assert links["lo"].index == socket.if_nametoindex("lo")
    assert LinkAddress(links["lo"].index, ip_address("127.0.0.1"), 8) in netlink.addresses()
    numbers = {link.index for link in links.values()}
    assert {route.index for route in netlink.default_routes()} <= numbers
    assert {neighbour.index for neighbour in netlink.neighbours()} <= numbers


@linux
def test_what_the_kernel_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink, "_GET_LINK", 0x3FF)
    with pytest.raises(OSError, match="netlink") as caught:
        netlink.links()
    assert caught.value.errno in (errno.EOPNOTSUPP, errno.EINVAL)

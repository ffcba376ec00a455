from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.discovery.onlink import Interface, counts, plain, refusal

WIFI = Interface(
    name="wlan0",
    index=3,
    addresses=(
        ip_interface("192.168.1.20/24"),
        ip_interface("2001:db8::20/64"),
        ip_interface("fe80::20/64"),
    ),
    mac="02:00:00:00:00:01",
)
LOOPBACK = Interface(
    name="lo",
    index=1,
    addresses=(ip_interface("127.0.0.1/8"), ip_interface("::1/128")),
    is_loopback=True,
)
WIREGUARD = Interface(
    name="wg0", index=5, addresses=(ip_interface("10.8.0.6/24"),), kind="wireguard"
)
DOCKER = Interface(
    name="docker0",
    index=6,
    addresses=(ip_interface("172.17.0.1/16"), ip_interface("fe80::d0/64")),
    mac="02:00:00:00:00:02",
    kind="bridge",
    ports=frozenset(["veth"]),
)
MACHINE = (LOOPBACK, WIFI, WIREGUARD, DOCKER)
ROUTERS = (ip_address("192.168.1.1"), ip_address("fe80::1%3"))


def bridge(*kinds: str) -> Interface:
    return replace(DOCKER, ports=frozenset(kinds))


@pytest.mark.parametrize(
    ("interface", "expected"),
    [
        (WIFI, True),
        (replace(WIFI, has_carrier=False), False),
        (replace(WIFI, is_point_to_point=True), False),
        (replace(WIFI, is_port=True), False),
        (replace(WIFI, mac=""), False),
        (LOOPBACK, False),
        (WIREGUARD, False),
        (replace(WIFI, kind="veth"), True),  # a container's own interface
        (replace(WIFI, kind="bond"), True),
        (replace(WIFI, kind="vlan"), True),
        (replace(WIFI, kind="tap"), False),
        (replace(WIFI, kind="vxlan"), False),
        (replace(DOCKER, ports=None), True),
        (bridge(), False),
        (bridge("veth"), False),
        (bridge("veth", "tap"), False),
        (bridge("vxlan"), False),
        (bridge("veth", "tap", ""), True),  # virtual machines and a cable
        (bridge("bond"), True),
    ],
)
def test_which_interfaces_count(interface: Interface, *, expected: bool) -> None:
    assert counts(interface) is expected


@pytest.mark.parametrize(
    ("source", "local"),
    [
        ("192.168.1.30", "192.168.1.20"),
        ("::ffff:192.168.1.30", "::ffff:192.168.1.20"),
        ("fe80::30%3", "fe80::20%3"),
        ("fe80::30%3", "2001:db8::20"),
    ],
)
def test_a_neighbour_may_be_admitted(source: str, local: str) -> None:
    assert refusal(ip_address(source), ip_address(local), MACHINE, ROUTERS) is None


@pytest.mark.parametrize(
    ("source", "local", "says"),
    [
        ("203.0.113.9", "192.168.1.20", "203.0.113.9 is on another network than this node"),
        ("192.168.2.30", "192.168.1.20", "on another network"),
        ("192.168.1.30", "10.8.0.6", "on another network"),  # in through the tunnel
        ("10.8.0.7", "192.168.1.20", "on another network"),
        ("10.8.0.7", "10.8.0.6", "10.8.0.7 comes through a tunnel"),
        ("172.17.0.5", "172.17.0.1", "a bridge of virtual machines"),
        ("192.168.1.1", "192.168.1.20", "the router at 192.168.1.1"),
        ("::ffff:192.168.1.1", "::ffff:192.168.1.20", "the router at 192.168.1.1"),
        ("192.168.1.20", "192.168.1.20", "own machine"),
        ("10.8.0.6", "192.168.1.20", "own machine"),
        ("127.0.0.1", "127.0.0.1", "own machine"),
        ("127.8.8.8", "192.168.1.20", "own machine"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", "own machine"),
        ("::1", "::1", "own machine"),
        ("fe80::20%3", "fe80::20%3", "own machine"),
        ("2001:db8::30", "2001:db8::20", "2001:db8::30 is not a link-local address"),
        ("fd00::30", "fd00::20", "not a link-local address"),
        ("fe80::1%3", "fe80::20%3", "the router at fe80::1"),
        ("fe80::30%6", "fe80::d0%6", "a bridge of virtual machines"),
        ("fe80::30%5", "fe80::20%5", "through a tunnel"),
        ("fe80::30%9", "fe80::20%9", "on another network"),
        ("fe80::30", "fe80::20", "on another network"),
    ],
)
def test_anybody_else_is_told_to_ask_for_an_invitation(source: str, local: str, says: str) -> None:
    reason = refusal(ip_address(source), ip_address(local), MACHINE, ROUTERS)
    assert reason is not None
    assert says in reason
    assert reason.endswith("ask a member of the mesh for an invitation (p2pmesh invite)")


def test_an_interface_whose_number_is_unknown_admits_nobody_by_ipv6() -> None:
    source, local = ip_address("fe80::30%0"), ip_address("fe80::20")
    assert refusal(source, local, [replace(WIFI, index=0)], ())


@given(source=st.ip_addresses(v=4) | st.ip_addresses(v=4, network="192.168.0.0/23"))
def test_ipv4_is_admitted_from_the_subnet_alone(source: IPv4Address) -> None:
    local = ip_address("192.168.1.20")
    near = str(source).startswith("192.168.1.") and str(source) not in (
        "192.168.1.1",
        "192.168.1.20",
    )
    assert (refusal(source, local, MACHINE, ROUTERS) is None) == near
    mapped = IPv6Address(b"\0" * 10 + b"\xff\xff" + source.packed)
    assert refusal(mapped, local, MACHINE, ROUTERS) == refusal(source, local, MACHINE, ROUTERS)


@given(source=st.ip_addresses(v=6), scope=st.none() | st.integers(1, 9))
def test_ipv6_is_admitted_from_the_link_alone(source: IPv6Address, scope: int | None) -> None:
    scoped = ip_address(f"{source}%{scope}") if scope else source
    local = ip_address("fe80::20%3")
    near = source.is_link_local and scope == WIFI.index and plain(scoped) not in map(plain, ROUTERS)
    if not WIFI.holds(source) and not DOCKER.holds(source):
        assert (refusal(scoped, local, MACHINE, ROUTERS) is None) == near

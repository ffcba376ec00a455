from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest
import trio

from p2pmesh.config import NAME_CHARS_MAX, Address
from p2pmesh.node import interfaces
from p2pmesh.node.interfaces import (
    advertised,
    default_name,
    for_invitation,
    is_loopback,
    own_host,
)
from p2pmesh.node.ports import listen
from p2pmesh.state.registers import ADDRESSES_MAX

EVERYWHERE = Address("0.0.0.0", 9338)
EVERYWHERE_V6 = Address("::", 9338)

LAPTOP = {
    "lo": ["127.0.0.1", "::1"],
    "wlan0": ["192.168.1.20", "2001:db9::20", "fe80::20%wlan0"],
    "docker0": ["172.17.0.1"],
    "vpn": ["10.8.0.6"],
}


def entries(hosts: list[str]) -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(family=psutil.AF_LINK, address="aa:bb:cc:dd:ee:ff")
    for host in hosts:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        yield SimpleNamespace(family=family, address=host)


def machine(
    monkeypatch: pytest.MonkeyPatch, addresses: dict[str, list[str]], *, outgoing: str
) -> None:
    found = {name: list(entries(hosts)) for name, hosts in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    ways = {entry.family: entry.address for entry in entries(outgoing.split())}
    monkeypatch.setattr(interfaces, "_outgoing", lambda family: ways.get(family, ""))


def hosts(addresses: tuple[Address, ...]) -> list[str]:
    assert {address.port for address in addresses} == {9338}
    return [address.host for address in addresses]


@pytest.mark.parametrize("host", ["127.0.0.1", "192.168.1.20", "::1", "fe80::20%wlan0"])
def test_a_listener_on_one_address_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    machine(monkeypatch, LAPTOP, outgoing="192.168.1.20")
    assert advertised(Address(host, 9338)) == (Address(host, 9338),)


def test_a_listener_on_all_is_told_by_what_others_can_reach_the_likeliest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, LAPTOP, outgoing="192.168.1.20")
    assert hosts(advertised(EVERYWHERE)) == ["192.168.1.20", "10.8.0.6", "172.17.0.1"]


def test_without_a_way_out_the_order_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, LAPTOP, outgoing="")
    assert hosts(advertised(EVERYWHERE)) == ["10.8.0.6", "172.17.0.1", "192.168.1.20"]


def test_a_listener_on_both_families_is_told_by_both_ipv4_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, LAPTOP, outgoing="192.168.1.20 2001:db9::20")
    likely = ["192.168.1.20", "2001:db9::20"]
    assert hosts(advertised(EVERYWHERE_V6)) == [*likely, "10.8.0.6", "172.17.0.1"]
    machine(monkeypatch, LAPTOP, outgoing="")
    others = ["10.8.0.6", "172.17.0.1", "192.168.1.20"]
    assert hosts(advertised(EVERYWHERE_V6)) == [*others, "2001:db9::20"]


def test_a_vpn_is_an_ordinary_network(monkeypatch: pytest.MonkeyPatch) -> None:
    tailscale = ["100.101.102.103", "fd7a:115c:a1e0::1", "fe80::1%tailscale0"]
    vpns = {"lo": LAPTOP["lo"], "tailscale0": tailscale, "wg0": ["10.8.0.6", "fd00:8::6"]}
    machine(monkeypatch, vpns, outgoing="100.101.102.103")
    told = ["100.101.102.103", "10.8.0.6", "fd00:8::6", "fd7a:115c:a1e0::1"]
    assert hosts(advertised(EVERYWHERE_V6)) == told
    assert hosts(advertised(EVERYWHERE)) == told[:2]


def test_a_machine_with_ipv6_alone_is_told_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {"lo": LAPTOP["lo"], "eth0": ["2001:db9::20", "fe80::20%eth0"]}
    machine(monkeypatch, only, outgoing="2001:db9::20")
    assert hosts(advertised(EVERYWHERE_V6)) == ["2001:db9::20"]


@pytest.mark.parametrize("more", [{}, {"eth0": ["169.254.7.7", "fe80::20%eth0"]}])
def test_a_machine_without_a_network_is_told_by_loopback(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, list[str]]
) -> None:
    machine(monkeypatch, {"lo": LAPTOP["lo"], **more}, outgoing="")
    assert hosts(advertised(EVERYWHERE)) == ["127.0.0.1"]
    assert hosts(advertised(EVERYWHERE_V6)) == ["127.0.0.1"]


def test_no_more_addresses_than_a_record_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"bridge{number}": [f"10.0.{number}.1"] for number in range(2 * ADDRESSES_MAX)}
    last = f"10.0.{2 * ADDRESSES_MAX - 1}.1"
    machine(monkeypatch, many, outgoing=last)
    found = hosts(advertised(EVERYWHERE))
    assert len(found) == ADDRESSES_MAX
    assert found[0] == last


def test_this_machine_has_addresses_of_the_right_kind() -> None:
    for bound, versions in ((EVERYWHERE, {4}), (EVERYWHERE_V6, {4, 6})):
        found = [ipaddress.ip_address(host) for host in hosts(advertised(bound))]
        assert found
        assert {ip.version for ip in found} <= versions
        assert not any(ip.is_unspecified or ip.is_link_local for ip in found)


async def test_a_listener_on_all_is_reached_at_every_address_told() -> None:
    found = await listen("peer", Address("::", 0), exact=True)
    try:
        for address in advertised(found.address):
            with trio.fail_after(10):
                stream = await trio.open_tcp_stream(address.host, address.port)
            async with stream:
                assert stream.socket.getpeername()[:2] == (address.host, address.port)
    finally:
        found.close()


def test_a_machine_without_routes_has_no_outgoing_address(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        def __init__(self, *_: object) -> None:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", Unreachable)
    assert interfaces._outgoing(socket.AF_INET) == ""


@pytest.mark.parametrize(
    ("host_name", "name"),
    [
        ("kitchen-pc", "kitchen-pc"),
        ("Kims-MacBook.local", "Kims-MacBook"),
        ("küche", "küche"),
        ("a\nb\tc", "abc"),
        ("x" * 200, "x" * NAME_CHARS_MAX),
        ("", "node"),
        (".local", "node"),
        ("\udcff", "node"),
        (" ", "node"),
    ],
)
def test_a_node_is_called_as_its_machine(
    monkeypatch: pytest.MonkeyPatch, host_name: str, name: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host_name)
    assert default_name() == name


def test_pages_of_this_machine_are_asked_for_by_its_whole_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Kitchen-PC.fritz.box.")
    assert own_host() == "kitchen-pc.fritz.box"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("fe80::1%eth0", False),
    ],
)
def test_loopback_addresses_are_told_from_others(host: str, *, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("hosts", "chosen"),
    [
        (["192.168.1.20"], ["192.168.1.20"]),
        (["192.168.1.20", "2001:db9::20", "172.17.0.1"], ["192.168.1.20", "172.17.0.1"]),
        (["192.168.1.20", "2001:db9::20"], ["192.168.1.20", "2001:db9::20"]),
        (["192.168.1.20", "172.17.0.1", "100.101.102.103"], ["192.168.1.20", "100.101.102.103"]),
        (["192.168.1.20", "10.0.0.1", "fd7a:115c:a1e0::7"], ["192.168.1.20", "fd7a:115c:a1e0::7"]),
        ([], []),
    ],
)
def test_an_invitation_has_the_likeliest_address_and_one_of_a_vpn(
    hosts: list[str], chosen: list[str]
) -> None:
    known = [Address(host, 9338) for host in hosts]
    assert list(for_invitation(known)) == [Address(host, 9338) for host in chosen]

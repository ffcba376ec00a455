from __future__ import annotations

from ipaddress import ip_interface

import pytest

from p2pmesh.discovery.network import broadcasts, ipv4, ipv6, on_link_host
from p2pmesh.discovery.onlink import Interface


def interface(name: str, index: int, *addresses: str) -> Interface:
    return Interface(name, index, addresses=tuple(ip_interface(each) for each in addresses))


WIFI = interface("wlan0", 3, "192.168.7.5/24", "10.0.0.5/24", "fe80::5/64", "2001:db8::5/64")
CABLE = interface("eth0", 4, "172.16.0.5/16", "fe80::6/64")
BOTH = [WIFI, CABLE]


def test_each_ipv4_network_has_a_broadcast_address() -> None:
    assert broadcasts(WIFI) == ["10.0.0.255", "192.168.7.255"]
    assert broadcasts(CABLE) == ["172.16.255.255"]
    twice = interface("eth1", 5, "10.0.0.5/24", "10.0.0.6/24")
    assert broadcasts(twice) == ["10.0.0.255"]


def test_a_network_of_two_addresses_has_no_broadcast_address() -> None:
    assert broadcasts(interface("tun0", 5, "10.8.0.1/31", "10.9.0.1/32")) == []
    assert broadcasts(interface("eth1", 5, "10.8.0.1/30")) == ["10.8.0.3"]


def test_only_link_local_ipv6_counts_and_only_with_a_scope() -> None:
    assert [str(ip) for ip in ipv4(WIFI)] == ["192.168.7.5", "10.0.0.5"]
    assert [str(ip) for ip in ipv6(WIFI)] == ["fe80::5"]
    assert ipv6(interface("eth1", 0, "fe80::5/64")) == []


@pytest.mark.parametrize(
    ("host", "scope", "dialled"),
    [
        ("192.168.7.9", 0, "192.168.7.9"),
        ("172.16.200.1", 0, "172.16.200.1"),
        ("fe80::9", 3, "fe80::9%wlan0"),
        ("fe80::9", 4, "fe80::9%eth0"),
        ("fe80::9%eth0", 0, "fe80::9%eth0"),
        ("fe80::9%4", 0, "fe80::9%eth0"),
        ("FE80:0::9", 4, "fe80::9%eth0"),
    ],
)
def test_what_is_on_the_link_can_be_dialled(host: str, scope: int, dialled: str) -> None:
    assert on_link_host(BOTH, host, scope) == dialled


@pytest.mark.parametrize(
    ("host", "scope"),
    [
        ("192.168.8.9", 0),
        ("127.0.0.1", 0),
        ("8.8.8.8", 0),
        ("fe80::9", 0),
        ("fe80::9", 9),
        ("fe80::9%tun0", 3),
        ("2001:db8::9", 3),
        ("::1", 3),
        ("::ffff:192.168.7.9", 0),
        ("", 0),
        ("kitchen-pc", 0),
    ],
)
def test_what_is_elsewhere_is_never_dialled(host: str, scope: int) -> None:
    assert on_link_host(BOTH, host, scope) is None

from __future__ import annotations

import socket
import sys
from ipaddress import ip_address, ip_interface
from types import SimpleNamespace

import psutil
import pytest
import trio

from p2pmesh.discovery import interfaces as module
from p2pmesh.discovery import onlink
from p2pmesh.discovery.interfaces import (
    Gateway,
    gateways,
    hold_to_link,
    interfaces,
    output_of,
    parse_netstat,
    refusal,
    usable_interfaces,
)
from p2pmesh.discovery.onlink import Interface

NETSTAT = """\
Routing tables

Internet:
Destination        Gateway            Flags               Netif Expire
default            192.168.1.1        UGScg                 en0
default            link#22            UCSIg               utun4
127                127.0.0.1          UCS                   lo0
192.168.1.1/32     link#11            UCS                   en0      !

Internet6:
Destination        Gateway            Flags               Netif Expire
default            fe80::1%en0        UGcg                  en0
default            fe80::%utun0       UGcIg               utun0
"""
NETSTAT_OLD = "default            10.0.0.1           UGSc           75        0     en1\n"


def entry(family: int, address: str, mask: str | None = None, ptp: str | None = None) -> object:
    return SimpleNamespace(family=family, address=address, netmask=mask, ptp=ptp)


def system(
    monkeypatch: pytest.MonkeyPatch, addresses: dict[str, list[object]], flags: dict[str, str]
) -> dict[str, Interface]:
    """What psutil tells on another system."""
    states = {name: SimpleNamespace(isup=True, flags=flags.get(name, "")) for name in addresses}
    monkeypatch.setattr(module, "SYSTEM", "other")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)
    return {interface.name: interface for interface in interfaces()}


def test_macos_tells_flags_and_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nametoindex", {"lo0": 1, "en0": 11, "utun4": 22}.__getitem__)
    found = system(
        monkeypatch,
        {
            "lo0": [entry(socket.AF_INET, "127.0.0.1", "255.0.0.0")],
            "en0": [
                entry(psutil.AF_LINK, "A4:91:B1:02:03:04"),
                entry(socket.AF_INET, "192.168.1.20", "255.255.255.0"),
                entry(socket.AF_INET6, "fe80::20%en0", "ffff:ffff:ffff:ffff::"),
            ],
            "utun4": [entry(socket.AF_INET, "100.64.0.7", "255.255.255.255", "100.64.0.7")],
        },
        {"lo0": "up,loopback,running,multicast", "utun4": "up,pointopoint,running,multicast"},
    )
    assert found["en0"] == Interface(
        name="en0",
        index=11,
        addresses=(ip_interface("192.168.1.20/24"), ip_interface("fe80::20/64")),
        mac="a4:91:b1:02:03:04",
    )
    assert found["lo0"].is_loopback
    assert found["utun4"].is_point_to_point
    assert [interface.name for interface in usable_interfaces()] == ["en0"]


def test_windows_tells_the_number_of_an_interface_in_its_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = system(
        monkeypatch,
        {
            "Ethernet": [
                entry(psutil.AF_LINK, "A4-91-B1-02-03-04"),
                entry(socket.AF_INET6, "fe80::20%12"),
                entry(socket.AF_INET, "192.168.1.20", "255.255.255.0"),
            ],
            "Loopback Pseudo-Interface 1": [entry(socket.AF_INET, "127.0.0.1", "255.0.0.0")],
            "WireGuard": [entry(socket.AF_INET, "10.8.0.6", "255.255.255.0")],
        },
        {},
    )
    assert found["Ethernet"].index == 12
    assert found["Ethernet"].mac == "a4:91:b1:02:03:04"
    assert found["WireGuard"].index == 0
    assert found["Loopback Pseudo-Interface 1"].is_loopback
    assert [interface.name for interface in usable_interfaces()] == ["Ethernet"]


@pytest.mark.skipif(sys.platform != "linux", reason="compares with what netlink tells")
def test_both_ways_to_ask_tell_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {interface.name: interface for interface in interfaces()}
    monkeypatch.setattr(module, "SYSTEM", "other")
    for other in interfaces():
        one = told[other.name]
        assert set(other.addresses) == set(one.addresses)
        assert (other.index, other.is_loopback) == (one.index, one.is_loopback)
        assert other.is_loopback or other.mac == one.mac


async def test_gateways_belong_to_interfaces_of_this_machine() -> None:
    names = {interface.name for interface in interfaces()}
    assert {gateway.interface for gateway in await gateways()} <= names


async def test_macos_prints_its_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [
        Gateway("en0", ip_address("192.168.1.1")),
        Gateway("en0", ip_address("fe80::1")),
        Gateway("utun0", ip_address("fe80::")),
    ]
    assert parse_netstat(NETSTAT) == expected
    assert parse_netstat(NETSTAT_OLD) == [Gateway("en1", ip_address("10.0.0.1"))]

    monkeypatch.setattr(module, "SYSTEM", "darwin")
    script = f"import sys; sys.stdout.write({NETSTAT!r})"
    monkeypatch.setattr(module, "ROUTES_COMMAND", (sys.executable, "-c", script))
    assert await gateways() == expected
    monkeypatch.setattr(module, "SYSTEM", "win32")
    assert await gateways() == []


async def test_a_program_that_is_missing_or_hangs_tells_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await output_of("no-such-program") == ""
    monkeypatch.setattr(module, "PROGRAM_TIMEOUT_S", 0.1)
    with trio.fail_after(5):
        assert await output_of(sys.executable, "-c", "import time; time.sleep(60)") == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_connection_is_held_to_its_link_until_it_is_admitted(host: str) -> None:
    """Over the loopback interface, which no router is beyond; tests/mesh/ has the routers."""
    (listener,) = await trio.open_tcp_listeners(0, host=host)
    async with listener, await trio.open_tcp_stream(*listener.socket.getsockname()[:2]):
        accepted = await listener.accept()
        async with accepted:
            sock = accepted.socket
            level, option = (
                (socket.IPPROTO_IP, socket.IP_TTL)
                if host == "127.0.0.1"
                else (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
            )
            usual = sock.getsockopt(level, option)
            assert usual > 1
            with hold_to_link(sock):
                assert sock.getsockopt(level, option) == 1
            assert sock.getsockopt(level, option) == usual
            reason = await refusal(sock)
            assert reason is not None
            assert reason.endswith(onlink.ASK)
            with pytest.raises(ZeroDivisionError), hold_to_link(sock):
                raise ZeroDivisionError
            assert sock.getsockopt(level, option) == 1

from __future__ import annotations

import socket
import sys
from ipaddress import ip_address

import pytest
import trio

from p2pmesh.discovery import interfaces, netlink, network_id
from p2pmesh.discovery.interfaces import Gateway
from p2pmesh.discovery.netlink import Neighbour
from p2pmesh.discovery.network_id import RESOLVE_S, network_ids, parse_arp
from p2pmesh.discovery.onlink import Interface, IpAddress

ROUTER, ROUTER_V6 = ip_address("192.168.1.1"), ip_address("fe80::1")
MAC, OTHER_MAC = "a4:91:b1:02:03:04", "a4:91:b1:02:03:05"
ARP = "? (192.168.1.1) at a4:91:b1:2:3:4 on en0 ifscope [ethernet]\n"
NUMBERS = {"eth0": 2, "wlan0": 3, "wg0": 4}

linux = pytest.mark.skipif(sys.platform != "linux", reason="netlink is of Linux")


class Machine:
    """Interfaces, gateways and neighbours; a gateway is a neighbour once it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *gateways: Gateway) -> None:
        self.gateways = gateways
        self.neighbours: list[Neighbour] = []
        self.answers: dict[str, Neighbour] = {}
        self.provoked: list[str] = []
        usable = [Interface(name=name, index=NUMBERS[name]) for name in ("eth0", "wlan0")]
        monkeypatch.setattr(network_id, "usable_interfaces", lambda: usable)
        monkeypatch.setattr(network_id, "gateways", self._gateways)
        monkeypatch.setattr(network_id, "_provoke", self._provoke)
        monkeypatch.setattr(netlink, "neighbours", lambda: self.neighbours)
        monkeypatch.setattr(network_id, "SYSTEM", "linux")

    async def _gateways(self) -> list[Gateway]:
        return list(self.gateways)

    def _provoke(self, interface: Interface, gateway: Gateway) -> None:
        self.provoked.append(gateway.interface)
        if gateway.interface in self.answers:
            self.neighbours.append(self.answers[gateway.interface])


async def test_a_network_is_named_after_its_gateway_on_each_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(
        monkeypatch,
        Gateway("wlan0", ROUTER_V6),
        Gateway("eth0", ROUTER),
        Gateway("eth0", ip_address("192.168.1.2")),
        Gateway("wlan0", ROUTER),
        Gateway("wg0", ROUTER),
    )
    machine.neighbours = [
        Neighbour(NUMBERS["wlan0"], ROUTER_V6, OTHER_MAC),
        Neighbour(NUMBERS["wlan0"], ROUTER, MAC),
        Neighbour(NUMBERS["eth0"], ROUTER, OTHER_MAC),
        Neighbour(NUMBERS["wg0"], ROUTER, OTHER_MAC),
    ]
    assert await network_ids() == {"eth0": OTHER_MAC, "wlan0": MAC}
    assert machine.provoked == []


async def test_a_gateway_that_is_not_known_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    machine = Machine(monkeypatch, Gateway("eth0", ROUTER), Gateway("wlan0", ROUTER_V6))
    machine.answers["eth0"] = Neighbour(NUMBERS["eth0"], ROUTER, MAC)
    started = trio.current_time()
    assert await network_ids() == {"eth0": MAC}  # the other one never answers
    assert trio.current_time() - started == pytest.approx(RESOLVE_S)
    assert sorted(machine.provoked) == ["eth0", "wlan0"]


async def test_a_machine_without_a_gateway_is_on_no_known_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Machine(monkeypatch)
    assert await network_ids() == {}


async def test_macos_is_asked_by_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, Gateway("eth0", ROUTER))
    monkeypatch.setattr(network_id, "SYSTEM", "darwin")
    script = f"import sys; assert sys.argv[1] == '{ROUTER}'; print({ARP!r})"
    monkeypatch.setattr(network_id, "ARP_COMMAND", (sys.executable, "-c", script))
    assert await network_ids() == {"eth0": MAC}


def test_macos_leaves_zeros_out() -> None:
    assert parse_arp(ARP) == MAC
    assert parse_arp("? (192.168.1.1) at (incomplete) on en0 ifscope [ethernet]\n") == ""
    assert parse_arp("192.168.1.1 (192.168.1.1) -- no entry\n") == ""


@linux
async def test_this_machine_names_its_networks() -> None:
    usable = {interface.name for interface in interfaces.usable_interfaces()}
    found = await network_ids()
    assert found.keys() <= usable
    assert all(len(bytes.fromhex(mac.replace(":", ""))) == 6 for mac in found.values())


@linux
async def test_a_gateway_beyond_an_interface_that_is_gone_stays_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = Interface(name="gone0", index=max(index for index, _ in socket.if_nameindex()) + 9)
    monkeypatch.setattr(network_id, "RESOLVE_S", 0.05)
    monkeypatch.setattr(network_id, "usable_interfaces", lambda: [gone])
    for router in (ROUTER, ROUTER_V6):

        async def found(router: IpAddress = router) -> list[Gateway]:
            return [Gateway(gone.name, router)]

        monkeypatch.setattr(network_id, "gateways", found)
        assert await network_ids() == {}

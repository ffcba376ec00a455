"""Which networks this machine is on, by the MAC addresses of their gateways.

Subnets and names of networks repeat: half of all homes and cafés are 192.168.1.0/24.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping

import trio

from p2pmesh.discovery import netlink
from p2pmesh.discovery.interfaces import SYSTEM, Gateway, gateways, output_of, usable_interfaces
from p2pmesh.discovery.onlink import Interface

RESOLVE_S = 1.0  # a gateway that is there answers in milliseconds, one at Wi-Fi's end in 200
POLL_S = 0.02
DISCARD_PORT = 9  # what is sent there is thrown away; it is sent to have the address resolved
ARP_COMMAND = ("/usr/sbin/arp", "-n")  # macOS


async def network_ids() -> Mapping[str, str]:
    """Return the network of each usable interface: its gateway's MAC address, by interface name.

    An interface without a gateway, or whose gateway does not answer, is on no known network.
    """
    usable = {interface.name: interface for interface in usable_interfaces()}
    wanted: dict[Interface, Gateway] = {}
    for gateway in sorted(await gateways(), key=lambda one: one.address.version):
        if gateway.interface in usable:
            wanted.setdefault(usable[gateway.interface], gateway)
    found = await _macs(wanted)
    if len(found) < len(wanted):
        for interface, gateway in wanted.items():
            if interface.name not in found:
                _provoke(interface, gateway)
        with trio.move_on_after(RESOLVE_S):
            while len(found) < len(wanted):
                await trio.sleep(POLL_S)
                found = await _macs(wanted)
    return found


async def _macs(wanted: Mapping[Interface, Gateway]) -> dict[str, str]:
    """Return the MAC addresses that the system knows now, by interface name."""
    if SYSTEM == "linux":
        known = {(one.index, one.address): one.mac for one in netlink.neighbours()}
        found = {i.name: known.get((i.index, to.address), "") for i, to in wanted.items()}
    else:
        printed = {
            i.name: await output_of(*ARP_COMMAND, str(to.address)) for i, to in wanted.items()
        }
        found = {name: parse_arp(text) for name, text in printed.items()}
    return {name: mac for name, mac in found.items() if mac}


def parse_arp(text: str) -> str:
    """Parse `? (192.168.1.1) at a4:91:b1:2:3:4 on en0 ifscope [ethernet]`, as macOS prints it."""
    printed = re.search(r" at ((?:[0-9a-f]{1,2}:){5}[0-9a-f]{1,2}) ", text, re.IGNORECASE)
    return ":".join(byte.zfill(2) for byte in printed[1].lower().split(":")) if printed else ""


def _provoke(interface: Interface, gateway: Gateway) -> None:
    """Make the system look for a gateway's MAC address, by a datagram to it."""
    v4 = gateway.address.version == 4
    with socket.socket(socket.AF_INET if v4 else socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        scope = () if v4 else (0, interface.index)
        try:
            if SYSTEM == "linux":
                # Two interfaces of one subnet: it would leave by the preferred one.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.name.encode())
            sock.sendto(b"", (str(gateway.address), DISCARD_PORT, *scope))
        except OSError:
            return  # the interface went meanwhile: its network stays unknown

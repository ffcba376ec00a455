"""Networks for tests: machines as network namespaces, joined by bridges and routers.

Linux only, as root. Nothing of it is in this machine's own network, and all of it is removed at
the end, even when a test fails.
"""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import itertools
import os
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.mesh import nodes
from tests.mesh.nodes import Node

NAMES = Path("/run/netns")
CLONE_NEWNET = 0x40000000  # setns: a network namespace and no other kind
TUNSETIFF = 0x400454CA
IFF_TUN_NO_PACKET_INFO = 0x1001
PACKET_BYTES_MAX = 65536
OUTSIDE = "outside"  # a router's interface on the LAN that it is a guest of

_numbers = itertools.count(1)


@dataclass(slots=True)
class Namespace:
    """One machine, or the bridge of a LAN, by the name that `ip netns` knows."""

    name: str

    @property
    def command(self) -> tuple[str, ...]:
        """Put this before a command that is to run there, with a /sys of its own."""
        return ("ip", "netns", "exec", self.name)

    def ip(self, *lines: str) -> None:
        """Run commands of `ip`, as `link set eth0 down`."""
        _run("ip", "-n", self.name, "-batch", "-", text="\n".join(lines))

    def run(self, *command: str) -> str:
        """Run a program there to its end and return what it printed."""
        return _run(*self.command, *command)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Let this thread be there: its new sockets and child processes belong there for good.

        Never across an `await`, as other tasks of the thread would be there too.
        """
        with Path("/proc/thread-self/ns/net").open() as home, (NAMES / self.name).open() as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def sysctl(self, **settings: int) -> None:
        """Set values of `/proc/sys/net`, dots as double underscores."""
        with self.inside():
            for key, value in settings.items():
                Path("/proc/sys/net", *key.split("__")).write_text(str(value))


@dataclass(slots=True)
class Host(Namespace):
    """A machine on one LAN, by its interface `eth0`."""

    address: str
    """Its IPv4 address."""
    lan: Lan

    def mac(self, interface: str = "eth0") -> str:
        """The MAC address of an interface."""
        return self._read(interface, "address")

    def bytes_sent(self, interface: str = "eth0") -> int:
        """How much went out of an interface so far."""
        return int(self._read(interface, "statistics/tx_bytes"))

    def link_local(self, interface: str = "eth0") -> str:
        """The IPv6 link-local address, without scope."""
        shown = self.run("ip", "-6", "-o", "address", "show", "dev", interface, "scope", "link")
        return shown.split()[3].partition("/")[0]

    def index(self, interface: str = "eth0") -> int:
        """The number of an interface, which is the scope of its link-local addresses."""
        return int(self._read(interface, "ifindex"))

    def _read(self, interface: str, name: str) -> str:
        return self.run("cat", f"/sys/class/net/{interface}/{name}").strip()

    def start(self, home: Path, *options: str) -> Node:
        """Start a real node there, at the default ports, and wait until it is ready."""
        name = self.name.split("-", 3)[3]
        return nodes.start(home, *options, name=name, inside=self.command)


@dataclass(slots=True)
class Lan:
    """A bridge with an IPv4 subnet; `.1` is the gateway, if it has one."""

    bridge: Namespace
    subnet: ipaddress.IPv4Network
    addresses: Iterator[ipaddress.IPv4Address] = field(init=False)
    ports: Iterator[int] = field(default_factory=itertools.count, init=False)

    def __post_init__(self) -> None:
        self.addresses = itertools.islice(self.subnet.hosts(), 1, None)

    @property
    def gateway(self) -> str:
        """The address that hosts send to what is elsewhere."""
        return str(next(self.subnet.hosts()))

    def plug(self, machine: Namespace, interface: str, address: str) -> None:
        """Give a machine an interface on this LAN."""
        port = f"port{next(self.ports)}"
        self.bridge.ip(
            f"link add {port} type veth peer name {interface} netns {machine.name}",
            f"link set {port} master br0 up",
        )
        machine.ip(
            f"address add {address}/{self.subnet.prefixlen} dev {interface}",
            f"link set {interface} up",
        )


class Network:
    """Makes LANs, hosts and routers; made by `network()`, which removes them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def lan(self, subnet: str = "192.168.7.0/24") -> Lan:
        """A LAN of its own; two of the same subnet are two places."""
        bridge = Namespace(self._name("bridge"))
        bridge.ip("link add br0 type bridge", "link set br0 up")
        return Lan(bridge, ipaddress.IPv4Network(subnet))

    def host(self, lan: Lan, name: str = "host", *, interface: str = "eth0") -> Host:
        """A machine on a LAN, whose default route leads to the LAN's gateway."""
        host = Host(self._name(name), str(next(lan.addresses)), lan)
        lan.plug(host, interface, host.address)
        host.ip(f"route add default via {lan.gateway}")
        return host

    def gateway(self, lan: Lan) -> Host:
        """A router to nowhere: it only gives the LAN's gateway a MAC address."""
        gateway = Host(self._name("gateway"), lan.gateway, lan)
        lan.plug(gateway, "eth0", gateway.address)
        return gateway

    def router(
        self,
        inside: Lan,
        outside: Lan,
        *,
        masquerade: bool = False,
        forwards: Mapping[int, tuple[Host, int]] | None = None,
    ) -> Host:
        """The gateway of one LAN, and a guest of another with the address `Host.address`.

        Args:
            inside: Its hosts reach all that the outer LAN's hosts have a way back from.
            outside: The LAN of which the router is one host.
            masquerade: Whether connections from inside come from the router's own address.
            forwards: Ports of the router, and the host and port inside where they lead.
        """
        router = self.host(outside, "router", interface=OUTSIDE)
        inside.plug(router, "inside", inside.gateway)
        router.sysctl(ipv4__ip_forward=1)
        rules = [
            f"add rule ip nat pre iifname {OUTSIDE} tcp dport {port} dnat to {host.address}:{to}"
            for port, (host, to) in (forwards or {}).items()
        ]
        if masquerade:
            rules.append(f"add rule ip nat post oifname {OUTSIDE} masquerade")
        if rules:
            self._translate(router, rules)
        return router

    def _translate(self, router: Host, rules: list[str]) -> None:
        if shutil.which("nft") is None:
            pytest.skip("address translation needs nft (package nftables)")
        chains = [
            "add table ip nat",
            "add chain ip nat pre { type nat hook prerouting priority -100; }",
            "add chain ip nat post { type nat hook postrouting priority 100; }",
        ]
        _run(*router.command, "nft", "-f", "-", text="\n".join([*chains, *rules]))

    def tunnel(
        self, one: Host, other: Host, subnet: str = "10.8.0.0/24", *, delay_s: float = 0.0
    ) -> tuple[str, str]:
        """Join two hosts by a `tun0` each, as a VPN does; returns their addresses in it.

        Args:
            one: A host.
            other: Another one.
            subnet: Of the tunnel.
            delay_s: How long a packet takes, each way.
        """
        network = ipaddress.IPv4Network(subnet)
        addresses = [str(ip) for ip in itertools.islice(network.hosts(), 2)]
        ends = []
        for host, address in zip((one, other), addresses, strict=True):
            ends.append(_open_tun(host))
            self._stack.callback(os.close, ends[-1])
            host.ip(f"address add {address}/{network.prefixlen} dev tun0", "link set tun0 up")
        stop_read, stop_write = os.pipe()
        carrier = threading.Thread(target=_carry, args=(*ends, stop_read, delay_s))
        carrier.start()
        self._stack.callback(os.close, stop_read)
        self._stack.callback(carrier.join)
        self._stack.callback(os.close, stop_write)
        return addresses[0], addresses[1]

    def move(self, host: Host, lan: Lan) -> None:
        """Carry a host to another LAN: same interface name, another address by default."""
        host.ip("link del eth0")
        host.lan, host.address = lan, str(next(lan.addresses))
        lan.plug(host, "eth0", host.address)
        host.ip(f"route add default via {lan.gateway}")

    def _name(self, what: str) -> str:
        name = f"p2pmesh-{os.getpid()}-{next(_numbers)}-{what}"
        _run("ip", "netns", "add", name)
        self._stack.callback(_run, "ip", "netns", "del", name)
        namespace = Namespace(name)
        # Otherwise an IPv6 address is not usable for a second or two, until nobody objected.
        namespace.sysctl(ipv6__conf__default__accept_dad=0)
        namespace.ip("link set lo up")
        return name


@contextmanager
def network() -> Iterator[Network]:
    """An empty network to build on; skips the test where that cannot be."""
    _skip_where_impossible()
    with ExitStack() as stack:
        yield Network(stack)


def _skip_where_impossible() -> None:
    if sys.platform != "linux":
        pytest.skip("network namespaces are of Linux")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need ip (package iproute2)")
    trial = f"p2pmesh-{os.getpid()}-trial"
    commands = [
        ["ip", "netns", "add", trial],
        ["ip", "-n", trial, "link", "add", "port0", "type", "veth"],
        ["ip", "-n", trial, "link", "add", "br0", "type", "bridge"],
        ["ip", "netns", "del", trial],
    ]
    results = [subprocess.run(each, capture_output=True, check=False) for each in commands]
    failed = [done.stderr.decode().strip() for done in results if done.returncode]
    if failed:
        pytest.skip(f"this machine has no network namespaces, veth or bridges: {failed[0]}")


def _run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{text or ''}"
    return done.stdout


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    if libc.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _open_tun(host: Host) -> int:
    if not Path("/dev/net/tun").exists():
        pytest.skip("a tunnel needs /dev/net/tun")
    with host.inside():
        tun = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN_NO_PACKET_INFO))
    return tun


def _carry(one: int, other: int, stop: int, delay_s: float) -> None:
    """Carry packets between two tunnel ends until `stop` is closed at its other end."""
    to = {one: other, other: one}
    under_way: deque[tuple[float, int, bytes]] = deque()
    while True:
        left_s = under_way[0][0] - time.monotonic() if under_way else None
        readable, _, _ = select.select([one, other, stop], [], [], left_s and max(left_s, 0))
        if stop in readable:
            return
        now_s = time.monotonic()
        for end in readable:
            under_way.append((now_s + delay_s, to[end], os.read(end, PACKET_BYTES_MAX)))
        while under_way and under_way[0][0] <= now_s:
            _, end, packet = under_way.popleft()
            os.write(end, packet)

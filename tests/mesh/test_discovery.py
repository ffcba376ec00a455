"""Discovery between machines, each way alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.mesh.namespaces import Host, network

HEARD_WITHIN_S = 1.0


@contextmanager
def discoverer(host: Host, name: str, way: str, role: str) -> Iterator[subprocess.Popen[str]]:
    command = [*host.command, sys.executable, "-m", "tests.mesh.discoverer", name, way, role]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str], *wanted: tuple[str, bool]) -> float:
    """Wait until these meshes were heard, each by IPv4 or by IPv6; returns when the last was."""
    missing = set(wanted)
    last_s = 0.0
    assert process.stdout is not None
    while missing:
        mesh, host, after_s = process.stdout.readline().split()
        is_v6 = ":" in host
        assert not is_v6 or host.endswith("%eth0")
        assert mesh != "mesh-of-stranger"
        missing.discard((mesh.removeprefix("mesh-of-"), is_v6))
        last_s = float(after_s)
    return last_s


@pytest.mark.parametrize("has_ipv4", [True, False])
@pytest.mark.parametrize("way", ["beacon", "mdns"])
def test_machines_of_a_lan_hear_each_other(way: str, *, has_ipv4: bool) -> None:
    families = [True] if not has_ipv4 else [False, True]
    with network() as net:
        lan = net.lan()
        one, two, three = net.host(lan), net.host(lan), net.host(lan)
        stranger = net.host(net.lan())
        for host in () if has_ipv4 else (one, two, three, stranger):
            host.ip(f"address del {host.address}/{lan.subnet.prefixlen} dev eth0")
        with (
            discoverer(stranger, "stranger", way, "announce"),
            discoverer(one, "one", way, "announce") as first,
            discoverer(two, "two", way, "announce") as second,
            discoverer(three, "three", way, "listen") as late,
        ):
            known = [(name, is_v6) for name in ("one", "two") for is_v6 in families]
            assert heard(late, *known) < HEARD_WITHIN_S
            assert heard(first, *(("two", is_v6) for is_v6 in families))
            assert heard(second, *(("one", is_v6) for is_v6 in families))


@pytest.mark.full
@pytest.mark.parametrize("way", ["beacon", "mdns"])
def test_a_machine_that_is_carried_to_another_lan_hears_the_mesh_there(way: str) -> None:
    with network() as net:
        home, cafe = net.lan(), net.lan()
        laptop = net.host(home)
        with (
            discoverer(net.host(home), "home", way, "announce"),
            discoverer(net.host(cafe), "cafe", way, "announce"),
            discoverer(laptop, "laptop", way, "listen") as carried,
        ):
            assert heard(carried, ("home", False), ("home", True))
            net.move(laptop, cafe)
            assert heard(carried, ("cafe", False), ("cafe", True))

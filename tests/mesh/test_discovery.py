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


def heard(process: subprocess.Popen[str], *names: str) -> dict[tuple[str, bool], float]:
    """For each of these meshes when it was heard first, by IPv4 and by IPv6."""
    wanted = {(f"mesh-of-{name}", is_v6) for name in names for is_v6 in (False, True)}
    found: dict[tuple[str, bool], float] = {}
    assert process.stdout is not None
    while not wanted <= found.keys():
        mesh, host, after_s = process.stdout.readline().split()
        assert ":" not in host or host.endswith("%eth0")
        found.setdefault((mesh, ":" in host), float(after_s))
    return found


@pytest.mark.parametrize("way", ["beacon", "mdns"])
def test_machines_of_a_lan_hear_each_other_by_ipv4_and_ipv6(way: str) -> None:
    with network() as net:
        lan = net.lan()
        one, two, three, stranger = net.host(lan), net.host(lan), net.host(lan), net.host(net.lan())
        with (
            discoverer(stranger, "stranger", way, "announce"),
            discoverer(one, "one", way, "announce") as first,
            discoverer(two, "two", way, "announce") as second,
            discoverer(three, "three", way, "listen") as late,
        ):
            times = heard(late, "one", "two")
            assert max(times.values()) < HEARD_WITHIN_S
            assert {mesh for mesh, _ in times} == {"mesh-of-one", "mesh-of-two"}
            assert heard(first, "two")
            assert heard(second, "one")

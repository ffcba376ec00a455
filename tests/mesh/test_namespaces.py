"""The networks that other tests are made in."""

from __future__ import annotations

import os
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http import HTTPStatus
from pathlib import Path

import psutil
import pytest

from tests.mesh.namespaces import NAMES, Host, network
from tests.mesh.nodes import end

PORT = 9338
TIMEOUT_S = 5.0
UNREACHABLE_S = 0.3


@contextmanager
def listening(host: Host) -> Iterator[socket.socket]:
    with host.inside():
        listener = socket.create_server(("0.0.0.0", PORT))
    with listener:
        listener.settimeout(TIMEOUT_S)
        yield listener


def source_seen(client: Host, listener: socket.socket, to: str, port: int = PORT) -> str:
    """Connect from a host, and return the address that the listener sees."""
    with client.inside():
        stream = socket.create_connection((to, port), TIMEOUT_S)
    with stream, closing(listener.accept()[0]) as accepted:
        stream.sendall(b"hi")
        assert accepted.recv(2) == b"hi"
        return str(accepted.getpeername()[0])


def test_hosts_of_a_lan_see_each_other_and_nothing_else() -> None:
    before = set(psutil.net_if_addrs())
    with network() as net:
        lan = net.lan()
        one, other, stranger = net.host(lan), net.host(lan), net.host(net.lan())
        assert len({one.address, other.address}) == 2
        assert stranger.address == one.address  # of equal subnets
        with listening(other) as listener:
            assert source_seen(one, listener, other.address) == one.address
            assert source_seen(other, listener, "127.0.0.1") == "127.0.0.1"
            with stranger.inside(), pytest.raises(OSError, match=r"timed out|No route"):
                socket.create_connection((other.address, PORT), UNREACHABLE_S)
        with other.inside():
            v6 = socket.create_server(("::", PORT), family=socket.AF_INET6)
        with one.inside(), v6:
            to = (other.link_local(), PORT, 0, one.index())
            with socket.socket(socket.AF_INET6) as client:
                client.settimeout(TIMEOUT_S)
                client.connect(to)
                assert client.getsockname()[0] == one.link_local()
        assert set(psutil.net_if_addrs()) == before
    assert not list(NAMES.glob(f"p2pmesh-{os.getpid()}-*"))


def test_routers_forward_masquerade_and_lead_a_port_inside() -> None:
    with network() as net:
        inner, outer = net.lan("192.168.8.0/24"), net.lan("192.168.7.0/24")
        inside, outside = net.host(inner), net.host(outer)
        router = net.router(inner, outer)
        outside.ip(f"route add {inner.subnet} via {router.address}")
        with listening(outside) as listener, listening(inside) as hidden:
            assert source_seen(inside, listener, outside.address) == inside.address
            assert source_seen(outside, hidden, inside.address) == outside.address

        hiding = net.lan("192.168.9.0/24")
        guest = net.host(hiding)
        nat = net.router(hiding, outer, masquerade=True, forwards={7000: (guest, PORT)})
        with listening(outside) as listener, listening(guest) as hidden:
            assert source_seen(guest, listener, outside.address) == nat.address
            assert source_seen(outside, hidden, nat.address, 7000) == outside.address


def test_a_tunnel_joins_hosts_of_different_lans() -> None:
    with network() as net:
        one, other = net.host(net.lan()), net.host(net.lan())
        near, far = net.tunnel(one, other)
        with listening(other) as listener:
            assert source_seen(one, listener, far) == near


def test_a_tunnel_takes_its_time() -> None:
    with network() as net:
        one, other = net.host(net.lan()), net.host(net.lan())
        _, far = net.tunnel(one, other, delay_s=0.1)
        with listening(other) as listener:
            began = time.monotonic()
            source_seen(one, listener, far)
            assert time.monotonic() - began >= 0.2


def test_a_node_of_one_host_is_reached_from_another(tmp_path: Path) -> None:
    with network() as net:
        lan = net.lan()
        kitchen, attic = net.host(lan, "kitchen"), net.host(lan, "attic")
        node = kitchen.start(tmp_path)
        try:
            assert (node.name, node.line["nodes"][0]["peer"]) == ("kitchen", f"[::]:{PORT}")
            assert node.status()["node"]["name"] == "kitchen"
            with kitchen.inside(), urllib.request.urlopen(f"{node.api}/models") as answer:
                assert answer.status == HTTPStatus.OK
            with attic.inside():
                socket.create_connection((kitchen.address, PORT), TIMEOUT_S).close()
        finally:
            end(node)


def test_a_host_is_carried_to_another_lan_and_back() -> None:
    with network() as net:
        home, cafe = net.lan(), net.lan()
        laptop = net.host(home)
        gateways = {"home": net.gateway(home), "cafe": net.gateway(cafe)}
        assert gateways["home"].mac() != gateways["cafe"].mac()
        for place in ("home", "cafe", "home"):
            gateway = gateways[place]
            net.move(laptop, gateway.lan)
            with listening(gateway) as listener:
                assert source_seen(laptop, listener, gateway.address) == laptop.address


def test_a_network_is_removed_when_a_test_fails() -> None:
    with pytest.raises(ZeroDivisionError), network() as net:
        name = net.host(net.lan()).name
        assert (NAMES / name).exists()
        raise ZeroDivisionError
    assert not (NAMES / name).exists()


def test_a_thread_is_inside_for_a_moment_only() -> None:
    here = Path("/proc/thread-self/ns/net").readlink()
    with network() as net:
        host = net.host(net.lan())
        with pytest.raises(ZeroDivisionError), host.inside():
            assert Path("/proc/thread-self/ns/net").readlink() != here
            raise ZeroDivisionError
        assert Path("/proc/thread-self/ns/net").readlink() == here

"""Who is on the link: connections as routers, tunnels and proxies make them, over real sockets."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest
import trio

from p2pmesh.discovery.interfaces import hold_to_link, refusal, usable_interfaces
from p2pmesh.discovery.network_id import network_ids
from tests.mesh.namespaces import Host, Lan, Network, network

PORT = 9338
FORWARDED, FORWARDED_AS_ROUTER = 7000, 7001
TIMEOUT_S = 5.0
NOTHING_COMES_S = 0.6
CHALLENGE = b"challenge"
ADMITTED, NOTHING = "admitted", "nothing"
TTL = 64


@dataclass
class Neighbourhood:
    net: Network
    home: Lan
    victim: Host
    neighbour: Host
    router: Host
    outsider: Host


@pytest.fixture(scope="module")
def place() -> Iterator[Neighbourhood]:
    """A home behind a router that forwards ports, and somebody outside it."""
    with network() as net:
        home, internet = net.lan(), net.lan("203.0.113.0/24")
        victim, neighbour, outsider = net.host(home), net.host(home), net.host(internet)
        ports = {FORWARDED: (victim, PORT), FORWARDED_AS_ROUTER: (victim, PORT + 1)}
        router = net.router(home, internet, masquerade=True, forwards=ports)
        hide = f"add rule ip nat post oifname inside tcp dport {PORT + 1} masquerade"
        router.run("nft", hide)
        outsider.ip(f"route add {home.subnet} via {router.address}")
        yield Neighbourhood(net, home, victim, neighbour, router, outsider)


def meet(
    victim: Host, client: Host, to: tuple[str, int] | tuple[str, int, int, int], *, v6: bool = True
) -> str:
    """Connect as a stranger; returns why it is refused, or what it gets when it is not."""
    at = PORT + 1 if to[1] == FORWARDED_AS_ROUTER else PORT
    with victim.inside():
        listener = (
            socket.create_server(("::", at), family=socket.AF_INET6, dualstack_ipv6=True)
            if v6
            else socket.create_server(("0.0.0.0", at))
        )
    with client.inside():
        stream = socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET)
    with listener, stream:
        stream.settimeout(TIMEOUT_S)
        stream.connect(to)
        with closing(listener.accept()[0]) as accepted:
            with victim.inside():
                reason = trio.run(refusal, accepted)
            return reason or challenge(accepted, stream)


def challenge(accepted: socket.socket, stream: socket.socket) -> str:
    stream.settimeout(NOTHING_COMES_S)
    try:
        with hold_to_link(accepted):
            accepted.sendall(CHALLENGE)
            assert stream.recv(len(CHALLENGE)) == CHALLENGE
    except TimeoutError:
        accepted.close()  # the kernel goes on to send what was not acknowledged
        with pytest.raises(TimeoutError):
            stream.recv(len(CHALLENGE))
        return NOTHING
    assert accepted.getsockopt(socket.IPPROTO_IP, socket.IP_TTL) == TTL
    assert accepted.family == socket.AF_INET or (
        accepted.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS) == TTL
    )
    return ADMITTED


@pytest.mark.parametrize("v6", [False, True])
def test_a_neighbour_is_let_in(place: Neighbourhood, v6: bool) -> None:  # noqa: FBT001
    to = place.victim.address, PORT
    assert meet(place.victim, place.neighbour, to, v6=v6) == ADMITTED


def test_a_neighbour_by_ipv6_is_let_in_by_its_link_local_address_alone(
    place: Neighbourhood,
) -> None:
    to = place.victim.link_local(), PORT, 0, place.neighbour.index()
    assert meet(place.victim, place.neighbour, to) == ADMITTED
    for host, address in ((place.victim, "fd00::1"), (place.neighbour, "fd00::2")):
        host.ip(f"address add {address}/64 dev eth0")
    reason = meet(place.victim, place.neighbour, ("fd00::1", PORT))
    assert "fd00::2 is not a link-local address" in reason


@pytest.mark.parametrize("v6", [False, True])
def test_whoever_hides_behind_a_masquerading_router_on_the_link_gets_nothing(
    place: Neighbourhood,
    v6: bool,  # noqa: FBT001
) -> None:
    hidden = place.net.lan("10.9.0.0/24")
    client = place.net.host(hidden)
    place.net.router(hidden, place.home, masquerade=True)
    assert meet(place.victim, client, (place.victim.address, PORT), v6=v6) == NOTHING


def test_another_subnet_is_another_network(place: Neighbourhood) -> None:
    reason = meet(place.victim, place.outsider, (place.victim.address, PORT))
    assert f"{place.outsider.address} is on another network" in reason


def test_a_forwarded_port_leads_nobody_in(place: Neighbourhood) -> None:
    reason = meet(place.victim, place.outsider, (place.router.address, FORWARDED))
    assert f"{place.outsider.address} is on another network" in reason
    reason = meet(place.victim, place.outsider, (place.router.address, FORWARDED_AS_ROUTER))
    assert f"the router at {place.home.gateway}" in reason


def test_a_proxy_on_the_machine_itself_leads_nobody_in(place: Neighbourhood) -> None:
    victim = place.victim
    scoped = victim.link_local(), PORT, 0, victim.index()
    for to in ((victim.address, PORT), ("127.0.0.1", PORT), ("::1", PORT), scoped):
        assert "the node's own machine" in meet(victim, victim, to)


def test_a_tunnel_leads_nobody_in(place: Neighbourhood) -> None:
    _, address = place.net.tunnel(place.outsider, place.victim)
    assert "through a tunnel" in meet(place.victim, place.outsider, (address, PORT))
    to = place.victim.link_local("tun0"), PORT, 0, place.outsider.index("tun0")
    assert "through a tunnel" in meet(place.victim, place.outsider, to)


def test_a_container_is_no_neighbour_of_its_host(place: Neighbourhood) -> None:
    place.victim.ip(
        "link add br0 type bridge",
        "address add 172.17.0.1/16 dev br0",
        "link set br0 up",
        "tuntap add tap0 mode tap",
        "link set tap0 master br0 up",
    )
    containers = Lan(place.victim, ipaddress.IPv4Network("172.17.0.0/16"))
    container = place.net.host(containers)
    assert "virtual machines" in meet(place.victim, container, ("172.17.0.1", PORT))
    with place.victim.inside():
        assert [interface.name for interface in usable_interfaces()] == ["eth0"]


def test_a_network_is_known_by_its_gateway_wherever_else_its_subnet_is() -> None:
    with network() as net:
        home, cafe, field = net.lan(), net.lan(), net.lan()
        gateways = {id(lan): net.gateway(lan) for lan in (home, cafe)}
        laptop = net.host(home)
        for lan in (home, cafe, home, field):
            net.move(laptop, lan)
            expected = {"eth0": gateways[id(lan)].mac()} if lan is not field else {}
            with laptop.inside():
                assert trio.run(network_ids) == expected
        net.move(laptop, cafe)
        gateway = gateways[id(cafe)]
        laptop.ip("route del default", f"route add default via {gateway.link_local()} dev eth0")
        with laptop.inside():  # IPv6 alone
            assert trio.run(network_ids) == {"eth0": gateway.mac()}

"""Whether a newcomer is on the same link as this node, and so may be admitted without a token.

Pure: decides from facts about this machine's interfaces, which `interfaces` reads.

The address that a connection comes from proves nothing about who stands behind it: a router that
masquerades lends its own. So this is one half of the rule; `interfaces.hold_to_link` is the other.
What a machine on the link relays on purpose counts as that machine.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

IpAddress = IPv4Address | IPv6Address
IpInterface = IPv4Interface | IPv6Interface

TUNNELS = frozenset(["tap", "vxlan", "geneve", "gretap", "ip6gretap", "erspan", "ip6erspan"])
"""Kinds of interfaces that carry Ethernet to anywhere; tunnels of IP have no MAC address."""
OF_GUESTS = TUNNELS | {"veth"}
"""Kinds of a bridge's ports behind which only containers and virtual machines are."""

ASK = "ask a member of the mesh for an invitation (p2pmesh invite)"


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface of this machine, as far as its system tells."""

    name: str
    index: int
    """The number that scopes link-local addresses; 0 when it is not known."""
    addresses: tuple[IpInterface, ...] = ()
    """Without scope."""
    mac: str = ""
    """Its Ethernet address; tunnels of IP (tun, WireGuard, PPP) have none."""
    has_carrier: bool = True
    is_loopback: bool = False
    is_point_to_point: bool = False
    is_port: bool = False
    """Whether it belongs to a bridge or bond, which stands for it."""
    kind: str = ""
    """The kind of virtual interface, as `ip link` calls it ("tap" for a tun device that carries
    Ethernet); "" for hardware, and where the system does not tell."""
    ports: frozenset[str] | None = None
    """The kinds of a bridge's ports; None for all that is no bridge, or where that is not known."""

    def holds(self, address: IpAddress) -> bool:
        """Whether `address`, without scope, is one of this interface."""
        return any(own.ip == address for own in self.addresses)

    def reaches(self, address: IpAddress) -> bool:
        """Whether `address`, without scope, is inside a prefix of this interface."""
        return any(address in own.network for own in self.addresses)


def counts(interface: Interface) -> bool:
    """Whether what is on this interface's link is near this machine, as people understand it."""
    return (
        interface.has_carrier
        and bool(interface.mac)
        and not interface.is_loopback
        and not interface.is_point_to_point
        and not interface.is_port
        and interface.kind not in TUNNELS
        and (interface.ports is None or not interface.ports <= OF_GUESTS)
    )


def refusal(
    source: IpAddress,
    local: IpAddress,
    interfaces: Collection[Interface],
    gateways: Collection[IpAddress],
) -> str | None:
    """Return why a newcomer is not admitted without an invitation; None when it may be.

    Args:
        source: Where the connection comes from. A link-local IPv6 address has the number of its
            interface as its scope.
        local: This node's end of it.
        interfaces: All of this machine.
        gateways: The default gateways of this machine: what they forward comes from anywhere.
    """
    scope = source.scope_id if isinstance(source, IPv6Address) else None
    source, local = plain(source), plain(local)
    if source.is_loopback or any(interface.holds(source) for interface in interfaces):
        # A proxy or a tunnel's end on this machine speaks for people elsewhere.
        return f"a connection from the node's own machine can be from anywhere; {ASK}"
    if source in {plain(gateway) for gateway in gateways}:
        return f"a connection from the router at {source} can be from anywhere; {ASK}"
    if isinstance(source, IPv6Address):
        if not source.is_link_local:
            # A prefix of global addresses does not say what is on the link: RFC 5942.
            return f"{source} is not a link-local address; {ASK}"
        near = [one for one in interfaces if one.index and str(one.index) == scope]
    else:
        near = [one for one in interfaces if one.holds(local) and one.reaches(source)]
    if not near:
        return f"{source} is on another network than this node; {ASK}"
    if not any(counts(interface) for interface in near):
        return f"{source} comes through a tunnel or a bridge of virtual machines; {ASK}"
    return None


def plain(address: IpAddress) -> IpAddress:
    """Return an address without its scope; one of IPv4 that is mapped into IPv6 as IPv4."""
    if isinstance(address, IPv6Address):
        return address.ipv4_mapped or IPv6Address(int(address))
    return address

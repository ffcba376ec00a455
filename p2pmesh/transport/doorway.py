"""Which connections are listened to before anybody has proved who they are. Pure.

Whoever connects costs this node a descriptor, and milliseconds for TLS and the hello. Both are
bounded, and neither bound shuts anybody out for long: when all places are taken, the connection
that has been there longest without a proof gives way to the newest. Networks from which members
came, and this machine, have places of their own, so a crowd of strangers does not stand in their
way; after too many hellos that came to nothing they wait a moment where others are hung up on.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from p2pmesh.transport.banlist import Troublesome

STRANGERS_PER_NETWORK_MAX = 4  # one network cannot take all the places of the others
FRIENDS_MAX = 1024  # networks remembered; beyond that the one that was proved longest ago goes
IPV6_PREFIX = 64  # whoever has one address has all that share these bits

Visit = TypeVar("Visit", bound=Hashable)


def network_of(host: str) -> str:
    """Return the network of `host`: its IPv4 address, or the first half of its IPv6 address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.is_loopback:
        return "loopback"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return network_of(str(address.ipv4_mapped))
    return str(ipaddress.ip_network((address, IPV6_PREFIX), strict=False))


class Doorway(Generic[Visit]):
    """The connections that have proved nothing yet.

    Args:
        places: How many of strangers, and how many of networks from which members came.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._strangers: OrderedDict[Visit, str] = OrderedDict()
        self._friends: OrderedDict[Visit, str] = OrderedDict()
        self._proved: OrderedDict[str, None] = OrderedDict()
        self._troublesome = Troublesome()

    def enter(self, host: str, visit: Visit) -> Visit | None:
        """Take a place; returns the visit that gives way, which has left then."""
        network = network_of(host)
        visits, of_one_max = self._strangers, STRANGERS_PER_NETWORK_MAX
        if self._is_friend(network):
            visits, of_one_max = self._friends, self._places
        visits[visit] = network
        oldest: Visit | None = None
        if Counter(visits.values())[network] > of_one_max:
            oldest = next(one for one, at in visits.items() if at == network)
        elif len(visits) > self._places:
            oldest = next(iter(visits))
        if oldest is not None:
            del visits[oldest]
        return oldest

    def leave(self, visit: Visit) -> None:
        """Give the place back, if it was not taken meanwhile."""
        self._strangers.pop(visit, None)
        self._friends.pop(visit, None)

    def proved(self, host: str) -> None:
        """A member proved who it is, from `host` or at it."""
        network = network_of(host)
        self._proved[network] = None
        self._proved.move_to_end(network)
        if len(self._proved) > FRIENDS_MAX:
            self._proved.popitem(last=False)

    def failed(self, host: str, now: float) -> None:
        """A hello with `host` came to nothing by its own fault.

        Args:
            host: Where from.
            now: In seconds.
        """
        self._troublesome.note(network_of(host), now)

    def is_unwelcome(self, host: str, now: float) -> bool:
        """Whether the next connection from `host` is not worth a hello; see `failed`."""
        network = network_of(host)
        return not self._is_friend(network) and self._troublesome.is_too_much(network, now)

    def must_wait(self, host: str, now: float) -> bool:
        """Whether the next connection from `host` is listened to a moment later; see `failed`."""
        network = network_of(host)
        return self._is_friend(network) and self._troublesome.is_too_much(network, now)

    def _is_friend(self, network: str) -> bool:
        return network == "loopback" or network in self._proved

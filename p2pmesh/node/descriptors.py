"""How many descriptors this process may have, and how they are shared out.

Each connection and each open file costs one. When none is left nothing works any more: no engine
is asked, no file read. So everything that others can open here is bounded, and all these bounds
together leave a reserve.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import structlog

from p2pmesh.console.serve import CONNECTIONS_MAX as CONSOLE_MAX
from p2pmesh.gateway.limits import CONNECTIONS_MAX, IN_FLIGHT_MAX, POOL_IDLE_MAX, Limits
from p2pmesh.transport.tls import HOLDING_MAX, UNAUTHENTICATED_MAX

WANTED = 65536  # twenty times what all bounds add up to
# For the process itself and its engines (40 with one model), its gossip links (some 30 in a large
# mesh), dials, and files that are read and written.
RESERVE = 192
RESERVE_SHARE = 4  # of a small limit no more than this part
UNAUTHENTICATED_MIN = 8  # nodes that join at once, even where descriptors are few

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The number of descriptors that each part may hold.

    Attributes:
        connections: To the API from clients, and as many streams from peers.
        in_flight: Requests of clients being answered, and as many of peers and of guests; each has
            a connection to a replica.
        pool_idle: Connections to replicas kept for the next request.
        console: Connections to the console.
        unauthenticated: Connections to the peer port that have not proved who they are, and as
            many from networks of members.
        holding: Connections to the peer port that are kept waiting before they are closed.
    """

    connections: int = CONNECTIONS_MAX
    in_flight: int = IN_FLIGHT_MAX
    pool_idle: int = POOL_IDLE_MAX
    console: int = CONSOLE_MAX
    unauthenticated: int = UNAUTHENTICATED_MAX
    holding: int = HOLDING_MAX

    @property
    def gateway(self) -> Limits:
        """Return the gateway's share."""
        return Limits(
            connections=self.connections, in_flight=self.in_flight, pool_idle=self.pool_idle
        )

    @property
    def total(self) -> int:
        """Descriptors that all of it takes."""
        both = 2 * self.connections + 3 * self.in_flight
        door = 2 * self.unauthenticated + self.holding
        return both + self.pool_idle + self.console + door


def budget(limit: int) -> Bounds:
    """Share out `limit` descriptors: every bound in full, or all smaller by the same factor."""
    full = Bounds()
    share = min(1.0, (limit - min(RESERVE, limit // RESERVE_SHARE)) / full.total)
    return Bounds(
        connections=int(share * full.connections),
        in_flight=int(share * full.in_flight),
        pool_idle=int(share * full.pool_idle),
        console=int(share * full.console),
        unauthenticated=max(UNAUTHENTICATED_MIN, int(share * full.unauthenticated)),
        holding=int(share * full.holding),
    )


def raise_limit() -> int:
    """Raise this process's limit as far as it is allowed and of use; returns what it is then.

    Child processes inherit it. That harms none: an engine opens a few descriptors only.
    """
    if sys.platform == "win32":  # has no such limit
        return WANTED
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as exc:  # macOS allows less than its hard limit says
        log.warning("descriptors_not_raised", limit=soft, wanted=wanted, reason=str(exc))
        return soft
    return wanted

"""Which mesh this node belongs to: the one it is told to join, its last one, or a new one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import structlog
import trio

from p2pmesh.config import Address
from p2pmesh.errors import LinkError, LocalError, PeerError
from p2pmesh.home import Home
from p2pmesh.identity.hello import CLOCK_SKEW_S_MAX, Peer
from p2pmesh.node.keystore import MeshCard, found_mesh, load_mesh, save_mesh

JOIN_WAIT_S = 5.0  # the node to join may be starting at the same moment
JOIN_RETRY_S = 0.25

log = structlog.get_logger(__name__)


class Introduction(Protocol):
    """Says hello at an address without belonging to a mesh yet."""

    async def __call__(self, address: Address) -> Peer:
        """Who answers there.

        Raises:
            LinkError: Nobody.
            PeerError: Something that is no node of a mesh.
        """
        ...


async def choose_mesh(
    home: Home,
    join: tuple[Address, ...],
    introduce: Introduction,
    note: Callable[[str], None],
) -> MeshCard:
    """The mesh of this node, remembered for the next start.

    Args:
        home: Where it is remembered.
        join: Addresses that the user named; any one that answers will do.
        introduce: Asks at an address.
        note: Told in a sentence when it becomes another mesh than the one to join.

    Raises:
        LocalError: Nobody answers at any of them and there is no earlier mesh to wait for.
    """
    earlier = load_mesh(home)
    if not join:
        return earlier or found_mesh(home)
    try:
        peer = await _ask(join, introduce)
    except LocalError:
        if earlier is None:
            raise
        log.warning("join_unanswered", addresses=[str(address) for address in join])
        named = ", ".join(str(address) for address in join)
        note(f"Nobody answers at {named}: going on in the mesh {earlier.name}, as before")
        return earlier
    check_clock(peer)
    card = MeshCard(id=peer.mesh, name=peer.mesh_name)
    if card != earlier:
        save_mesh(home, card)
    return card


def check_clock(peer: Peer) -> None:
    """Refuse to take part with a clock that nobody else has.

    Raises:
        LocalError: This clock and the peer's differ by more than a minute.
    """
    if abs(peer.clock_ahead_s) > CLOCK_SKEW_S_MAX:
        minutes, hours = abs(peer.clock_ahead_s) // 60 % 60, abs(peer.clock_ahead_s) // 3600
        away = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
        side = "behind" if peer.clock_ahead_s > 0 else "ahead of"
        raise LocalError(f"This clock is {away} {side} the mesh; set it and start again")


async def _ask(join: tuple[Address, ...], introduce: Introduction) -> Peer:
    reasons: dict[Address, str] = {}
    deadline = trio.current_time() + JOIN_WAIT_S
    while True:
        for address in join:
            try:
                return await introduce(address)
            except (LinkError, PeerError) as exc:
                reasons[address] = str(exc)
        if trio.current_time() >= deadline:
            raise LocalError(
                "Cannot join: "
                + "; ".join(reasons[address] for address in join)
                + ". Check the address, and that `p2pmesh up` runs there"
            )
        await trio.sleep(JOIN_RETRY_S)

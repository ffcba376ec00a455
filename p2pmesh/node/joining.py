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
from p2pmesh.node.clocks import check_clock
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
        LocalError: Nobody answers at any of them and there is no earlier mesh to wait for; or
            this machine's clock is wrong.
    """
    earlier = load_mesh(home)
    if not join:
        return earlier or found_mesh(home)
    try:
        address, peer = await _ask(join, introduce)
    except LocalError:
        if earlier is None:
            raise
        log.warning("join_unanswered", addresses=[str(address) for address in join])
        named = ", ".join(str(address) for address in join)
        note(f"Nobody answers at {named}: going on in the mesh {earlier.name}, as before")
        return earlier
    if abs(peer.clock_ahead_s) > CLOCK_SKEW_S_MAX:
        others = [one for one in join if one != address]
        check_clock([peer.clock_ahead_s, *await _clocks(others, introduce)])
    card = MeshCard(id=peer.mesh, name=peer.mesh_name)
    if card != earlier:
        save_mesh(home, card)
    return card


async def _ask(join: tuple[Address, ...], introduce: Introduction) -> tuple[Address, Peer]:
    reasons: dict[Address, str] = {}
    deadline = trio.current_time() + JOIN_WAIT_S
    while True:
        for address in join:
            try:
                return address, await introduce(address)
            except (LinkError, PeerError) as exc:
                reasons[address] = str(exc)
        if trio.current_time() >= deadline:
            raise LocalError(
                "Cannot join: "
                + "; ".join(reasons[address] for address in join)
                + ". Check the address, and that `p2pmesh up` runs there"
            )
        await trio.sleep(JOIN_RETRY_S)


async def _clocks(others: list[Address], introduce: Introduction) -> list[int]:
    """How far ahead the clocks of those are that answer, in seconds."""
    ahead_s = []
    for address in others:
        try:
            ahead_s.append((await introduce(address)).clock_ahead_s)
        except (LinkError, PeerError) as exc:
            log.info("clock_not_compared", address=str(address), reason=str(exc))
    return ahead_s

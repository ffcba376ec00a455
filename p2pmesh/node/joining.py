"""Which mesh this node belongs to: the one it is told to join, its last one, or a new one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog
import trio

from p2pmesh.config import Address, Settings
from p2pmesh.errors import LinkError, LocalError, PeerError
from p2pmesh.home import Home
from p2pmesh.identity.hello import CLOCK_SKEW_S_MAX, Peer, RefusedError
from p2pmesh.node.clocks import check_clock
from p2pmesh.node.keystore import MeshInfo, found_mesh, load_mesh, save_mesh

JOIN_WAIT_S = 5.0  # the node to join may be starting at the same moment
JOIN_RETRY_S = 0.25
IDENTIFY_TIMEOUT_S = 2.0  # a web server on the way to it answers within a round trip
IDENTIFY_BYTES_MAX = 16 * 1024  # the first models of a node's API name their owner
TLS_RECORD_TYPES = range(20, 25)  # RFC 8446 §5.1: how the first byte of a peer port looks
DEFAULT_PEER_PORT = Settings().peer.port

# A node's API answers with models that it owns; anything else with some status.
_QUESTION = "GET /v1/models HTTP/1.1\r\nConnection: close\r\n"

log = structlog.get_logger(__name__)


class Introduction(Protocol):
    """Says hello at an address without belonging to a mesh yet."""

    async def __call__(self, address: Address) -> Peer:
        """Return the identity of the node that answers there.

        Raises:
            LinkError: Nobody.
            PeerError: Something that is no node of a mesh.
        """
        ...


async def what_answers(address: Address) -> str:
    """Return a sentence about what listens at an address, if it is no peer port; else "".

    Asked as an HTTP client would ask: a peer port hangs up or sends an alert of TLS.
    """
    answer = b""
    with trio.move_on_after(IDENTIFY_TIMEOUT_S):
        try:
            async with await trio.open_tcp_stream(address.host, address.port) as stream:
                await stream.send_all(f"{_QUESTION}Host: {address}\r\n\r\n".encode())
                while len(answer) < IDENTIFY_BYTES_MAX and (chunk := await stream.receive_some()):
                    answer += chunk
        except (OSError, trio.BrokenResourceError) as exc:
            log.info("stranger_unidentified", address=str(address), reason=str(exc))
    if answer.startswith(b"HTTP/"):
        whose = "the API of a node" if b'"p2pmesh"' in answer else "a web server"
        return (
            f"{address} is {whose} and no peer port; that of a node is {DEFAULT_PEER_PORT} unless "
            "it was chosen otherwise"
        )
    if answer and answer[0] not in TLS_RECORD_TYPES:
        return f"another program answers at {address}, not a p2pmesh node"
    return ""


async def choose_mesh(
    home: Home,
    join: tuple[Address, ...],
    introduce: Introduction,
    note: Callable[[str], None],
    identify: Callable[[Address], Awaitable[str]] = what_answers,
) -> MeshInfo:
    """The mesh of this node, remembered for the next start.

    Args:
        home: Where it is remembered.
        join: Addresses that the user named; any one that answers will do.
        introduce: Asks at an address.
        note: Told in a sentence when it becomes another mesh than the one to join.
        identify: Says what answers at an address that is no peer port.

    Raises:
        LocalError: No node answers at any of them and there is no earlier mesh to wait for; or
            this machine's clock is wrong.
    """
    earlier = load_mesh(home)
    if not join:
        return earlier or found_mesh(home)
    try:
        address, peer = await _ask(join, introduce, identify)
    except LocalError as exc:
        if earlier is None:
            raise
        log.warning("join_unanswered", addresses=[str(address) for address in join])
        note(f"{exc}. Going on in the mesh {earlier.name}, as before")
        return earlier
    if abs(peer.clock_ahead_s) > CLOCK_SKEW_S_MAX:
        others = [one for one in join if one != address]
        check_clock([peer.clock_ahead_s, *await _clocks(others, introduce)])
    card = MeshInfo(id=peer.mesh, name=peer.mesh_name)
    if card != earlier:
        save_mesh(home, card)
    return card


async def _ask(
    join: tuple[Address, ...],
    introduce: Introduction,
    identify: Callable[[Address], Awaitable[str]],
) -> tuple[Address, Peer]:
    """Return the first peer that answers; an address that never will is asked once."""
    reasons: dict[Address, str] = {}
    hopeless: set[Address] = set()
    deadline = trio.current_time() + JOIN_WAIT_S
    while True:
        for address in [one for one in join if one not in hopeless]:
            try:
                return address, await introduce(address)
            except RefusedError as exc:
                reasons[address] = f"{address}: {exc}"
                hopeless.add(address)
            except (LinkError, PeerError) as exc:
                stranger = "" if address in reasons else await identify(address)
                reasons[address] = stranger or str(exc)
                if stranger:
                    hopeless.add(address)
        if trio.current_time() >= deadline or hopeless.issuperset(join):
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

"""Opens a stream to a node that says several addresses, of which some may lead nowhere from here.

A laptop has addresses of its network at home, of VPNs and of containers; which of them another
machine reaches, only trying tells. One that swallows everything costs as long as a whole hello may
take, so the next is not kept waiting for that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from p2pmesh.config import Address
from p2pmesh.errors import LinkError, PeerError

STAGGER_S = 0.25  # between two addresses of one node (RFC 8305 advises the same)

OpenAt = Callable[[Address], Awaitable[trio.abc.Stream]]


async def open_first(addresses: Sequence[Address], open_at: OpenAt) -> trio.abc.Stream:
    """Return a stream to the first address that leads there; attempts at others are given up.

    The next address is tried when the one before failed, or has not answered for `STAGGER_S`.

    Args:
        addresses: The likeliest first; at least one.
        open_at: Opens a stream; raises as this does.

    Raises:
        LinkError, PeerError: None of them leads there; the reason is that of the last to fail.
    """
    opened: list[trio.abc.Stream] = []
    failures: list[LinkError | PeerError] = []
    try:
        async with trio.open_nursery() as nursery:

            async def attempt(address: Address, over: trio.Event) -> None:
                try:
                    opened.append(await open_at(address))
                    nursery.cancel_scope.cancel()
                except (LinkError, PeerError) as exc:
                    failures.append(exc)
                over.set()

            for address in addresses:
                over = trio.Event()
                nursery.start_soon(attempt, address, over)
                with trio.move_on_after(STAGGER_S):
                    await over.wait()
    except BaseException:
        for stream in opened:
            await trio.aclose_forcefully(stream)
        raise
    for stream in opened[1:]:  # two that answered in the same moment
        await trio.aclose_forcefully(stream)
    if not opened:
        raise failures[-1]
    return opened[0]

"""The gateway's view of the node: which models there are, where, and a stream to each.

The node implements this over its view of the mesh, its engines and its links. The gateway knows
nothing else of them, so that it runs the same over a fake in a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from p2pmesh.gateway.route import ServedModel, Target
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.catalogue import Catalogue
from p2pmesh.models.parts import PartId, ReplicaKey


class Backends(Protocol):
    """The replicas of each model, and the way there. Every call that is not async is instant."""

    def models(self) -> Sequence[ServedModel]:
        """Every model that is served or wanted in the mesh, whatever its state, in a fixed order.

        A model whose owner died stays in it as long as somebody wants it: the gateway then waits
        for the replacement instead of refusing.
        """
        ...

    def catalogue(self) -> Catalogue:
        """The names of exactly those models; resolves an id, a name or a digest."""
        ...

    def targets(self, digest: ModelDigest) -> Sequence[Target]:
        """The ready replicas of a model, the local one first.

        Without the nodes that local failure detection suspects or that have no link now.
        """
        ...

    async def connect(self, target: Target) -> trio.abc.Stream:
        """A new byte stream that speaks HTTP/1.1 with the replica; the caller closes it.

        A TCP connection to the engine when `target` is local, else a mesh stream that the owner
        hands to its `Gateway.serve_peer_stream`. The gateway pools what it gets and puts a
        deadline around the call.

        Raises:
            LinkError: The peer cannot be reached or refused.
            PeerError: What answers there is not that peer, or breaks the protocol.
            EngineError: The local engine has stopped since.
            OSError: The local engine does not accept.
        """
        ...

    def engine_key(self, part: PartId) -> str | None:
        """The API key of the local engine for a model, or None when it wants none."""
        ...

    async def lost(self, target: Target) -> None:
        """Wait until it is no use to wait for a replica: its node is suspect, its engine hangs.

        Returns at once when that is so already. An engine that is being stopped in order finishes
        its answers and is not lost.
        """
        ...

    def begin(self, part: PartId) -> None:
        """Hear that a request is given to the local engine of a part; `end` follows."""
        ...

    def end(self, part: PartId) -> None:
        """Hear that such a request is over."""
        ...

    def failed(self, replica: ReplicaKey) -> None:
        """Hear that a replica, which says that it is ready, did not answer a request."""
        ...

    async def changed(self) -> None:
        """Wait for the next change of `models` or `targets`.

        A change after the call, even before its first checkpoint, must wake it: the caller looks
        first and then waits, without a checkpoint between.
        """
        ...

"""Which replicas on other nodes have proved to this one that they serve.

A node says of itself that it is ready. Before this node stops its own copy for that, it asks the
other for one token, as a client's request would be forwarded. An answer is remembered for as long
as the same life of that node goes on saying `ready`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping

import structlog
import trio

from p2pmesh.engine.argv import Modality
from p2pmesh.engine.probe import exchange, reason, small_request
from p2pmesh.errors import LinkError, MeshError
from p2pmesh.gateway.headers import PART
from p2pmesh.identity.keys import show_id
from p2pmesh.models.parts import ReplicaKey
from p2pmesh.wire.text import plain_text

ANSWER_S = 10.0  # one token, behind what the replica is busy with
REASON_CHARS_MAX = 200  # of what the other node says, in the log
RETRY_S = 30.0  # a replica that did not answer is asked again; meanwhile the copy here serves

log = structlog.get_logger(__name__)

Ask = Callable[[ReplicaKey], Awaitable[None]]


class Proofs:
    """The replicas that answered.

    Args:
        ask: Has a replica compute a token; raises `MeshError` when it does not.
        on_change: Called when there is a new proof, or a replica may be asked again.
    """

    def __init__(self, ask: Ask, on_change: Callable[[], None]) -> None:
        self._ask, self._on_change = ask, on_change
        self._claims: Mapping[ReplicaKey, int] = {}
        self._proven: dict[ReplicaKey, int] = {}
        self._asking: set[ReplicaKey] = set()

    def review(self, claims: Mapping[ReplicaKey, int]) -> Collection[ReplicaKey]:
        """Return the proven ones of the replicas that are said to be ready; forget all others.

        Args:
            claims: Each replica that its node says is ready, and that node's instance.
        """
        self._claims = claims
        self._proven = {
            replica: instance
            for replica, instance in self._proven.items()
            if claims.get(replica) == instance
        }
        return self._proven.keys()

    def void(self, replica: ReplicaKey) -> None:
        """Forget that a replica answered: it failed since."""
        self._proven.pop(replica, None)

    def check(self, replica: ReplicaKey, nursery: trio.Nursery) -> None:
        """Ask a replica for a proof, unless it is being asked or was a moment ago."""
        if replica not in self._asking:
            self._asking.add(replica)
            nursery.start_soon(self._check, replica, self._claims.get(replica))

    async def _check(self, replica: ReplicaKey, instance: int | None) -> None:
        try:
            with trio.move_on_after(ANSWER_S) as scope:
                await self._ask(replica)
            if scope.cancelled_caught:
                raise LinkError(f"no answer within {ANSWER_S:.0f} s")
        except MeshError as exc:
            log.warning(
                "replica_unproven", node=show_id(replica.node), part=replica.part, reason=str(exc)
            )
            await trio.sleep(RETRY_S)
        else:
            if instance is not None and self._claims.get(replica) == instance:
                self._proven[replica] = instance
        self._asking.discard(replica)
        self._on_change()


async def ask_replica(stream: trio.abc.Stream, replica: ReplicaKey, modality: Modality) -> None:
    """Have a replica compute, over a stream to its node; closes the stream.

    Raises:
        MeshError: The answer is no answer.
    """
    named = (PART.decode(), str(replica.part))
    request, data = small_request(modality, "mesh", named)
    async with stream:
        status, body = await exchange(stream, request, data)
    if status != 200:
        raise LinkError(f"it answered {status}: {plain_text(reason(body), REASON_CHARS_MAX)}")

"""The gossip of one node, as its shell and everybody else sees it.

Pure: `handle(event, now) -> list[Out]`, where the shell does what comes out, in that order. `now`
is this machine's own time; records carry mesh time, which the core makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from p2pmesh.config import Address
from p2pmesh.gossip.core import Core
from p2pmesh.gossip.events import Event, Health, Out
from p2pmesh.gossip.shared import Shared
from p2pmesh.identity.credentials import Credential
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.state.document import Document
from p2pmesh.state.trust import Authorised, everybody
from p2pmesh.wire.statements import Statement


class Gossip:
    """One node's part in the gossip.

    Args:
        key: Signs this node's records.
        mesh: Which mesh it is about.
        instance: Random per start.
        epoch: Already on disk, larger than any used before.
        seeds: Addresses that the user named.
        book: Addresses of nodes known from earlier.
        shared: The functions that depend on their arguments alone.
        authorised: Whether a fact counts in the mesh.
        statements: Statements of trust kept from earlier, with their signatures checked.
        credential: This node's, for its records to carry; None in a mesh that asks for none.
    """

    def __init__(
        self,
        *,
        key: SigningKey,
        mesh: MeshId,
        instance: int,
        epoch: int,
        seeds: tuple[Address, ...] = (),
        book: Mapping[NodeId, tuple[Address, ...]] | None = None,
        shared: Shared | None = None,
        authorised: Authorised = everybody,
        statements: Iterable[Statement] = (),
        credential: Credential | None = None,
    ) -> None:
        self.me = NodeId(key.id)
        self._core = Core(
            key=key,
            mesh=mesh,
            instance=instance,
            epoch=epoch,
            seeds=seeds,
            book=book or {},
            shared=shared or Shared(),
            authorised=authorised,
            statements=statements,
            credential=credential,
        )

    def start(self, now: float) -> list[Out]:
        """Begin: dial, probe, and learn what earlier lives of this node wrote."""
        return self._core.start(now)

    def handle(self, event: Event, now: float) -> list[Out]:
        """Return the effects of `event`.

        Args:
            event: What happened.
            now: This machine's time in seconds; never goes back within one life.
        """
        return self._core.handle(event, now)

    @property
    def document(self) -> Document:
        """The merged facts; to be read only."""
        return self._core.document

    @property
    def plan(self) -> bytes:
        """Digest of this node's plan, for its probes; in no record, so it never feeds back."""
        return self._core.heartbeat.plan

    @plan.setter
    def plan(self, digest: bytes) -> None:
        self._core.heartbeat.plan = digest

    @property
    def plans(self) -> Mapping[NodeId, bytes]:
        """Digests of the neighbours' plans, as they last said."""
        return self._core.heartbeat.plans

    @property
    def linked(self) -> frozenset[NodeId]:
        """The nodes with a link."""
        return frozenset(self._core.links)

    @property
    def joined(self) -> bool:
        """Whether this node writes its records: it knows what earlier lives of it wrote."""
        return self._core.recovery.done

    @property
    def rejoining(self) -> bool:
        """Whether this node may be behind the others: nothing destructive may be done now."""
        return not self._core.catch_up.done

    @property
    def isolated(self) -> bool:
        """Whether this node knows of others and is linked with none: it is itself cut off."""
        return len(self._core.members.known) > 1 and not self._core.links

    @property
    def removed(self) -> frozenset[NodeId]:
        """Return the nodes that certificates have removed."""
        return self._core.document.removed

    @property
    def book(self) -> dict[NodeId, tuple[Address, ...]]:
        """Return the last known addresses of nodes, to be kept for the next start."""
        return self._core.members.book

    def mesh_now(self, now: float) -> float:
        """Mesh time at the machine's time `now`, both in seconds."""
        return self._core.clock.now(now)

    def out_of_placement(self, now: float) -> frozenset[NodeId]:
        """Return nodes outside placement: those removed, and those held for an equivocation."""
        return self._core.document.removed | self._core.document.held(self.mesh_now(now))

    def health(self, node: NodeId) -> Health:
        """How `node` is for routing; see `Healths`."""
        return self._core.healths.of(node)

    def rtt_s(self, node: NodeId) -> float | None:
        """Round-trip time of probes, None while there was none."""
        return self._core.prober.rtt_s(node)

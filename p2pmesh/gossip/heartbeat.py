"""The content of probes and answers: time, fingerprint, digest of the plan. Pure."""

from __future__ import annotations

from typing import TypeVar

from p2pmesh.gossip.catch_up import CatchUp
from p2pmesh.gossip.clock import MeshClock
from p2pmesh.gossip.dissemination import Dissemination
from p2pmesh.gossip.members import Members
from p2pmesh.gossip.neighbours import Neighbours
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import AHEAD_S_MAX
from p2pmesh.wire.messages import PLAN_DIGEST_BYTES, Ack, Ping

P = TypeVar("P", Ping, Ack)

CUTOFF_S = 5  # younger facts may be on their way and are not compared


class Heartbeat:
    """The signs of life of one node.

    Attributes:
        plan: Digest of its plan.
        plans: Of its neighbours' plans.
    """

    def __init__(
        self,
        members: Members,
        clock: MeshClock,
        near: Neighbours,
        catch_up: CatchUp,
        dissemination: Dissemination,
    ) -> None:
        self.plan = bytes(PLAN_DIGEST_BYTES)
        self.plans: dict[NodeId, bytes] = {}
        self._members, self._document, self._clock = members, members.document, clock
        self._near, self._catch_up, self._dissemination = near, catch_up, dissemination

    def probe(self, node: NodeId, token: int, now: float) -> Ping:
        """A probe of `node`.

        A node that is new or not up to date compares all that is known; so does one of two that
        meet after the mesh was cut in two.
        """
        meeting = node not in self._members.live and self._members.me < node
        return self._say(Ping, node, token, self._cutoff(now, meeting=meeting), now)

    def answer(self, node: NodeId, probe: Ping, now: float) -> Ack:
        """The answer to a probe of `node`, as of the same cutoff."""
        return self._say(Ack, node, probe.token, probe.cutoff, now)

    def read(self, node: NodeId, said: Ping | Ack, now: float) -> bool:
        """Take in what `node` said; returns whether it spoke of everything that it knows."""
        self.plans[node] = said.plan
        complete = said.cutoff > self._clock.now(now)
        if said.fingerprint == self._document.fingerprint_at(said.cutoff):
            self._catch_up.agreed(node, complete=complete, now=now)
        return complete

    def _cutoff(self, now: float, *, meeting: bool) -> int:
        everything = meeting or self._catch_up.compares_all(now)
        return int(self._clock.now(now)) + (AHEAD_S_MAX if everything else -CUTOFF_S)

    def _say(self, kind: type[P], node: NodeId, token: int, cutoff: int, now: float) -> P:
        fingerprint = self._document.fingerprint_at(cutoff)
        if fingerprint is None:  # asked about what was long ago: this is what is known now
            cutoff, fingerprint = (
                int(self._clock.now(now)) + AHEAD_S_MAX,
                self._document.fingerprint,
            )
        return kind(
            token=token,
            at_ms=int(now * 1000),
            cutoff=cutoff,
            fingerprint=fingerprint,
            plan=self.plan,
            keep=node in self._near.wanted,
            recent=self._dissemination.recent(now),
        )

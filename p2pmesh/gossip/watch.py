"""This node's watch over others: who is probed, asked about, and found out for others. Pure."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from p2pmesh.gossip.events import Send
from p2pmesh.gossip.indirect import ProbeRelay
from p2pmesh.gossip.members import Members
from p2pmesh.gossip.neighbours import Neighbours
from p2pmesh.gossip.probe import Prober
from p2pmesh.gossip.suspicion import Suspicion
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import ProbeRequest


class Watch:
    """One observer.

    Args:
        members: The members.
        prober: What is measured.
        near: Whom it observes.
        links: Whom it is linked with.
    """

    def __init__(
        self, members: Members, prober: Prober, near: Neighbours, links: AbstractSet[NodeId]
    ) -> None:
        self.suspicion = Suspicion(members, prober)
        self.indirect = ProbeRelay()
        self._me, self._prober, self._near, self._links = members.me, prober, near, links

    def heard(self, node: NodeId) -> list[Send]:
        """There was a sign of life of `node`: whoever asked about it is told."""
        self.suspicion.heard(node)
        return self.indirect.found(node, alive=True)

    def is_mine_to_probe(self, node: NodeId, now: float) -> bool:
        """Each link is probed from one end: by the observer, else by the smaller id.

        A node that should be probing this one and is silent is probed as well.
        """
        if node in self._near.subjects or self._prober.quiet(node, now):
            return True
        return node not in self._near.observers and self._me < node

    def ask_around(self, now: float) -> list[Send]:
        """Ask about those that miss answers."""
        links = sorted(node for node in self._links if self._prober.answering(node))

        def helpers(subject: NodeId, turn: int) -> list[NodeId]:
            """Links to ask about `subject`: its own neighbours first, then the others in turn."""
            first = turn % len(links) if links else 0
            near = self._near.near(subject)
            others = [node for node in links[first:] + links[:first] if node != subject]
            return sorted(others, key=lambda node: node not in near)

        questions = self.suspicion.ask(self._near.subjects, helpers, now)
        return [
            Send(node=one.helper, message=ProbeRequest(subject=one.subject, token=one.token))
            for one in questions
        ]

    def accuse(self, removed: AbstractSet[NodeId], now: float) -> bool:
        """Accuse and withdraw what is due; returns whether there was anything."""
        return self.suspicion.review(self._near.subjects, removed, now)

"""Watching the linked nodes: probes, round-trip times, and what follows from missed answers.

Pure. Two speeds: one missed answer or a broken link makes a node `suspect` at once, which only
routing heeds; three in a row, or word from its machine that nothing listens there, make it `dead`
for placement. Any sign of life undoes both. It is what this node sees, not what the mesh agrees
on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from p2pmesh.gossip.events import Health
from p2pmesh.identity.keys import NodeId

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 0.5
MISSES_DEAD = 3  # in a row
SILENCE_DEAD_S = MISSES_DEAD * PROBE_INTERVAL_S + PROBE_TIMEOUT_S
RTT_SMOOTHING = 0.25  # weight of the newest sample


@dataclass(slots=True)
class _Watched:
    health: Health = Health.SUSPECT  # until the first link: known of, never reached
    linked: bool = False
    heard_at: float = 0.0
    misses: int = 0
    asked: int | None = None  # token of the probe that is under way
    asked_at: float = 0.0
    rtt_s: float | None = None


class Prober:
    """What this node sees of each other node."""

    def __init__(self) -> None:
        self._nodes: dict[NodeId, _Watched] = {}
        self._token = 0

    def health(self, node: NodeId) -> Health:
        """How `node` is; nodes never reached are suspect."""
        watched = self._nodes.get(node)
        return watched.health if watched else Health.SUSPECT

    def rtt_s(self, node: NodeId) -> float | None:
        """Smoothed round-trip time, None before the first answer."""
        watched = self._nodes.get(node)
        return watched.rtt_s if watched else None

    def link_up(self, node: NodeId, now: float) -> Health:
        """There is a link: proof of life."""
        watched = self._nodes.setdefault(node, _Watched())
        watched.linked, watched.asked = True, None
        return self.heard(node, now)

    def link_down(self, node: NodeId) -> Health:
        """The link broke: avoid the node until it is back."""
        watched = self._nodes.setdefault(node, _Watched())
        watched.linked, watched.asked = False, None
        if watched.health is Health.LIVE:
            watched.health = Health.SUSPECT
        return watched.health

    def nobody_there(self, node: NodeId) -> Health:
        """Its machine says that it does not run."""
        watched = self._nodes.setdefault(node, _Watched())
        if not watched.linked:
            watched.health = Health.DEAD
        return watched.health

    def heard(self, node: NodeId, now: float) -> Health:
        """Anything came from `node`."""
        watched = self._nodes.setdefault(node, _Watched())
        watched.heard_at, watched.misses, watched.health = now, 0, Health.LIVE
        return watched.health

    def ask(self, node: NodeId, now: float) -> int | None:
        """The token of a probe to send now; None while one is under way."""
        watched = self._nodes[node]
        if watched.asked is not None:
            return None
        self._token += 1
        watched.asked, watched.asked_at = self._token, now
        return self._token

    def answered(self, node: NodeId, token: int, now: float) -> None:
        """The answer to a probe came; one nobody waits for any more is only a sign of life."""
        watched = self._nodes.get(node)
        if watched is None or watched.asked != token:
            return
        watched.asked = None
        sample = now - watched.asked_at
        old = watched.rtt_s
        watched.rtt_s = sample if old is None else old + RTT_SMOOTHING * (sample - old)

    def missed(self, now: float) -> list[tuple[NodeId, Health]]:
        """Count what was asked more than the time-out ago and silence of the unlinked.

        Returns those whose health this changes.
        """
        changed: list[tuple[NodeId, Health]] = []
        for node, watched in sorted(self._nodes.items()):
            before = watched.health
            if watched.asked is not None and now - watched.asked_at >= PROBE_TIMEOUT_S - 1e-6:
                watched.asked = None
                watched.misses += 1
                watched.health = Health.DEAD if watched.misses >= MISSES_DEAD else Health.SUSPECT
            elif not watched.linked and watched.heard_at:
                silent_s = now - watched.heard_at
                if watched.health is Health.SUSPECT and silent_s >= SILENCE_DEAD_S:
                    watched.health = Health.DEAD
            if watched.health is not before:
                changed.append((node, watched.health))
        return changed

    def forgive(self, now: float) -> None:
        """This node itself was away: nobody is blamed for the silence meanwhile."""
        for watched in self._nodes.values():
            watched.asked, watched.misses = None, 0
            if watched.heard_at:
                watched.heard_at = now

    def forget_except(self, known: Iterable[NodeId]) -> None:
        """Drop what is kept of nodes that nothing is known of any more."""
        keep = set(known)
        for node in [n for n, watched in self._nodes.items() if not watched.linked]:
            if node not in keep:
                del self._nodes[node]
